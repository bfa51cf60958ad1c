"""What README tells people to type works."""

import re
import shlex
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_example_runs(monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(ROOT)
    names = {}
    exec(code, names)
    model, image = names["model"], names["image"]
    assert isinstance(model, torch.nn.Module)
    logits = model(image)
    assert logits.shape == (len(image), 10)
    leaf = image.clone().requires_grad_()
    model(leaf).sum().backward()
    assert float(leaf.grad.abs().sum()) > 0


def test_named_files_exist():
    for name in re.findall(r"(?<![\w/])(?:configs|docs|checkpoints)/[\w./-]+\.\w+", README):
        assert (ROOT / name).exists(), name


def test_commands_name_real_settings(capsys):
    from lit_purify.cli import evaluate, train

    for line in re.findall(r"^(?:\S+/)?python (?:train|eval)\.py.*(?:\\\n.*)*", README, re.MULTILINE):
        words = shlex.split(line.replace("\\\n", " "))
        run = train if words[1] == "train.py" else evaluate
        with pytest.raises(SystemExit) as exit_:
            run([*words[2:], "--print_config"])
        assert not exit_.value.code, (line, capsys.readouterr().err)
