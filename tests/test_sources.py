"""Weights from a local path, from the web and from the Hugging Face hub; every server is on loopback."""

import errno
import hashlib
import json
import os
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from lit_purify.errors import InputError
from lit_purify.models.sources import locate

CONTENT = bytes(range(256)) * 400


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hub" / "checkpoints"


@pytest.fixture
def serve():
    """Starts servers; ``answer`` is a function of the handler."""
    running = []

    def start(answer):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                answer(self)

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        running.append(server)
        return server, f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in running:
        stop(server)


@pytest.fixture
def site(serve):
    """One file on the web, or an error of the server."""
    site = SimpleNamespace(content=CONTENT, status=200, cut=None, asked=0)

    def answer(request):
        site.asked += 1
        if site.status != 200:
            request.send_error(site.status)
            return
        request.send_response(200)
        request.send_header("Content-Length", str(len(site.content)))
        request.end_headers()
        request.wfile.write(site.content[: site.cut])

    site.server, site.url = serve(answer)
    return site


def stop(server):
    server.shutdown()
    server.server_close()


def address(site, name="weights.pt", content=CONTENT):
    return f"{site.url}/{name}#sha256={digest(content)}"


def digest(content):
    return hashlib.sha256(content).hexdigest()


def refused(source):
    with pytest.raises(InputError) as caught:
        locate(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "path", ["a/weights.pt", "C:/weights.pt", "C:\\weights.pt", "a#sha256=1.pt", "hf/a.pt", "https.pt", "http:a"]
)
def test_a_local_path_is_itself(path):
    assert locate(path) == locate(Path(path)) == Path(path)


def test_a_download_is_kept(site, cache, capsys):
    folder = cache / digest(CONTENT)
    folder.mkdir(parents=True)
    path = locate(address(site))
    assert path.read_bytes() == CONTENT
    assert path == folder / "weights.pt"
    assert "Downloading" in capsys.readouterr().err
    stop(site.server)
    (folder / ".lock").unlink()
    assert locate(address(site)) == path
    assert locate(address(site).replace(digest(CONTENT), digest(CONTENT).upper())) == path
    # What a configuration makes of an address where it expects a path.
    assert locate(Path(address(site))) == path
    assert site.asked == 1
    # Nothing was written for it: others may share a cache that they can only read.
    assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("a/b/net.safetensors?download=1&x=/y", "net.safetensors"),
        ("..", "weights"),
        ("a%2F..%2F.partial", "a_.._.partial"),
        (".lock", "lock"),
        ("für%2032 x.pt", "für_32_x.pt"),
    ],
)
def test_names_of_downloads(site, cache, name, kept):
    path = locate(address(site, name))
    assert path == cache / digest(CONTENT) / kept
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("content", "cut", "said"), [(b"other", None, digest(b"other")[:8]), (CONTENT, 500, "invalid hash value")]
)
def test_another_content_leaves_nothing(site, cache, content, cut, said):
    site.content, site.cut = content, cut
    assert said in refused(address(site))
    assert [path.name for path in cache.rglob("*") if path.is_file()] == [".lock"]


