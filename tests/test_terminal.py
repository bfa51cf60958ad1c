"""What people see: the page of --help, progress in a terminal and in a log, a dry run that leaves nothing."""

import inspect
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lit_purify.callbacks import Progress, progress
from lit_purify.checks.audit import AuditingTrainer
from lit_purify.cli import evaluate, train
from lit_purify.cli.help import EVALUATE, TRAIN

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["purify", "--help"], ["test", "--help", "--run", "x"]])
@pytest.mark.parametrize(("run", "page"), [(evaluate, EVALUATE), (train, TRAIN)])
def test_help_fits_a_screen(run, page, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(words)
    assert not exit_.value.code
    assert capsys.readouterr().out == page
    assert len(page.splitlines()) <= 50
    assert max(map(len, page.splitlines())) <= 120


def test_help_states_the_defaults_of_the_audit():
    for command, words in ((AuditingTrainer.gradcheck, ["gradcheck: {samples}"]), (AuditingTrainer.audit, _AUDIT)):
        defaults = {name: each.default for name, each in inspect.signature(command).parameters.items()}
        assert all(word.format(**defaults) in EVALUATE for word in words)


_AUDIT = ["audit: {samples})", "runs of each image ({runs})", "black-box attack ({proposals})"]


def test_help_all_has_every_setting(capsys):
    with pytest.raises(SystemExit):
        evaluate(["purify", "--help_all"])
    text = capsys.readouterr().out
    assert {"--trainer.devices", "--existing", "--model.help"} <= set(re.findall(r"--[\w.]+", text))
    assert len(text.splitlines()) > 200


VALUES = {
    "N": "3",
    "FOLDER": "x",
    "FILE": "y",
    "skip": "skip",
    "false": "false",
    "NAME": "uniform",
    "bf16-mixed": "bf16-mixed",
}


def flags(page, name):
    """The settings that a page shows, each with a value, and NAME in a key replaced."""
    shown = re.findall(r"^  (--[\w.]+)(?: (\S+))?(?: (--\w+) (\S+))?", page, re.MULTILINE)
    found = [pair for a, b, c, d in shown for pair in ((a, b), (c, d)) if pair[0]]
    assert len(found) > 9
    return {flag.replace("NAME", name): VALUES[value] for flag, value in found if flag != "--config" and value}


def test_settings_of_the_pages_exist(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    own = {"--input", "--output", "--defense", "--existing", "--overlays"}
    audit = {"--samples", "--runs", "--proposals"}
    shown = flags(EVALUATE, "uniform")
    attack = {f.replace("attacks.uniform", "attacks.pgd"): v for f, v in shown.items() if f not in own | audit}
    shown_training = flags(TRAIN, "")
    # Of another command, or of other data.
    for key in ("--data.init_args.root", "--output", "--ckpt_path"):
        assert shown_training.pop(key)
    for run, words, given in (
        (evaluate, ["test"], attack),
        (evaluate, ["predict"], {f: v for f, v in shown.items() if f in own}),
        (evaluate, ["audit"], {f: shown[f] for f in audit}),
        (train, ["fit", "--config", "configs/train/digits_denoiser.yaml"], shown_training),
    ):
        with pytest.raises(SystemExit) as exit_:
            run([*words, *(word for pair in given.items() for word in pair), "--print_config"])
        assert not exit_.value.code, capsys.readouterr().err


class Stopwatch:
    now = 0.0

    def __call__(self):
        return self.now


class Log:
    """Standard error."""

    def __init__(self, terminal):
        self.text, self.isatty = "", lambda: terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def evaluation(samples, done=0):
    """Two defenses, of which the second takes nine times as long, as the task describes them."""
    from lit_purify.evaluation import RobustnessTask

    task = RobustnessTask.__new__(RobustnessTask)
    torch.nn.Module.__init__(task)
    described = [
        {"defense": d, "attack": "pgd", "queries": {"forward": 10, "backward": 10}, "nfe_attack": n, "nfe_defense": n}
        | {"evaluations": 2}
        for d, n in (("none", 0), ("purify", 8))
    ]
    task.runs, task._done = 0, set(range(done))
    task.describe, task.running = lambda: described, lambda defense, attack: 0.625
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data = SimpleNamespace(evaluated=range(samples))
    return task, SimpleNamespace(is_global_zero=True, world_size=1, strategy=strategy, datamodule=data)


def run(monkeypatch, terminal, samples, batch, seconds, done=0):
    """Evaluates batches that take a part of ``seconds`` each under the first defense, the others under the second."""
    clock, log = Stopwatch(), Log(terminal)
    monkeypatch.setattr(progress, "monotonic", clock)
    monkeypatch.setattr(sys, "stderr", log)
    task, trainer = evaluation(samples, done)
    shown = Progress()
    shown.on_test_batch_start(trainer, task, None, 0)
    for _ in range(done // 2, samples, batch):
        for defense, share in (("none", 0.1), ("purify", 0.9)):
            clock.now += share * seconds
            shown.on_evaluated(trainer, task, [SimpleNamespace(defense=defense, attack="pgd")] * batch, [])
    shown.on_test_end(trainer, task)
    return log.text


def test_a_log_gets_a_line_a_tenth(monkeypatch):
    lines = run(monkeypatch, terminal=False, samples=100, batch=5, seconds=20.0).splitlines()
    assert [line.split(" %")[0] for line in lines] == [str(k) for k in range(10, 101, 10)]
    # 10 of 200 records: 2 of the 20 batches of 20 seconds.
    assert lines[0].startswith(
        "10 %: 20 of 200 samples x defenses, purify under pgd: 62.5 % robust, 6 min 0 s left, peak"
    )
    assert " 0 s left, peak memory" in lines[-1]


def test_a_log_of_a_long_run_gets_a_line_each_ten_minutes(monkeypatch):
    lines = run(monkeypatch, terminal=False, samples=100, batch=1, seconds=700.0).splitlines()
    assert len(lines) == 100


def test_a_short_run_says_nothing(monkeypatch):
    assert run(monkeypatch, terminal=False, samples=100, batch=10, seconds=0.9) == ""


def test_time_left_leaves_out_what_was_there(monkeypatch):
    lines = run(monkeypatch, terminal=False, samples=100, batch=10, seconds=60.0, done=100).splitlines()
    assert lines[0].startswith("60 %: 120 of 200")
    assert "4 min 0 s left" in lines[0]


def test_a_terminal_gets_a_bar(monkeypatch):
    text = run(monkeypatch, terminal=True, samples=20, batch=5, seconds=60.0)
    assert "attacking |" in text
    assert "20/40 samples x defenses, purify under pgd: 62.5 % robust, 2 min 0 s left, peak memory" in text
    assert "%:" not in text


def test_a_dry_run_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    path, n = "--model.init_args.attacks.pgd.init_args", "--data.init_args.subset.init_args.n"
    command = ["--run", str(tmp_path / "run"), "--trainer.logger", "false", "--model.init_args.chunk", "16"]
    command += ["--model.init_args.runs", "2", f"{path}.steps", "1", f"{path}.eot", "1", n, "5"]
    evaluate(["--dry_run", *command])
    said = capsys.readouterr().out
    assert "20 records, 0 of them there already" in said
    assert re.search(r"heterogeneous +pgd +30 +6 ", said)
    assert "Expected: " in said
    assert "Nothing was written." in said
    assert max(map(len, said.splitlines())) <= 100
    assert not list(tmp_path.iterdir())
    for refused in (["audit", "--dry_run"], ["purify", "--dry_run"]):
        with pytest.raises(SystemExit):
            evaluate(refused)
        assert "--dry_run goes with test and frontier" in capsys.readouterr().err
