"""Where weights come from: a local path, an address on the web, or a repository of the Hugging Face hub."""

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

# Early repositories keep the scheduler's settings beside the network's.
_MODEL = ["config.json", "scheduler_config.json", "scheduler/scheduler_config.json", "unet/config.json"]
_WEIGHTS = ["diffusion_pytorch_model.{}", "diffusion_pytorch_model-*-of-*.{}", "diffusion_pytorch_model.{}.index.json"]


def locate(source: str | Path) -> Path:
    """The local path of weights that a configuration names.

    Args:
        source: One of
            a local path, which is returned as it is, whether there is something or not (see ``shipped``);
            ``https://host/file.pt#sha256=<64 hexadecimal digits>`` (or ``http``), downloaded once into the cache;
            ``hf://organization/name/path/to/file``, a file of the Hugging Face hub;
            ``hf://organization/name``, the folder of a diffusers ``UNet2DModel`` there, without what it does not need.
            After the name, ``@revision`` may give a commit, a tag or a branch (with ``%2F`` for a slash in it).
            A ``Path`` made of an address, which has lost a slash, is understood as well.

    Raises:
        InputError: The address is incomplete, there is no network, the server refuses, the content is not what the
            SHA-256 says, or the cache cannot be written.
    """
    text = str(source)
    if match := re.match(r"(https?):/+", text, re.IGNORECASE):
        return _from_web(f"{match[1].lower()}://{text[match.end() :]}")
    if match := re.match(r"hf:/+", text, re.IGNORECASE):
        return _from_hub(f"hf://{text[match.end() :]}")
    return shipped(Path(source))


def _from_web(address: str) -> Path:
    """The file in torch's cache, as ``<SHA-256>/<its name>``: what lies there has been checked and needs no network."""
    url, _, fragment = address.partition("#")
    match = re.fullmatch(r"sha256=([0-9a-f]{64})", fragment.strip(), re.IGNORECASE)
    if not match:
        raise InputError(
            f"{url}: the SHA-256 of the file is needed as well: write {url}#sha256=<64 hexadecimal digits>; "
            "'sha256sum FILE' prints it for a copy that you trust"
        )
    folder = Path(torch.hub.get_dir()) / "checkpoints" / match[1].lower()
    last = urllib.parse.unquote(url.partition("?")[0].rpartition("/")[2])
    # A leading dot is the lock's.
    path = folder / (re.sub(r"[^\w.+-]", "_", last).lstrip(".")[-100:] or "weights")
    if path.is_file():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # One process downloads, the others wait.
        with FileLock(folder / ".lock"):
            if not path.is_file():
                print(f"Downloading {url} to {folder}", file=sys.stderr, flush=True)
                # Spaces and letters beyond ASCII have to be escaped.
                escaped = urllib.parse.quote(url, safe=string.punctuation)
                torch.hub.download_url_to_file(escaped, str(path), folder.name, progress=sys.stderr.isatty())
    # Network, server and disk; a malformed address; another content.
    except (OSError, HTTPException, ValueError, RuntimeError) as error:
        reason = f"cannot be fetched to {folder}: {_reason(error)}"
        raise InputError(
            f"{url}: {reason}; fetch the file by hand and give its local path (TORCH_HOME names another cache)"
        ) from error
    return path


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _from_hub(address: str) -> Path:
    """A file or a folder in the hub's own cache."""
    match = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?", address)
    if not match:
        raise InputError(
            f"{address}: write hf://organization/name or hf://organization/name/path/to/file, where name may be "
            "followed by @revision"
        )
    repository, revision, file = match[1], match[2] and urllib.parse.unquote(match[2]), match[3]
    # Takes a moment to import, and only those who name the hub need it.
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if file:
            return Path(hf_hub_download(repository, file, revision=revision))
        # Many repositories hold the same weights in both forms.
        for suffix in ("safetensors", "bin"):
            names = [part + name.format(suffix) for part in ("", "unet/") for name in _WEIGHTS]
            folder = Path(snapshot_download(repository, revision=revision, allow_patterns=_MODEL + names))
            if any(found for name in names for found in folder.glob(name)):
                return folder
    # Of several HTTP libraries, as the hub's versions go.
    except Exception as error:
        reason = f"{type(error).__name__}: {_reason(error)}"
        raise InputError(
            f"{address}: {reason}; check the name and the network, log in with 'hf auth login' if it is private, or "
            "fetch it by hand and give its local path"
        ) from error
    raise InputError(f"{address}: holds no diffusers UNet2DModel; name a file of it: {address.rstrip('/')}/FILE")
