"""Folders of finished evaluations that no model has written, with names that would do harm as HTML."""

import html
import json
import random
import re

import torch
import yaml
from test_summary import described

from lit_purify.evaluation import Record, View
from lit_purify.evaluation.folder import RunFolder, comparable
from lit_purify.evaluation.records import identity_sha256, write_records
from lit_purify.report import pictures
from lit_purify.report.summary import summarize

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked=1'>\"&'</pre>$x_{$"
CLASSES = ["cat", HOSTILE, "dog"]
RUNS = 4
ATTACKS = {"pgd": ("linf", 8 / 255), "square": ("linf", 8 / 255), "far": ("linf", 16 / 255), "other": ("l2", 0.5)}
DEFENSES = ("none", "uniform", "paper")


def finished_run(path, samples=range(10, 30), seed=0, attacks=ATTACKS, **settings):
    """The folder of an evaluation: random predictions, pictures of the first two samples."""
    rng = random.Random(seed)
    folder = RunFolder(path)
    folder.overlays.mkdir(parents=True)
    facts = {"dataset": f"Folder({HOSTILE})", "split": "test", "classes": CLASSES, "samples": len(samples)}
    facts |= {"subset_sha256": "0" * 64, "seed": 0, "runs": RUNS, "chunk": 16, "classifier": f"net, {HOSTILE}.pth"}
    facts |= {"denoiser": "unet", "versions": {"torch": "2"}, "files": {f"{HOSTILE}.pth": "1" * 64}}
    records = []
    for defense in DEFENSES:
        for index in samples:
            clean = [rng.choice([index % 3] * 8 + [0, 1, 2]) for _ in range(RUNS)]
            for attack in attacks:
                attacked = [rng.choice([index % 3] * 3 + [0, 1, 2]) for _ in range(RUNS)]
                records.append(Record(defense, attack, index, index % 3, clean, attacked, 0.03, 0.5, 0.1))
    results = [
        described(d, a, norm=norm, eps=eps, attack_title=HOSTILE, nfe_defense=DEFENSES.index(d) * 2)
        for d in DEFENSES
        for a, (norm, eps) in attacks.items()
    ]
    summary = summarize(records, results, facts, "uniform")
    folder.summary.write_text(json.dumps(summary))
    write_records(folder.records, records)
    settings = {"classifier.weights": "net", "classifier.weights (sha256)": "1", **settings}
    folder.identity.write_text(json.dumps(settings))
    folder.config.write_text(yaml.safe_dump({"model": HOSTILE}))
    generator = torch.Generator().manual_seed(seed)
    for record in records:
        if record.index < samples[0] + 2:
            images = torch.rand(4, 3, 8, 8, generator=generator).mul(255).round() / 255
            mask = (images[:1, 0] > 0.5).float() if record.defense == "paper" else None
            pictures.write(View(record, *images, mask), folder.overlays)
    return path


def write_verdict(run, command, passed=True, stale=False, samples=(1, 2)):
    identity = json.loads((run / "identity.json").read_text())
    content = {"passed": passed, "undecided": False, "samples": list(samples), "attack": "pgd", "runs": 2}
    content["settings_sha256"] = identity_sha256({} if stale else comparable(identity))
    check = {"defense": "paper", "check": "restarts", "figure": None, "limit": 0.05, "reason": HOSTILE}
    content["checks"] = [{**check, "verdict": "pass" if passed else "fail"}]
    (run / f"{command}.json").write_text(json.dumps(content))


def cells(text):
    """Words of every row of every table, by the table's caption."""

    def words(cell):
        return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", cell)).split())

    def rows(body):
        return [[words(cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in body.split("<tr>")[1:]]

    found = re.findall(r"<caption>(.*?)</caption>(.*?)</table>", text, re.DOTALL)
    return {words(caption): rows(body) for caption, body in found}
