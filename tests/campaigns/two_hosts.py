"""Two hosts on one machine: network namespaces with addresses of their own, one link between them, torchrun on each.

    python tests/campaigns/two_hosts.py FOLDER

Needs root and iproute2; takes some minutes of two cores. Records of an evaluation over both hosts are those of one
process; when the link goes down in the middle, both hosts end; when it is up again, the same command
goes on, to the same records. Of a training likewise: the same weights.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent.parent
HOSTS = {"lp-a": "10.77.0.1", "lp-b": "10.77.0.2"}
TIMEOUT = ["--trainer.strategy=DDPStrategy", "--trainer.strategy.timeout=0:00:10"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
EVALUATION = [
    "eval.py",
    "--config=configs/eval/digits.yaml",
    "--attacks.pgd.steps=2",
    "--attacks.pgd.eot=1",
    "--runs=2",
    "--chunk=16",
    "--data.subset.n=40",
    "--data.batch_size=4",
    "--trainer.logger=false",
    "--trainer.accelerator=cpu",
]


def ip(*words):
    subprocess.run(["ip", *words], check=True)


@contextmanager
def hosts():
    """The namespaces and their link."""
    # Bound over /etc/hosts within the namespace.
    names = {name: Path("/etc/netns") / name for name in HOSTS}
    try:
        for name, place in names.items():
            ip("netns", "add", name)
            place.mkdir(parents=True)
            (place / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for n, a in HOSTS.items()))
        first, second = HOSTS
        ip("link", "add", "lp0", "netns", first, "type", "veth", "peer", "name", "lp0", "netns", second)
        for name, address in HOSTS.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "lp0")
            for device in ("lo", "lp0"):
                ip("-n", name, "link", "set", device, "up")
        yield
    finally:
        for name, place in names.items():
            subprocess.run(["ip", "netns", "del", name], check=False)
            shutil.rmtree(place, ignore_errors=True)


def start(argv, folder, label):
    """``argv`` under torchrun on both hosts, by the script that ships."""
    found = []
    for number, name in enumerate(HOSTS):
        place = {"HOST": f"{number}", "HEAD": "lp-a", "HOSTS": "2", "GPUS": "1", "GLOO_SOCKET_IFNAME": "lp0"}
        # A name of its own as well, as hosts have.
        command = ["ip", "netns", "exec", name, "unshare", "-u", "bash", "-c"]
        command += [f'hostname {name}; exec "$@"', "-", "configs/cluster/torchrun.sh", *argv]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, **ENVIRONMENT, **place, "PATH": path}
        with (folder / f"{label}.{name}.log").open("w") as log:
            found.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return found


def alone(argv):
    subprocess.run(
        [sys.executable, *argv], cwd=ROOT, env={**os.environ, **ENVIRONMENT}, check=True, capture_output=True
    )


def until(condition, processes):
    while not condition():
        assert all(process.poll() is None for process in processes), "ended before its time"
        time.sleep(0.2)


def cut(argv, folder, label, begun):
    """Takes the link down when ``begun()``; both hosts must end, and say whom they miss."""
    processes = start(argv, folder, label)
    until(begun, processes)
    ip("-n", "lp-b", "link", "set", "lp0", "down")
    down = time.monotonic()
    for process, name in zip(processes, HOSTS, strict=True):
        process.wait(timeout=600)
        print(f"{label}: torchrun on {name} ended {time.monotonic() - down:.0f} s after the link, {process.returncode}")
    for name in HOSTS:
        said = (folder / f"{label}.{name}.log").read_text()
        assert "another process of this run ended, or did not answer in time" in said, said[-3000:]
    ip("-n", "lp-b", "link", "set", "lp0", "up")


def records(run):
    lines = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    return sorted((r["index"], r["defense"], r["attack"], r["clean"], r["adversarial"], r["l2"]) for r in lines)


def evaluation(folder):
    alone([*EVALUATION, f"--run={folder / 'alone'}"])
    argv = [*EVALUATION, *TIMEOUT, "--run"]
    for process in start([*argv, str(folder / "whole")], folder, "whole"):
        assert process.wait(timeout=600) == 0
    assert records(folder / "whole") == records(folder / "alone")
    run = folder / "cut"
    cut([*argv, str(run)], folder, "cut", lambda: len([p for p in run.glob("records*") if p.stat().st_size]) == 2)
    for process in start([*argv, str(run)], folder, "again"):
        assert process.wait(timeout=600) == 0
    said = "".join((folder / f"again.{name}.log").read_text() for name in HOSTS)
    print("evaluation:", next(line for line in said.splitlines() if "goes on after" in line))
    assert records(run) == records(folder / "alone")
    print(f"evaluation: {len(records(run))} records, equal to those of one process")


def training_config(folder):
    """A short training that saves every fifth step."""
    settings = yaml.safe_load((ROOT / "configs/train/digits_denoiser.yaml").read_text())
    settings["data"]["batch_size"] = 16
    keeps = {"save_last": True, "every_n_train_steps": 5}
    settings["trainer"]["callbacks"] = [{"class_path": "ModelCheckpoint", **keeps}]
    settings["trainer"] |= {"logger": False, "accelerator": "cpu", "max_epochs": 3, "enable_progress_bar": False}
    path = folder / "training.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def training(folder):
    argv = ["train.py", "fit", f"--config={training_config(folder)}"]
    alone([*argv, f"--run={folder / 'trained'}", "--data.batch_size=32"])
    argv += [*TIMEOUT, "--ckpt_path=last", "--run"]
    run = folder / "trained_cut"
    cut([*argv, str(run)], folder, "training", (run / "checkpoints" / "last.ckpt").exists)
    for process in start([*argv, str(run)], folder, "training_again"):
        assert process.wait(timeout=600) == 0
    one, other = (load_file(each / "model.safetensors") for each in (folder / "trained", run))
    apart = max(float((one[name] - other[name]).abs().max()) for name in one)
    print(f"training: cut and resumed on two hosts, weights differ from those of one process by {apart:.1e} at most")
    assert apart < 1e-4
    assert all(torch.isfinite(value).all() for value in other.values())


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.mkdir(parents=True)
    with hosts():
        evaluation(place)
        training(place)
