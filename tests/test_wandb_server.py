"""A real W&B client against a live server: what is read back from it, and what failing servers cost (nothing)."""

import http.server
import json
import os
import re
import select
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest
import wandb
from conftest import WEIGHTS, training_on_digits, written
from processes import Launch

from lit_purify.callbacks import Progress, WandbReport, WandbRun
from lit_purify.cli import evaluate, train
from lit_purify.evaluation import read_records

pytest.importorskip("openwandb")
# It takes any key, and a fourth of a second to check one that it knows.
KEY = 40 * "0"
MASK = {"class_path": "TopFraction", "fraction": 0.3}
VARIABLE = {"class_path": "VariableIntensityPurifier", "mask": MASK, "high": 200, "low": 100, "steps": 1}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A W&B-compatible server on loopback."""
    port, data = free_port(), tmp_path_factory.mktemp("server")
    command = [sys.executable, "-m", "openwandb", "serve", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "OPENWANDB_DATA_DIR": str(data)}
    with (data / "log").open("w") as log, subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{url}/login")
                break
            except OSError:
                assert process.poll() is None, (data / "log").read_text()
                assert time.monotonic() < end
                time.sleep(0.2)
        yield url
        process.terminate()


@pytest.fixture
def environment(server, monkeypatch):
    """W&B reads it when it is first used."""
    wandb.teardown()
    values = {"WANDB_BASE_URL": server, "WANDB_API_KEY": KEY, "WANDB_HTTP_TIMEOUT": "5"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    yield {**os.environ, **values, "OMP_NUM_THREADS": "1"}
    wandb.teardown()


def get(url):
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request) as answer:
        return answer.read()


class Stored:
    """What the server holds of a run."""

    def __init__(self, server, folder):
        identity = (folder / "wandb/run_id").read_text()
        self.files = f"{server}/files/default/lit_purify/{identity}"
        self.run = json.loads(get(f"{server}/api/v2/runs/{identity}"))["run"]
        self.config = {key: entry["value"] for key, entry in self.run["config"].items()}
        self.summary = self.run["summary"]
        self.history = [json.loads(line) for line in self.file("wandb-history.jsonl").splitlines()]

    def file(self, path):
        return get(f"{self.files}/{path}")

    def last(self, key):
        return [row[key] for row in self.history if key in row][-1]

    def table(self, key):
        found = json.loads(self.file(self.last(key)["path"]))
        return [dict(zip(found["columns"], row, strict=True)) for row in found["data"]]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    settings = {
        **WEIGHTS,
        "defenses": {"none": "NoPurifier", "variable": VARIABLE},
        "attacks": {"pgd": {"class_path": "PGD", "eps": 0.3, "steps": 1, "step_size": 0.3}},
        "runs": 2,
        "chunk": 16,
        "gallery": 3,
        "data": {"class_path": "Digits", "batch_size": 2, "subset": {"class_path": "First", "n": 5}},
        "trainer": {"accelerator": "cpu", "logger": {"class_path": "WandbRun", "mode": "online"}},
    }
    return written(tmp_path_factory.mktemp("config") / "tiny.yaml", settings)


def check_evaluation(stored, folder):
    """The server holds the figures of the summary, the samples and their pictures."""
    summary = json.loads((folder / "summary.json").read_text())
    for result in summary["results"]:
        pair = f"{result['defense']}/{result['attack']}"
        for rule in ("average", "worst", "majority"):
            assert stored.summary[f"robust/{pair}/{rule}"] == pytest.approx(result["robust"][rule][0])
            assert stored.summary[f"clean/{result['defense']}/{rule}"] == pytest.approx(result["clean"][rule][0])
        assert stored.summary[f"cost/{result['defense']}/nfe"] == result["nfe_defense"]
        assert stored.summary[f"cost/{pair}/images_per_second"] == pytest.approx(5 / result["seconds"])
    assert 0.1 < stored.summary["cost/peak_memory_gib"] < 100
    assert stored.config["subset_sha256"] == summary["subset_sha256"]
    assert len(stored.config["sha256"]) >= 2
    assert stored.config["defenses"]["variable"]["init_args"]["high"] == 200
    assert stored.config["nfe"] == {"none": 0, "variable": 1}
    points = {(row["defense"], row["clean"], row["robust"]) for row in stored.table("frontier_table")}
    assert points == {(r["defense"], r["clean"]["average"][0], r["robust"]["average"][0]) for r in summary["results"]}
    records = {record.key: record for record in read_records(folder / "records.jsonl")}
    rows = stored.table("samples")
    assert sorted((row["defense"], row["attack"], row["index"]) for row in rows) == [
        k for k in sorted(records) if k[2] < 3
    ]
    for row in rows:
        record = records[row["defense"], row["attack"], row["index"]]
        assert row["attacked"] == ", ".join(map(str, record.adversarial))
        assert row["linf"] == pytest.approx(record.linf)
    overlays = stored.last("masks")
    assert overlays["count"] == 3
    for overlay in overlays["all_masks"]:
        assert stored.file(overlay["strong_noise"]["path"]).startswith(b"\x89PNG")


def set_environment(values, rank):
    os.environ.update(values)


def test_evaluation_of_two_processes(server, environment, evaluation, tmp_path):
    """Rank zero alone makes the run, and shows samples of both processes."""
    folder = tmp_path / "run"
    argv = ["--config", str(evaluation), "--run", str(folder)]
    launched = Launch("evaluate", argv, tmp_path / "log", 2, spoil=partial(set_environment, environment))
    assert launched.wait() == [0, 0], launched.said
    assert "upload" not in launched.said
    (url,) = re.findall("W&B: (.*)", launched.said)
    stored = Stored(server, folder)
    assert url == f"{server}/default/lit_purify/runs/{stored.run['run_id']}"
    assert stored.run["state"] == "finished"
    check_evaluation(stored, folder)
    running = [row for row in stored.history if "running/robust/variable/pgd" in row]
    assert [row["running/samples"] for row in running] == sorted({row["running/samples"] for row in running})


def test_training(server, environment, tmp_path):
    folder, data = (
        tmp_path / "run",
        {"batch_size": 64, "val_subset": {"class_path": "RandomChoice", "n": 20, "seed": 1}},
    )
    model = {**WEIGHTS, "mask": MASK, "val_levels": [50, 200], "purifiers": {"variable": VARIABLE}}
    steps = {"max_steps": 4, "check_val_every_n_epoch": None, "val_check_interval": 2, "log_every_n_steps": 1}
    steps["logger"] = {"class_path": "WandbRun", "mode": "online"}
    settings = training_on_digits("DenoiserTask", model, data, {"Previews": {"samples": 3}}, **steps)
    train(["fit", "--config", str(written(tmp_path / "training.yaml", settings)), "--run", str(folder)])
    wandb.teardown()
    stored = Stored(server, folder)
    for keys, wanted in (
        (("train/loss", "cost/images_per_second", "cost/peak_memory_gib"), [0, 1, 2, 3]),
        (("val/mse_constant_t200", "previews"), [1, 3]),
    ):
        for key in keys:
            assert [row["trainer/global_step"] for row in stored.history if key in row] == wanted, key
    (picture,) = stored.last("previews")["filenames"]
    assert stored.file(picture) == (folder / "previews/step-000004.png").read_bytes()
    hashes = {"model.safetensors": sha256((folder / "model.safetensors").read_bytes()).hexdigest()}
    assert stored.config["exported_sha256"] == hashes
    assert stored.config["model"]["init_args"]["val_levels"] == [50, 200]


def given_commands(text, environment, folder):
    """Runs the commands that a run has printed."""
    # The client's process may still be writing.
    wandb.teardown()
    path = f"{Path(sys.executable).parent}:{environment['PATH']}"
    for command in re.findall(r"upload .* with: (.*)", text):
        subprocess.run(command, shell=True, env={**environment, "PATH": path}, cwd=folder, check=True, timeout=400)


def test_interrupted_offline_run_is_uploaded_as_one(server, environment, evaluation, tmp_path, monkeypatch, capsys):
    folder, seen = tmp_path / "run", []

    class Interrupted(Exception):
        """As Ctrl-C."""

    def stop(*args):
        seen.append(args)
        if len(seen) == 3:
            raise Interrupted

    flags = ["--config", str(evaluation), f"--run={folder}", "--trainer.logger.mode=offline"]
    with monkeypatch.context() as patched:
        patched.setattr(Progress, "on_evaluated", stop)
        with pytest.raises(Interrupted):
            evaluate(flags)
    capsys.readouterr()
    evaluate(flags)
    parts = list(folder.glob("wandb/offline-run-*"))
    assert len(parts) == 2
    # Of two parts begun in the same second, one has a number behind.
    assert {part.name.split("-")[3] for part in parts} == {(folder / "wandb/run_id").read_text()}
    given_commands(capsys.readouterr().out, environment, tmp_path)
    stored = Stored(server, folder)
    counted = [row["running/samples"] for row in stored.history if "running/samples" in row]
    assert counted == sorted(set(counted))
    assert counted[-1] == 10


def check_records(folder):
    assert len(read_records(folder / "records.jsonl")) == 10
    assert (folder / "report.html").exists()


def test_server_that_is_down(server, environment, evaluation, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    evaluate(["--config", str(evaluation), "--run", str(tmp_path / "run")])
    check_records(tmp_path / "run")
    said = capsys.readouterr()
    assert "connection refused; the run is logged offline" in said.err
    given_commands(said.out, environment, tmp_path)
    check_evaluation(Stored(server, tmp_path / "run"), tmp_path / "run")


class Refusing(http.server.BaseHTTPRequestHandler):
    """Knows no key."""

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_error(401)

    do_GET = do_PUT = do_POST

    def log_message(self, *args):
        pass


@pytest.fixture
def refusing():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def test_wrong_key(environment, refusing, evaluation, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{refusing.server_port}")
    evaluate(["--config", str(evaluation), "--run", str(tmp_path / "run")])
    check_records(tmp_path / "run")
    said = capsys.readouterr()
    assert re.search("W&B: http.* 401.*; the run is logged offline", said.err)
    assert "W&B: offline run, upload it with: WANDB_RESUME=allow wandb sync" in said.out


@pytest.mark.parametrize("key", ["short", ""])
def test_no_key(environment, tmp_path, monkeypatch, capsys, key):
    monkeypatch.setenv("WANDB_API_KEY", key)
    # Where a login may have left one.
    monkeypatch.setenv("HOME", str(tmp_path))
    logger = WandbRun(mode="online", save_dir=str(tmp_path / "run"))
    logger.log_metrics({"a": 1.0})
    logger.finalize("success")
    said = capsys.readouterr()
    assert re.search("W&B: http.*(invalid|configured).*; the run is logged offline", said.err)
    assert "W&B: offline run, upload it with: WANDB_RESUME=allow wandb sync" in said.out


def test_tables_that_cannot_be_logged_are_named_and_end_nothing(tmp_path, capsys):
    logger = WandbRun(save_dir=str(tmp_path / "run"))
    logger.log_media({"samples": object(), "cost/nfe": 1})
    logger.finalize("success")
    said = capsys.readouterr()
    assert re.search("W&B: samples not logged .*; the run's folder holds the same figures", said.err)
    assert "W&B: offline run, upload it with" in said.out


class Line:
    """A connection to a server that can be cut."""

    def __init__(self, server):
        self.target = ("127.0.0.1", int(server.rpartition(":")[2]))
        self.entry = socket.create_server(("127.0.0.1", 0))
        self.up = True
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                near = self.entry.accept()[0]
            except OSError:
                return
            threading.Thread(
                target=self.forward, args=(near, socket.create_connection(self.target)), daemon=True
            ).start()

    def forward(self, near, far):
        with near, far:
            while self.up:
                for ready in select.select([near, far], [], [], 0.1)[0]:
                    if not (data := ready.recv(65536)):
                        return
                    (far if ready is near else near).sendall(data)

    def cut(self):
        self.up = False
        self.entry.shutdown(socket.SHUT_RDWR)
        self.entry.close()


@pytest.mark.slow
def test_connection_lost_in_the_middle(server, environment, evaluation, tmp_path, monkeypatch, capsys):
    line, folder = Line(server), tmp_path / "run"
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{line.entry.getsockname()[1]}")
    show = WandbReport.on_evaluated

    def cut(*args):
        if line.up:
            line.cut()
        show(*args)

    monkeypatch.setattr(WandbReport, "on_evaluated", cut)
    evaluate(["--config", str(evaluation), f"--run={folder}", "--trainer.logger.patience=2"])
    check_records(folder)
    said = capsys.readouterr()
    assert "not logged" in said.err
    assert "W&B: the uploads were not done 2 s after the end; upload what is missing with: wandb sync" in said.err
    given_commands(said.err, environment, tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    for result in summary["results"]:
        name = f"robust/{result['defense']}/{result['attack']}/average"
        assert Stored(server, folder).summary[name] == pytest.approx(result["robust"]["average"][0])
