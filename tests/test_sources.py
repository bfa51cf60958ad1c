"""Weights from a local path, from the web and from the Hugging Face hub; every server is on loopback."""

import contextlib
import errno
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from lit_purify.errors import InputError
from lit_purify.models import sources
from lit_purify.models.sources import cache_folder, locate

ROOT = Path(__file__).parent.parent
CONTENT = bytes(range(256)) * 4000
PROCESS = """
import json, sys, time, types
time.sleep = lambda seconds: None  # between attempts at the hub
package = types.ModuleType("lit_purify.models")  # without torch, which takes seconds to import
package.__path__ = ["lit_purify/models"]
sys.modules[package.__name__] = package
from lit_purify.errors import InputError
from lit_purify.models.sources import locate
for source in sys.argv[1:]:
    try:
        print(json.dumps(["found", str(locate(source))]), flush=True)
    except InputError as error:
        print(json.dumps(["refused", str(error)]), flush=True)
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_PURIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_PAUSE", 0.01)
    return tmp_path / "cache"


@pytest.fixture
def serve():
    """Starts servers; ``answer`` is a function of the handler."""
    running = []

    def start(answer):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                with contextlib.suppress(ConnectionError):  # The client may have been killed.
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
    """One file on the web; ``plan`` says what goes wrong in each request, ``log`` what each was."""
    site = SimpleNamespace(content=CONTENT, plan=[], log=[])

    def answer(request):
        if request.path.startswith("/moved/"):
            request.send_response(302)
            request.send_header("Location", request.path.removeprefix("/moved"))
            request.end_headers()
            return
        plan = site.plan.pop(0) if site.plan else {}
        asked = request.headers["Range"]
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and plan.get("ranges", True) else 0
        record = SimpleNamespace(path=request.path, range=asked, sent=0)
        site.log.append(record)
        time.sleep(plan.get("wait", 0))
        if "status" in plan or start >= len(site.content):
            request.send_error(plan.get("status", 416))
            return
        rest = site.content[start:]
        request.send_response(206 if start else 200)
        if start:
            shown = start + plan.get("shift", 0)
            request.send_header("Content-Range", f"bytes {shown}-{len(site.content) - 1}/{len(site.content)}")
        if plan.get("length", True):
            request.send_header("Content-Length", str(len(rest)))
        request.end_headers()
        rest = rest[: plan.get("cut", len(rest))]
        for at in range(0, len(rest), 64000):
            request.wfile.write(rest[at : at + 64000])
            record.sent += len(rest[at : at + 64000])
            if "hold" in plan:
                plan.pop("hold").wait(10)

    site.server, site.url = serve(answer)
    return site


def stop(server):
    server.shutdown()
    server.server_close()


def address(site, name="weights.pt", content=None):
    return f"{site.url}/{name}#sha256={digest(content or site.content)}"


def digest(content):
    return hashlib.sha256(content).hexdigest()


def refused(source):
    with pytest.raises(InputError) as caught:
        locate(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@contextlib.contextmanager
def process(*given, **environment):
    command = [sys.executable, "-c", PROCESS, *given]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=pipe, stderr=pipe, text=True) as run:
        try:
            yield run
        finally:
            run.kill()


def answers(*given, **environment):
    with process(*given, **environment) as run:
        out, err = run.communicate(timeout=60)
    assert run.returncode == 0, err
    return [json.loads(line) for line in out.splitlines()]


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    "path", ["a/weights.pt", "C:/weights.pt", "C:\\weights.pt", "a#sha256=1.pt", "hf/a.pt", "https.pt", "http:a"]
)
def test_a_local_path_is_itself(path):
    assert locate(path) == locate(Path(path)) == Path(path)


def test_a_download_is_kept(site, cache, capsys):
    path = locate(address(site))
    assert path.read_bytes() == CONTENT
    assert path.name == "weights.pt"
    assert path.is_relative_to(cache)
    assert "Downloading" in (said := capsys.readouterr().err)
    assert "(1.0 MB)" in said
    stop(site.server)
    (path.parent / ".lock").unlink()
    assert locate(address(site)) == path
    assert locate(address(site).replace(digest(CONTENT), digest(CONTENT).upper())) == path
    # What a configuration makes of an address where it expects a path.
    assert locate(Path(address(site))) == path
    assert len(site.log) == 1
    # Nothing was written for it: others may share a cache that they can only read.
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("a/b/net.safetensors?download=1&x=/y", "net.safetensors"),
        ("..", "weights"),
        ("", "weights"),
        ("a%2F..%2F.partial", "a_.._.partial"),
        (".lock", "lock"),
        ("für%2032 x.pt", "für_32_x.pt"),
    ],
)
def test_names_of_downloads(site, cache, name, kept):
    path = locate(address(site, name))
    assert path == cache / digest(CONTENT) / kept
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["weights.pt", "moved/weights.pt"])
def test_a_cut_download_goes_on(site, cache, name):
    site.plan = [{"cut": 300_000}, {"cut": 200_000}]
    assert locate(address(site, name)).read_bytes() == CONTENT
    assert [entry.range for entry in site.log] == [None, "bytes=300000-", "bytes=500000-"]
    assert [entry.sent for entry in site.log] == [300_000, 200_000, len(CONTENT) - 500_000]


@pytest.mark.parametrize("odd", [{"ranges": False}, {"shift": 5}, {"status": 416}])
def test_servers_that_do_not_go_on(site, cache, odd):
    site.plan = [{"cut": 300_000}, odd]
    if "status" in odd:
        (cache / digest(CONTENT)).mkdir(parents=True)
        (cache / digest(CONTENT) / ".partial").write_bytes(b"old")
        site.plan = [odd]
    assert locate(address(site)).read_bytes() == CONTENT
    assert site.log[-1].sent == len(CONTENT)


def test_no_length_and_a_silent_server(site, cache, monkeypatch):
    monkeypatch.setattr(sources, "_TIMEOUT", 0.2)
    site.plan = [{"length": False}, {"wait": 0.5}]
    assert locate(address(site)).read_bytes() == CONTENT
    site.content = CONTENT[:-1]
    assert "no answer within" in refused(address(site))


def test_cuts_without_end(site, cache):
    site.plan = [{"cut": 300_000}] + [{"cut": 0}] * 20
    message = refused(address(site))
    assert "cut after 300000 of 1024000 bytes" in message
    assert site.url in message
    assert "local path" in message
    assert len(site.log) == 1 + sources._RETRIES + 1
    site.plan = []
    assert locate(address(site)).read_bytes() == CONTENT
    assert site.log[-1].sent == len(CONTENT) - 300_000


def test_a_server_that_goes_away(site, cache):
    site.plan = [{"cut": 300_000}, {"status": 503}]
    assert "the server answered 503" in refused(address(site))
    stop(site.server)
    assert "refused" in refused(address(site)).lower()
    assert (cache / digest(CONTENT) / ".partial").stat().st_size == 300_000


def test_another_content(site, cache):
    message = refused(address(site, content=b"other"))
    assert digest(CONTENT) in message
    assert digest(b"other") in message
    assert "HTML" not in message
    site.content = b"\n<!DOCTYPE html><title>Virus scan warning</title>"
    assert "HTML page" in refused(address(site, content=CONTENT))
    assert not [path for path in cache.rglob("*") if path.is_file() and path.name != ".lock"]


def test_a_part_of_another_content_is_given_up(site, cache):
    site.plan = [{"cut": 300_000}, {"status": 500}]
    site.content = CONTENT[::-1]
    wanted = address(site, content=CONTENT)
    assert "500" in refused(wanted)
    site.content = CONTENT
    assert locate(wanted).read_bytes() == CONTENT
    assert [entry.range for entry in site.log[-2:]] == ["bytes=300000-", None]


@pytest.mark.parametrize("status", [404, 500])
def test_the_answer_of_the_server(site, cache, status):
    site.plan = [{"status": status}]
    message = refused(address(site))
    assert f"the server answered {status}" in message
    assert f"{site.url}/weights.pt" in message
    assert "local path" in message
    assert len(site.log) == 1


def test_no_network(cache, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    message = refused(f"http://127.0.0.1:{port}/a.pt#sha256={'0' * 64}")
    assert "refused" in message
    assert "is there a network?" in message

    def unknown(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "the name of the host cannot be resolved" in refused(f"https://host.invalid/a.pt#sha256={'0' * 64}")


@pytest.mark.parametrize("url", ["https:///a.pt", "http://host:x/a.pt", "http://[1/a.pt"])
def test_what_is_no_address(cache, url):
    assert "cannot be downloaded" in refused(f"{url}#sha256={'0' * 64}")


@pytest.mark.parametrize("end", ["", "#", "#sha256=12", f"#md5={'0' * 32}", f"#sha256={'g' * 64}"])
def test_no_hash(cache, end):
    message = refused(f"https://host/a.pt{end}")
    assert "https://host/a.pt#sha256=<64 hexadecimal digits>" in message
    assert "sha256sum" in message
    assert not cache.exists()


def test_killed_and_resumed(site, cache):
    site.plan = [{"hold": threading.Event()}]
    partial = cache / digest(CONTENT) / ".partial"
    with process(address(site)) as run:
        wait_for(lambda: partial.exists() and partial.stat().st_size > 50_000)
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    have = partial.stat().st_size
    assert have <= 64_000
    path = locate(address(site))
    assert path.read_bytes() == CONTENT
    assert site.log[1].range == f"bytes={have}-"
    assert site.log[1].sent == len(CONTENT) - have


def test_two_at_once_download_once(site, cache):
    hold = threading.Event()
    site.plan = [{"hold": hold}]
    with process(address(site)) as first:
        assert first.stderr.readline().startswith("Downloading")
        with process(address(site)) as second:
            assert second.stderr.readline().startswith("Waiting for another process")
            hold.set()
            found = [json.loads(run.communicate(timeout=60)[0]) for run in (first, second)]
    assert found[0] == found[1]
    assert Path(found[0][1]).read_bytes() == CONTENT
    assert [entry.sent for entry in site.log] == [len(CONTENT)]


def test_a_full_disk(site, cache, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        message = refused(address(site))
    assert "No space left" in message
    assert "LIT_PURIFY_CACHE" in message
    assert not list(cache.rglob("weights.pt"))
    # All is there: the server has no more (416), and the hash says so.
    assert locate(address(site)).read_bytes() == CONTENT
    assert [entry.sent for entry in site.log] == [len(CONTENT), 0]


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("LIT_PURIFY_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.setenv("LIT_PURIFY_CACHE", "")
    assert cache_folder() == tmp_path / "shared" / "lit_purify"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "lit_purify"


def test_no_place_for_the_cache(site, cache):
    cache.write_text("a file")
    message = refused(address(site))
    assert str(cache) in message
    assert "LIT_PURIFY_CACHE" in message
    assert site.log == []


COMMITS = {"main": "a" * 40, "v1": "b" * 40, "refs/pr/2": "c" * 40}
UNET = {
    "config.json": b"{}",
    "diffusion_pytorch_model.bin": b"bin",
    "scheduler_config.json": b"{}",
    "README.md": b"text",
}
PIPELINE = {
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.bin": b"bin",
    "unet/diffusion_pytorch_model.safetensors": b"safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors": b"half",
    "scheduler/scheduler_config.json": b"{}",
    "vae/diffusion_pytorch_model.safetensors": b"vae",
}
REPOSITORIES = {"org/unet": UNET, "org/pipeline": PIPELINE, "org/other": {"deep/net.safetensors": b"deep"}}


@pytest.fixture
def hub(serve, tmp_path):
    """What ``huggingface_hub`` asks the hub for; revisions differ in the last byte of a file."""
    hub = SimpleNamespace(log=[])

    def send(request, body, status=200, **headers):
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)

    def answer(request):
        path, _, _ = request.path.partition("?")
        hub.log.append(f"{request.command} {path}")
        words = path.removeprefix("/api/models").split("/")
        repository, action, rest = "/".join(words[1:3]), "".join(words[3:4]), "/".join(words[4:])
        revision, _, file = rest.partition("/")
        commit = {**COMMITS, **{commit: commit for commit in COMMITS.values()}}.get(
            revision.replace("%2F", "/") or "main"
        )
        if repository == "org/broken":
            send(request, b"", 500)
        elif repository == "org/gated":
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

    hub.server, hub.url = serve(answer)
    hub.environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    hub.environment |= {"HF_TOKEN": "", "HF_HUB_OFFLINE": "0"}
    return hub


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def test_the_hub_gives_files_and_folders(hub):
    given = ["hf://org/other/deep/net.safetensors", "hf:/org/other@v1/deep/net.safetensors"]
    given += ["hf://org/other@refs%2Fpr%2F2/deep/net.safetensors", "hf://org/unet", "hf://org/pipeline@v1/"]
    found = answers(*given, **hub.environment)
    assert [kind for kind, _ in found] == ["found"] * 5, found
    main, tagged, pulled, unet, pipeline = (Path(path) for _, path in found)
    assert (main.read_bytes(), tagged.read_bytes(), pulled.read_bytes()) == (b"deepa", b"deepb", b"deepc")
    assert main.name == "net.safetensors"
    # What a UNet needs, and its weights in one form.
    assert names(unet) == ["config.json", "diffusion_pytorch_model.bin", "scheduler_config.json"]
    assert names(pipeline) == [
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    # What has been fetched needs no network, and what has not says so.
    missing = ["hf://org/other/deep/more.pt", "hf://org/none"]
    offline = answers(*given, *missing, **hub.environment | {"HF_HUB_OFFLINE": "1"})
    assert offline[:5] == found
    assert all("HF_HUB_OFFLINE is set" in text and "local path" in text for _, text in offline[5:])
    stop(hub.server)
    gone = answers(*given, *missing, **hub.environment)
    assert gone[:5] == found
    assert all("the hub cannot be reached" in text and "local path" in text for _, text in gone[5:])
    assert all(kind == "refused" and "\n" not in text for kind, text in offline[5:] + gone[5:])


def test_what_the_hub_refuses(hub):
    expected = {
        "hf://org/none": "no such repository",
        "hf://org/none/a.pt": "no such repository",
        "hf://org/gated": "is gated: accept its terms",
        "hf://org/gated/a.pt": "is gated: accept its terms",
        "hf://org/broken": "the hub answered",
        "hf://org/broken/a.pt": "the hub answered",
        "hf://org/other@v9/a.pt": "no revision v9",
        "hf://org/other@v9": "no revision v9",
        "hf://org/other/a.pt": "no file a.pt",
        "hf://org/other": "name a file of it: hf://org/other/FILE",
        "hf://org": "write hf://organization/name",
        "hf://or g/--x/a.pt": "cannot be fetched",
    }
    for (source, reason), (kind, text) in zip(expected.items(), answers(*expected, **hub.environment), strict=True):
        assert kind == "refused"
        assert text.startswith(f"{source}: ")
        assert reason in text
        assert "\n" not in text


def test_the_hub_is_imported_late():
    run = subprocess.run(
        [sys.executable, "-c", PROCESS + "\nassert 'huggingface_hub' not in sys.modules", "a.pt"], cwd=ROOT
    )
    assert run.returncode == 0
