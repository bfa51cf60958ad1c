"""Locations of weights: a local path, a URL, or a repository of the Hugging Face hub."""

from __future__ import annotations

import re
import string
import sys
import urllib.parse
from http.client import HTTPException
from pathlib import Path

import torch
from filelock import FileLock

from lit_purify.errors import InputError
from lit_purify.shipped import shipped

# Early repositories keep the scheduler's settings beside those of the network.
_MODEL = ["config.json", "scheduler_config.json", "scheduler/scheduler_config.json", "unet/config.json"]
_WEIGHTS = ["diffusion_pytorch_model.{}", "diffusion_pytorch_model-*-of-*.{}", "diffusion_pytorch_model.{}.index.json"]


def locate(source: str | Path) -> Path:
    """Returns the local path of weights and downloads them if necessary.

    Args:
        source: One of
            a local path, which is returned unchanged (see ``shipped``);
            ``https://host/file.pt#sha256=<64 hexadecimal digits>`` (or ``http``), downloaded once into the cache;
            ``hf://organization/name/path/to/file``, a file on the Hugging Face hub;
            ``hf://organization/name``, the folder of a diffusers ``UNet2DModel``, reduced to its config and weights.
            The name may be followed by ``@revision``: a commit, a tag or a branch (with ``%2F`` for a slash).
            A ``Path`` made from a URL, which loses a slash, is accepted too.

    Raises:
        InputError: The address is incomplete, the download fails, the content does not match the SHA-256, or the cache
            cannot be written.
    """
    text = str(source)
    if match := re.match(r"(https?):/+", text, re.IGNORECASE):
        return _from_web(f"{match[1].lower()}://{text[match.end() :]}")
    if match := re.match(r"hf:/+", text, re.IGNORECASE):
        return _from_hub(f"hf://{text[match.end() :]}")
    return shipped(Path(source))


def _from_web(address: str) -> Path:
    """Returns the file in torch's cache, ``<SHA-256>/<name>``; cached files were verified when they were downloaded."""
    url, _, fragment = address.partition("#")
    match = re.fullmatch(r"sha256=([0-9a-f]{64})", fragment.strip(), re.IGNORECASE)
    if not match:
        raise InputError(
            f"{url}: the SHA-256 of the file is missing: write {url}#sha256=<64 hexadecimal digits>; "
            "'sha256sum FILE' prints it for a copy that you trust"
        )
    folder = Path(torch.hub.get_dir()) / "checkpoints" / match[1].lower()
    last = urllib.parse.unquote(url.partition("?")[0].rpartition("/")[2])
    # Only the lock file starts with a dot.
    path = folder / (re.sub(r"[^\w.+-]", "_", last).lstrip(".")[-100:] or "weights")
    if path.is_file():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # One process downloads, the others wait.
        with FileLock(folder / ".lock"):
            if not path.is_file():
                print(f"Downloading {url} to {folder}", file=sys.stderr, flush=True)
                # Spaces and non-ASCII letters must be escaped.
                escaped = urllib.parse.quote(url, safe=string.punctuation)
                torch.hub.download_url_to_file(escaped, str(path), folder.name, progress=sys.stderr.isatty())
    # Network, server and disk errors; a malformed address; unexpected content.
    except (OSError, HTTPException, ValueError, RuntimeError) as error:
        reason = f"cannot be fetched to {folder}: {_reason(error)}"
        raise InputError(
            f"{url}: {reason}; fetch the file by hand and give its local path (TORCH_HOME names another cache)"
        ) from error
    return path


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _from_hub(address: str) -> Path:
    """Returns a file or a folder in the hub's cache."""
    match = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?", address)
    if not match:
        raise InputError(
            f"{address}: write hf://organization/name or hf://organization/name/path/to/file, where name may be "
            "followed by @revision"
        )
    repository, revision, file = match[1], match[2] and urllib.parse.unquote(match[2]), match[3]
    # Slow to import and only used for the hub.
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if file:
            return Path(hf_hub_download(repository, file, revision=revision))
        # Many repositories have the same weights in both formats.
        for suffix in ("safetensors", "bin"):
            names = [part + name.format(suffix) for part in ("", "unet/") for name in _WEIGHTS]
            folder = Path(snapshot_download(repository, revision=revision, allow_patterns=_MODEL + names))
            if any(found for name in names for found in folder.glob(name)):
                return folder
    # The hub's versions use several HTTP libraries.
    except Exception as error:
        reason = f"{type(error).__name__}: {_reason(error)}"
        raise InputError(
            f"{address}: {reason}; check the name and the network, log in with 'hf auth login' if it is private, or "
            "fetch it by hand and give its local path"
        ) from error
    raise InputError(f"{address}: holds no diffusers UNet2DModel: name one of its files: {address.rstrip('/')}/FILE")
