"""The script for SLURM, really run, with an ``srun`` and an ``scontrol`` that do what SLURM's would.

    python tests/campaigns/slurm.py FOLDER

Takes some minutes of two cores. Two nodes with a task each; the signal before the time is over, a task that is killed,
wrong settings, an array. What goes on ends with the records, and the weights, of a run in one process.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml
from safetensors.torch import load_file
from two_hosts import ENVIRONMENT, EVALUATION, ROOT, alone, records, training_config

SRUN = """
import os, signal, subprocess, sys, time
argv = [word for word in sys.argv[1:] if not word.startswith("--kill-on-bad-exit")]
nodes, each = (int(os.environ[name]) for name in ("SLURM_NNODES", "SLURM_NTASKS_PER_NODE"))
tasks = []
for rank in range(nodes * each):
    place = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank % each, "SLURM_NODEID": rank // each}
    place |= {"SLURM_NTASKS": nodes * each, "SLURM_NODELIST": "127.0.0.1"}
    environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
    tasks.append(subprocess.Popen(argv, env=environment, start_new_session=True))
def tell(signum):
    for task in tasks:
        if task.poll() is None:
            os.killpg(task.pid, signum)
open(os.environ["TASKS"], "w").write(" ".join(str(task.pid) for task in tasks))
for signum in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(signum, lambda signum, _: tell(signum))
ending = None
while any(task.poll() is None for task in tasks):
    time.sleep(0.1)
    if ending is None and any(task.poll() for task in tasks):
        ending = time.monotonic()
        tell(signal.SIGTERM)
    if ending is not None and time.monotonic() > ending + 30:
        tell(signal.SIGKILL)
sys.exit(max(128 - task.returncode if task.returncode < 0 else task.returncode for task in tasks))
"""


def commands(folder):
    """What a node of a cluster has in its path."""
    place = folder / "bin"
    place.mkdir()
    for name, text in (
        ("srun", f"#!{sys.executable}\n{SRUN}"),
        ("scontrol", f'#!/bin/bash\necho "$@" >> {folder}/scontrol\n'),
    ):
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    return place


def submit(argv, folder, label, nodes=2, restarts=0, **more):
    """The script as ``sbatch`` would start it."""
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "slurm.sh", "SLURM_NNODES": nodes, "SLURM_NTASKS_PER_NODE": 1}
    job |= {"SLURM_RESTART_COUNT": restarts, "TASKS": folder / "tasks", **more}
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, **ENVIRONMENT, "PATH": path, **{name: str(value) for name, value in job.items()}}
    (folder / "tasks").unlink(missing_ok=True)
    (folder / "scontrol").write_text("")
    # A group of its own: a scheduler's signal reaches srun through it.
    with (folder / f"{label}.log").open("w") as log:
        return subprocess.Popen(
            ["bash", "configs/cluster/slurm.sh", *argv],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def until(condition, job):
    while not condition():
        assert job.poll() is None, "ended before its time"
        time.sleep(0.1)


def begun(run):
    return lambda: len([path for path in run.glob("records*") if path.stat().st_size]) >= 2


def ended(job, folder, label, statuses, requeued):
    status = job.wait(timeout=600)
    assert status in statuses, (status, (folder / f"{label}.log").read_text()[-3000:])
    asked = (folder / "scontrol").read_text().split("\n")[0]
    assert asked == ("requeue 4711" if requeued else ""), asked
    print(f"{label}: exit status {status}{', requeued' if requeued else ''}")


def srun_of(job):
    (found,) = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    return int(found)


def evaluation(folder):
    alone([*EVALUATION, f"--run={folder / 'alone'}"])
    run = folder / "run"
    argv = [*EVALUATION, f"--run={run}"]
    job = submit(argv, folder, "time over")
    until(begun(run), job)
    os.kill(srun_of(job), signal.SIGUSR1)
    # The first task to end brings the others a SIGTERM, amid their own ending or start.
    ended(job, folder, "time over", (75, 143), requeued=True)
    job = submit(argv, folder, "killed", restarts=1)
    until((folder / "tasks").exists, job)
    until(lambda: "goes on after" in (folder / "killed.log").read_text(), job)
    os.killpg(int((folder / "tasks").read_text().split()[1]), signal.SIGKILL)
    ended(job, folder, "killed", (137,), requeued=True)
    job = submit(argv, folder, "third", restarts=2)
    ended(job, folder, "third", (0,), requeued=False)
    assert records(run) == records(folder / "alone")
    print(f"evaluation: {len(records(run))} records, equal to those of one process")
    ended(submit([*argv, "--runs=0"], folder, "wrong"), folder, "wrong", (2, 143), requeued=False)
    flags = [f"--run={folder}/seed%a", "--seed", "%a", "--data.subset.n=4"]
    job = submit([*EVALUATION, *flags], folder, "array", nodes=1, SLURM_ARRAY_TASK_ID=3)
    ended(job, folder, "array", (0,), requeued=False)
    assert yaml.safe_load((folder / "seed3" / "config.yaml").read_text())["seed"] == 3


def training(folder):
    argv = ["train.py", "fit", f"--config={training_config(folder)}"]
    alone([*argv, f"--run={folder / 'trained'}", "--data.batch_size=32"])
    run = folder / "training"
    argv += [f"--run={run}", "--ckpt_path=last"]
    job = submit(argv, folder, "training")
    until((run / "config.yaml").exists, job)
    time.sleep(1)
    os.kill(srun_of(job), signal.SIGUSR1)
    ended(job, folder, "training", (75, 143), requeued=True)
    print(next(line for line in (folder / "training.log").read_text().splitlines() if "stopped after" in line))
    assert not list(run.glob("hpc_ckpt*"))
    ended(submit(argv, folder, "training again", restarts=1), folder, "training again", (0,), requeued=False)
    one, other = (load_file(each / "model.safetensors") for each in (folder / "trained", run))
    apart = max(float((one[name] - other[name]).abs().max()) for name in one)
    print(f"training: weights differ from those of one process by {apart:.1e} at most")
    assert apart < 1e-4


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.mkdir(parents=True)
    commands(place)
    evaluation(place)
    training(place)
