"""Where weights come from: a local path, an address on the web, or a repository of the Hugging Face hub."""

from __future__ import annotations

import fcntl
import http.client
import os
import re
import string
import sys
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from pathlib import Path

import torch

from lit_purify.errors import InputError

# Early repositories keep the scheduler's settings beside the network's.
_MODEL = ["config.json", "scheduler_config.json", "scheduler/scheduler_config.json", "unet/config.json"]
_WEIGHTS = ["diffusion_pytorch_model.{}", "diffusion_pytorch_model-*-of-*.{}", "diffusion_pytorch_model.{}.index.json"]


def locate(source: str | Path) -> Path:
    """The local path of weights that a configuration names.

    Args:
        source: One of
            a local path, which is returned as it is, whether there is something or not;
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
    return Path(source)


def cache_folder() -> Path:
    """``$LIT_PURIFY_CACHE``, else ``$XDG_CACHE_HOME/lit_purify``, else ``~/.cache/lit_purify``.

    The one thing that is read from a shell's variables outside of ``cli``: where there is room belongs to the
    machine, not to a run, and the configuration of a run must repeat it on another machine.
    """
    own, shared = os.getenv("LIT_PURIFY_CACHE"), os.getenv("XDG_CACHE_HOME")
    return (Path(own) if own else Path(shared or "~/.cache") / "lit_purify").expanduser()


def _from_web(address: str) -> Path:
    """The file in the cache, as ``<SHA-256>/<its name>``: what lies there has been checked and needs no network."""
    url, _, fragment = address.partition("#")
    match = re.fullmatch(r"sha256=([0-9a-f]{64})", fragment.strip(), re.IGNORECASE)
    if not match:
        raise InputError(
            f"{url}: the SHA-256 of the file is needed as well: write {url}#sha256=<64 hexadecimal digits>; "
            "'sha256sum FILE' prints it for a copy that you trust"
        )
    folder = cache_folder() / match[1].lower()
    path = folder / _file_name(url)
    try:
        if path.is_file():
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            # One process downloads, the others wait.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.is_file():
                for left in folder.glob("*.partial"):
                    left.unlink()
                _download(url, folder.name, path)
    except OSError as error:
        # Not of the network: those have become an InputError.
        raise InputError(
            f"{folder}: cannot be written ({_reason(error)}); make room there, or name another folder: "
            "export LIT_PURIFY_CACHE=FOLDER"
        ) from error
    return path


def _file_name(url: str) -> str:
    last = urllib.parse.unquote(url.partition("?")[0].rpartition("/")[2])
    # Names with a leading dot are the cache's own.
    return re.sub(r"[^\w.+-]", "_", last).lstrip(".")[-100:] or "weights"


def _download(url: str, sha256: str, path: Path) -> None:
    """Places the whole file, or nothing."""
    print(f"Downloading {url} to {path.parent}", file=sys.stderr, flush=True)
    # Spaces and letters beyond ASCII have to be escaped.
    escaped = urllib.parse.quote(url, safe=string.punctuation)
    by_hand = "fetch the file by hand and give its local path"
    try:
        torch.hub.download_url_to_file(escaped, str(path), sha256, progress=sys.stderr.isatty())
    except urllib.error.HTTPError as error:
        reason = f"the server answered {error.code} {error.reason}; check the address, or {by_hand}"
        raise InputError(f"{url}: {reason}") from error
    except (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException, ValueError) as error:
        reason = f"cannot be downloaded: {_reason(error)}; is there a network? If not, {by_hand}"
        raise InputError(f"{url}: {reason}") from error
    except RuntimeError as error:
        hint = "is it the file you mean, and whole? Nothing was kept"
        with suppress(Exception), urllib.request.urlopen(escaped) as page:
            if page.read(512).lstrip().startswith(b"<"):
                hint = "it is an HTML page, not weights: give the address of the file itself"
        raise InputError(f"{url}: {_reason(error)}; {hint}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        error = error.reason
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
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    # The first that fits: those that follow are more general.
    reasons = (
        (errors.GatedRepoError, "its terms have to be accepted on its page, after that log in with 'hf auth login'"),
        (errors.RepositoryNotFoundError, "no such repository; if it is private, log in with 'hf auth login'"),
        (errors.RevisionNotFoundError, f"the repository has no revision {revision}"),
        (errors.LocalEntryNotFoundError, "not in the cache, and the hub cannot be reached (or HF_HUB_OFFLINE is set)"),
        (errors.EntryNotFoundError, f"the repository has no file {file}"),
    )
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
        reason = next((text for kind, text in reasons if isinstance(error, kind)), _reason(error))
        raise InputError(f"{address}: {reason}; mend that, or fetch it by hand and give its local path") from error
    raise InputError(f"{address}: holds no diffusers UNet2DModel; name a file of it: {address.rstrip('/')}/FILE")
