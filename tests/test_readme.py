"""What README and the page on Python tell people to type works."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

SMALL = {"First(100)": "First(4)", "steps=20, eot=4": "steps=2, eot=2", "runs=8": "runs=2", "samples=32": "samples=1"}
SMALL |= {'"report.html"': "report", 'defenses["heterogeneous"], attack': 'defenses["none"], attack'}


def run_python(text, names):
    """The Python blocks of a page, with fewer samples, steps and runs."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    for stated, small in SMALL.items():
        code = code.replace(stated, small)
    exec(code, names)


def test_python_of_readme(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    run_python(README, {})
    assert "uniform" in capsys.readouterr().out


def test_python_of_the_guide(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs/python.md").read_text()
    assert all(stated in text for stated in SMALL)
    monkeypatch.chdir(ROOT)
    names = {"report": tmp_path / "report.html"}
    run_python(text, names)
    shown = capsys.readouterr().out
    assert [row["defense"] for row in names["result"].summary["results"]] == list(names["defenses"])
    assert names["report"].stat().st_size > 10_000
    assert "their own gradient" in shown
    assert "UNDECIDED: 1 samples" in shown


def test_named_files_exist():
    assert len(README.splitlines()) <= 150
    for name in re.findall(r"(?<![\w/])(?:configs|docs|checkpoints)/[\w./-]+\.\w+", README):
        assert (ROOT / name).exists(), name


def test_commands_name_real_settings(capsys):
    from lit_purify.cli import evaluate, train

    pages = README + "".join((ROOT / f"docs/{name}.md").read_text() for name in ("your_data", "is_it_right"))
    for line in re.findall(r"^(?:\S+/)?python (?:train|eval)\.py(?:[^\\\n]|\\\n)*", pages, re.MULTILINE):
        words = shlex.split(line.replace("\\\n", " "))
        run = train if words[1] == "train.py" else evaluate
        with pytest.raises(SystemExit) as exit_:
            run([*words[2:], "--print_config"])
        assert not exit_.value.code, (line, capsys.readouterr().err)
