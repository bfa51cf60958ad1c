"""Where weights come from: a local path, an address on the web, or a repository of the Hugging Face hub."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import re
import socket
import string
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_purify.errors import InputError

_TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as cut."""
_RETRIES = 4
"""Connections in a row that may bring nothing new, once one has brought something."""
_PAUSE = 1.0
"""Seconds before the first of them; each waits that much longer than the one before."""
_BLOCK = 1 << 20

# Early repositories keep the scheduler's settings beside the network's.
_MODEL = ["config.json", "scheduler_config.json", "scheduler/scheduler_config.json", "unet/config.json"]
_WEIGHTS = ["diffusion_pytorch_model.{}", "unet/diffusion_pytorch_model.{}"]


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
        with _locked(folder / ".lock"):
            # Another process may have finished while this one waited.
            if not path.is_file():
                _download(url, folder.name, folder / ".partial")
                (folder / ".partial").replace(path)
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


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock of a process that was killed is gone with it."""
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for another process that downloads to {path.parent}", file=sys.stderr, flush=True)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _download(url: str, sha256: str, partial: Path) -> None:
    """Completes ``partial``, which an earlier call may have begun; leaves none of other content."""
    resumed = _size(partial) > 0
    _fetch(url, partial)
    if resumed and _sha256(partial) != sha256:
        # The file may have been another one then, or the machine went down before it was all on the disk.
        partial.unlink()
        _fetch(url, partial)
    if (found := _sha256(partial)) != sha256:
        with partial.open("rb") as stream:
            page = stream.read(512).lstrip().startswith(b"<")
        partial.unlink()
        hint = "is it the file you mean, and whole? Nothing was kept"
        if page:
            hint = "it looks like an HTML page, not weights: give the address of the file itself"
        raise InputError(f"{url}: has SHA-256 {found}, expected {sha256}; {hint}")


class _InterruptedError(Exception):
    """The network failed; the message says how."""


def _fetch(url: str, partial: Path) -> None:
    """Appends to ``partial`` what is missing, over as many connections as bring something new."""
    # The first connection gets one try: where there is no network, waiting does not help.
    best, left = _size(partial), 0
    while True:
        try:
            return _append(url, partial)
        except _InterruptedError as error:
            size = _size(partial)
            left = _RETRIES if size > best else left - 1
            best = max(best, size)
            if left < 0:
                raise InputError(
                    f"{url}: cannot be downloaded: {error}; is there a network? If not, fetch the file by hand and "
                    "give its local path"
                ) from error
        time.sleep(_PAUSE * (1 + _RETRIES - left))


def _append(url: str, partial: Path) -> None:
    """One connection: asks for what follows the bytes that are there."""
    start = _size(partial)
    headers = {"User-Agent": "lit_purify"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        # Spaces and letters beyond ASCII have to be escaped.
        request = urllib.request.Request(urllib.parse.quote(url, safe=string.punctuation), headers=headers)
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:
            return  # There is no more: the hash tells whether it is all.
        raise InputError(
            f"{url}: the server answered {error.code} {error.reason}; check the address, or fetch the file by hand "
            "and give its local path"
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _InterruptedError(_reason(error)) from error
    with response:
        if response.status != 206:
            start = 0  # A server that knows no ranges sends everything again.
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            partial.unlink()  # A server that takes them otherwise is not asked for one.
            return _append(url, partial)
        total = None if response.length is None else start + response.length
        size = f" ({total / 1e6:.1f} MB{f', {start / 1e6:.1f} MB are here' if start else ''})" if total else ""
        print(f"Downloading {url}{size} to {partial.parent}", file=sys.stderr, flush=True)
        with partial.open("ab" if start else "wb") as stream:
            for block in _blocks(response):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
    if total is not None and _size(partial) < total:
        raise _InterruptedError(f"the connection was cut after {_size(partial)} of {total} bytes")


def _blocks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """What arrives, as soon as it does; separates errors of the network from those of the disk."""
    try:
        while block := response.read1(_BLOCK):
            yield block
    except (OSError, http.client.HTTPException) as error:
        raise _InterruptedError(_reason(error)) from error


def _reason(error: BaseException) -> str:
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        error = error.reason
    if isinstance(error, socket.gaierror):
        return "the name of the host cannot be resolved"
    if isinstance(error, TimeoutError):
        return f"no answer within {_TIMEOUT:.0f} seconds"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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

    try:
        if file:
            return Path(hf_hub_download(repository, file, revision=revision))
        # Many repositories hold the same weights in both forms.
        for suffix in ("safetensors", "bin"):
            names = [name.format(suffix) for name in _WEIGHTS]
            folder = Path(snapshot_download(repository, revision=revision, allow_patterns=_MODEL + names))
            if any((folder / name).is_file() for name in names):
                return folder
    except errors.GatedRepoError as error:
        reason = f"is gated: accept its terms at https://huggingface.co/{repository} and log in with 'hf auth login'"
        raise InputError(f"{address}: {reason}") from error
    except errors.RepositoryNotFoundError as error:
        reason = "no such repository; check organization and name, or log in with 'hf auth login' if it is private"
        raise InputError(f"{address}: {reason}") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{address}: the repository has no revision {revision}; check what follows '@'") from error
    except errors.LocalEntryNotFoundError as error:
        cause = error.__cause__ or error
        if isinstance(cause, errors.OfflineModeIsEnabled):
            reason = "HF_HUB_OFFLINE is set"
        elif isinstance(cause, errors.HfHubHTTPError):
            reason = f"the hub answered: {_reason(cause)}"
        else:
            reason = f"the hub cannot be reached ({_reason(cause)})"
        raise InputError(
            f"{address}: not in the cache, and {reason}; mend that, or fetch it by hand and give its local path"
        ) from error
    except errors.EntryNotFoundError as error:
        raise InputError(f"{address}: the repository has no file {file}; check what follows the name") from error
    except Exception as error:  # of several HTTP libraries, as the hub's versions go
        raise InputError(
            f"{address}: cannot be fetched ({_reason(error)}); fetch it by hand and give its local path"
        ) from error
    raise InputError(f"{address}: holds no diffusers UNet2DModel; name a file of it: {address.rstrip('/')}/FILE")
