"""The tutorial works: its files are written, its blocks run in order, with the fewer steps that stand beside them."""

import json
import re
import shlex

from test_docs import DOCS, ROOT, files_of, lay

from lit_purify.cli import evaluate, train

BLOCK = re.compile(r"(?:<!-- CI: (.*?) -->\n)?```(python|bash)\n(.*?)```", re.DOTALL)


def run(words):
    """In this process, which has imported everything already; how it ended."""
    assert words[0] == "python"
    try:
        {"train.py": train, "eval.py": evaluate}[words[1]](words[2:])
    except SystemExit as stopped:
        return stopped.code or 0
    return 0


def follow(page, folder, capsys):
    """Writes the page's files and runs its blocks in the working directory."""
    lay(files_of(page), folder)
    for small, language, code in BLOCK.findall((DOCS / page).read_text()):
        if language == "python":
            exec(code, {})
            continue
        assert small, f"no flags for CI beside {code}"
        for line in code.replace("\\\n", " ").splitlines():
            words = [*shlex.split(line), *shlex.split(small)]
            # Networks that are hardly trained may fail the audit.
            good = (0, 1) if "audit" in words else (0,)
            assert run(words) in good, (line, capsys.readouterr())


def test_tutorial(tmp_path, monkeypatch, capsys):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    follow("tutorial.md", tmp_path, capsys)
    results = json.loads((tmp_path / "runs/evaluation/summary.json").read_text())
    assert [result["defense"] for result in results["results"]] == ["none", "uniform", "variable"]
    assert results["samples"] == 4
    assert results["dataset"] == "ImageFolder(images)"
    assert json.loads((tmp_path / "runs/evaluation/gradcheck.json").read_text())["passed"]
    assert json.loads((tmp_path / "runs/evaluation/audit.json").read_text())["checks"]
    assert "gradcheck" in (tmp_path / "runs/evaluation/report.html").read_text()