def test_two_at_once_download_once(site, cache):
    threads = [threading.Thread(target=locate, args=(address(site),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert site.asked == 1


def test_errors_of_server_and_network(site, cache, monkeypatch):
    site.status = 404
    message = refused(address(site))
    assert f"{site.url}/weights.pt: cannot be fetched" in message
    assert "404" in message
    assert "local path" in message
    stop(site.server)
    assert "refused" in refused(address(site)).lower()
    assert "cannot be fetched" in refused(f"http://host:x/a.pt#sha256={'0' * 64}")

    def unknown(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "Name or service not known" in refused(f"https://host.invalid/a.pt#sha256={'0' * 64}")


@pytest.mark.parametrize("end", ["", "#", "#sha256=12", f"#md5={'0' * 32}", f"#sha256={'g' * 64}"])
def test_no_hash(cache, end):
    message = refused(f"https://host/a.pt{end}")
    assert "https://host/a.pt#sha256=<64 hexadecimal digits>" in message
    assert not cache.exists()


def test_a_cache_that_cannot_be_written(site, cache, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("shutil.move", full)
        assert "No space left" in refused(address(site))
    assert [path.name for path in cache.rglob("*") if path.is_file()] == [".lock"]
    monkeypatch.setenv("TORCH_HOME", str(cache / digest(CONTENT) / ".lock"))
    assert "TORCH_HOME names another cache" in refused(address(site))


COMMITS = {"main": "a" * 40, "v1": "b" * 40, "refs/pr/2": "c" * 40}
PIPELINE = {
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.bin": b"bin",
    "unet/diffusion_pytorch_model.safetensors": b"safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors": b"half",
    "scheduler/scheduler_config.json": b"{}",
    "vae/diffusion_pytorch_model.safetensors": b"vae",
}
REPOSITORIES = {
    "org/unet": {"config.json": b"{}", "diffusion_pytorch_model.bin": b"bin", "README.md": b"text"},
    "org/pipeline": PIPELINE,
    "org/shards": dict.fromkeys(
        ["diffusion_pytorch_model-00001-of-00001.bin", "diffusion_pytorch_model.bin.index.json", "config.json"], b"{}"
    ),
    "org/other": {"deep/net.safetensors": b"deep"},
}


@pytest.fixture
def hub(serve, tmp_path, monkeypatch):
    """What ``huggingface_hub`` asks the hub for; revisions differ in the last byte of a file."""

    def send(request, body, status=200, **headers):
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)

    def answer(request):
        words = request.path.partition("?")[0].removeprefix("/api/models").split("/")
        repository, action, rest = "/".join(words[1:3]), "".join(words[3:4]), "/".join(words[4:])
        revision, _, file = rest.partition("/")
        commit = {**COMMITS, **{commit: commit for commit in COMMITS.values()}}.get(
            revision.replace("%2F", "/") or "main"
        )
        if repository == "org/gated":
            send(request, b"", 403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        elif repository not in REPOSITORIES:
            send(request, b"", 401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif commit is None:
            send(request, b"", 404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        elif action == "resolve":
            body = REPOSITORIES[repository].get(file)
            if body is None:
                send(request, b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            else:
                body += commit[:1].encode()
                send(request, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=commit)
        else:
            files = [
                {"type": "file", "path": name, "rfilename": name, "size": len(body) + 1, "oid": digest(body)[:40]}
                for name, body in REPOSITORIES[repository].items()
            ]
            found = files if action == "tree" else {"id": repository, "sha": commit, "siblings": files}
            send(request, json.dumps(found).encode(), Content_Type="application/json")

    server, url = serve(answer)
    constants = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}"}
    constants |= {"HF_HUB_CACHE": str(tmp_path / "hf"), "HF_HUB_OFFLINE": False}
    for name, value in constants.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    return server


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def test_the_hub_gives_files_and_folders(hub, monkeypatch):
    given = ["hf://org/other/deep/net.safetensors", "hf:/org/other@v1/deep/net.safetensors"]
    given += [
        "hf://org/other@refs%2Fpr%2F2/deep/net.safetensors",
        "hf://org/unet",
        "hf://org/pipeline@v1/",
        "hf://org/shards",
    ]
    main, tagged, pulled, unet, pipeline, shards = found = [locate(source) for source in given]
    assert (main.read_bytes(), tagged.read_bytes(), pulled.read_bytes()) == (b"deepa", b"deepb", b"deepc")
    assert main.name == "net.safetensors"
    # What a UNet needs, and its weights in one form.
    assert names(shards) == sorted(REPOSITORIES["org/shards"])
    assert names(unet) == ["config.json", "diffusion_pytorch_model.bin"]
    unet = ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    assert names(pipeline) == ["scheduler/scheduler_config.json", *unet]
    stop(hub)
    # Between attempts.
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert [locate(source) for source in given] == found
    assert "LocalEntryNotFoundError" in refused("hf://org/other/deep/more.pt")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("hf://org/none", "RepositoryNotFoundError"),
        ("hf://org/gated/a.pt", "GatedRepoError"),
        ("hf://org/other@v9/a.pt", "RevisionNotFoundError"),
        ("hf://org/other/a.pt", "EntryNotFoundError"),
        ("hf://org/other", "name one of its files: hf://org/other/FILE"),
        ("hf://org", "write hf://organization/name"),
        ("hf://or g/--x/a.pt", "fetch it by hand"),
    ],
)
def test_what_the_hub_refuses(hub, source, reason):
    assert re.match(f"{re.escape(source)}: .*{re.escape(reason)}", refused(source))
