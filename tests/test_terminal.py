"""What people see: the page of --help, progress in a terminal and in a log, a dry run; of several processes once."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import Launch, tiny

from lit_purify.attacks import PGD
from lit_purify.callbacks import Progress, progress
from lit_purify.cli import evaluate, train
from lit_purify.defense import NoPurifier, UniformPurifier
from lit_purify.evaluation import Evaluator, RobustnessTask

ROOT = Path(__file__).parent.parent
EVALUATE, TRAIN = ((ROOT / f"lit_purify/cli/{name}.txt").read_text() for name in ("eval", "train"))


@pytest.mark.parametrize("words", [["--help"], ["purify", "--help"], ["test", "-h", "--run", "x"]])
@pytest.mark.parametrize(("run", "page"), [(evaluate, EVALUATE), (train, TRAIN)])
def test_help_fits_a_screen(run, page, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(words)
    assert not exit_.value.code
    assert capsys.readouterr().out == page
    assert len(page.splitlines()) <= 50
    assert max(map(len, page.splitlines())) <= 120


def test_help_all_has_every_setting(capsys):
    with pytest.raises(SystemExit):
        evaluate(["purify", "--help_all"])
    text = capsys.readouterr().out
    assert {"--trainer.devices", "--overlays", "--classifier.help"} <= set(re.findall(r"--[\w.]+", text))


VALUES = {"N": "3", "FOLDER": "x", "FILE": "y", "skip": "skip", "false": "false", "null": "null", "NAME": "uniform"}
VALUES |= {"bf16-mixed": "bf16-mixed", "bf16": "bf16"}


def flags(page):
    """The settings that a page shows, each with a value."""
    shown = re.findall(r"^  (--[\w.]+)(?: (\S+))?(?: (--\w+) (\S+))?", page, re.MULTILINE)
    found = [pair for a, b, c, d in shown for pair in ((a, b), (c, d)) if pair[0]]
    assert len(found) > 9
    kinds = {"attacks.NAME": "attacks.pgd", "defenses.NAME": "defenses.uniform"}
    named = {re.sub("|".join(kinds), lambda m: kinds[m[0]], flag): value for flag, value in found}
    return {flag: VALUES[value] for flag, value in named.items() if flag != "--config" and value}


def test_settings_of_the_pages_exist(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    own = {"--input", "--output", "--defense", "--overlays"}
    audit = {"--samples", "--audit_runs", "--proposals"}
    shown, training = flags(EVALUATE), flags(TRAIN)
    assert own | audit <= set(shown)
    # Of data that is not the digits.
    del training["--data.root"]
    for run, words, given in (
        (evaluate, ["test"], {f: v for f, v in shown.items() if f not in own | audit}),
        (evaluate, ["predict", "--config", "configs/eval/digits.yaml"], {f: shown[f] for f in own}),
        (evaluate, ["audit"], {f: shown[f] for f in audit}),
        (train, ["fit", "--config", "configs/train/digits_denoiser.yaml"], training),
    ):
        with pytest.raises(SystemExit) as exit_:
            run([*words, *(word for pair in given.items() for word in pair), "--print_config"])
        assert not exit_.value.code, capsys.readouterr().err


class Log:
    """Standard error."""

    def __init__(self, terminal):
        self.text, self.isatty = "", lambda: terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.fixture
def shown(monkeypatch, classifier, unet):
    """What is shown of an evaluation of samples in batches that take so many seconds each."""

    def call(terminal, samples, batch, seconds, done=0):
        clock, log = SimpleNamespace(now=0.0), Log(terminal)
        monkeypatch.setattr(progress, "monotonic", lambda: clock.now)
        monkeypatch.setattr(sys, "stderr", log)
        # Of the second defense a sample costs about ten times as much.
        defenses = {"none": NoPurifier(), "purify": UniformPurifier(unet, 100, 9)}
        task = RobustnessTask(Evaluator(classifier, defenses, {"pgd": PGD(steps=3)}, runs=1))
        task.ledger.done = {(name, "pgd", k) for name in defenses for k in range(done)}
        strategy, data = SimpleNamespace(root_device=torch.device("cpu")), SimpleNamespace(evaluated=range(samples))
        trainer = SimpleNamespace(is_global_zero=True, world_size=1, strategy=strategy, datamodule=data)
        callback = Progress()
        callback.on_test_batch_start(trainer, task, None, 0)
        for _ in range(done, samples, batch):
            for defense, share in (("none", 0.1), ("purify", 0.9)):
                clock.now += share * seconds
                callback.on_evaluated(trainer, task, [SimpleNamespace(defense=defense, attack="pgd")] * batch, [])
        callback.teardown(trainer, task, "test")
        return log.text

    return call


def test_a_log_gets_a_line_a_tenth(shown):
    lines = shown(terminal=False, samples=100, batch=5, seconds=20.0).splitlines()
    assert [line.split(" %")[0] for line in lines] == ["5", *(str(k) for k in range(10, 101, 10))]
    assert lines[1].startswith("10 %: purify under pgd: 0.0 % robust, 6 min 0 s left, peak memory ")
    assert " 0 s left, peak memory" in lines[-1]


def test_a_short_run_says_nothing(shown):
    assert shown(terminal=False, samples=100, batch=10, seconds=0.4) == ""


def test_time_left_leaves_out_what_was_there(shown):
    lines = shown(terminal=False, samples=100, batch=10, seconds=60.0, done=50).splitlines()
    assert lines[0].startswith("20 %: purify under pgd")
    assert "4 min 0 s left" in lines[0]


def test_a_terminal_gets_a_bar(shown):
    text = shown(terminal=True, samples=20, batch=5, seconds=60.0)
    assert "attacking |" in text
    assert "100 %, purify under pgd: 0.0 % robust, 0 s left, peak memory" in text
    assert "%:" not in text


def test_a_dry_run_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = ["--run", str(tmp_path / "run"), "--trainer.logger", "false", "--chunk", "16", "--runs", "2"]
    command += ["--attacks.pgd.steps", "1", "--attacks.pgd.eot", "1", "--data.subset.n", "5"]
    evaluate(["--dry_run", *command])
    said = capsys.readouterr().out
    assert "20 records, 0 of them exist already" in said
    assert re.search(r"heterogeneous +pgd +30 +6 ", said)
    assert "Expected: " in said
    assert "Nothing was written." in said
    assert max(map(len, said.splitlines())) <= 100
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        evaluate(["purify", "--dry_run"])
    assert "--dry_run works with test, frontier and audit, not with purify" in capsys.readouterr().err


def test_several_processes_check_once(tmp_path):
    """And say it once; what is shared among them is tested with predict, and in test_distributed.py."""
    config = str(tiny(tmp_path / "tiny.yaml", samples=2))
    for words, said in (
        (["gradcheck", "--samples", "1"], ["Gradients of 1 sample of", "finite_differences", "gradcheck: passed, 5"]),
        (["--dry_run"], ["2 records, 0 of them exist already", "on 2 processes (cpu)", "Nothing was written."]),
    ):
        argv = [*words, "--config", config, "--run", str(tmp_path / "run")]
        launched = Launch("evaluate", argv, tmp_path / words[0], world=2)
        assert launched.wait() == [0, 0], launched.said
        assert [launched.said.count(part) for part in said] == [1] * len(said), launched.said
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["gradcheck.json"]
