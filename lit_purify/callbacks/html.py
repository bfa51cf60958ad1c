"""report.html: one file that opens without a network."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lit_purify.callbacks.summary import RULES, attack_line, chunk_line, headline, percent, signed
from lit_purify.metrics import Record

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
tbody th { font-weight: inherit; } th:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
thead th { vertical-align: bottom; } td small { display: block; opacity: .7; } li { overflow-wrap: anywhere; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(30rem, 100%), 1fr)); gap: .6rem; }
figure { margin: 0; padding: .6rem; background: var(--soft); border-radius: .4rem; }
figure img { max-width: 100%; height: auto; } figcaption { font-size: .9rem; }
svg.plot { margin-top: 1.5rem; }
.plot { background: #fff; border-radius: .4rem; max-width: 100%; height: auto; }
pre { overflow-x: auto; font-size: .8rem; }
.broken { color: #c2410c; } .shaken { color: #a16207; } .held { color: #15803d; }
@media (prefers-color-scheme: dark) {
  .broken { color: #fb923c; } .shaken { color: #facc15; } .held { color: #4ade80; } }
"""


def page(
    summary: Mapping[str, Any],
    pictures: Sequence[tuple[Record, str]],
    classes: Sequence[str],
    config: str,
    first: str = "",
) -> str:
    """The whole report.

    Args:
        summary: Content of ``summary.json``.
        pictures: Records with their picture, PNG in base64.
        classes: Names of the classes.
        config: The resolved configuration, YAML.
        first: HTML of a section that comes before the attacks: the frontiers, with their plot.
    """
    facts = {
        "subset": f"sha256 {summary['subset_sha256']}",
        "seed": summary["seed"],
        "rows of a network call": chunk_line(summary),
        "classifier": summary["classifier"],
        "denoiser": summary["denoiser"],
        "versions": ", ".join(f"{name} {version}" for name, version in summary["versions"].items()),
        **{name: f"sha256 {value}" for name, value in summary["files"].items()},
    }
    attacks = dict.fromkeys(result["attack"] for result in summary["results"])
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{escape(summary['dataset'])}: robust accuracy</title><style>{_STYLE}</style>",
        f"<h1>Robust accuracy</h1><p>{escape(headline(summary))}</p>{first}",
    ]
    for attack in attacks:
        group = [result for result in summary["results"] if result["attack"] == attack]
        parts += [
            f"<h2>{escape(attack_line(group))}</h2><p>How it stops: {escape(group[0]['stopping'])}.</p>",
            _table(group, summary["baseline"]),
            _held_out(group),
            # A frontier comes with its own.
            "" if first else _plot(group),
            _fewer_runs(group),
        ]
    parts += [
        "<p>Average: mean over the runs. Worst: right in every run. Majority: the vote of the runs, a tie counts as "
        "wrong. Brackets: 95 % intervals. Differences are paired over the same samples.</p>",
        "<h2>Gallery</h2><p>Left to right: original, adversarial, mask (strong noise) over it, noised, purified.</p>",
        "<div class='gallery'>",
        *(_figure(record, image, classes) for record, image in pictures),
        "</div>",
        "<h2>How to repeat it</h2><p>Save the configuration below and give it to <code>eval.py --config FILE --run "
        "FOLDER</code>, with the files named here.</p><ul>",
        *(f"<li>{escape(name)}: {escape(str(value))}</li>" for name, value in facts.items()),
        f"</ul><details><summary>Configuration</summary><pre>{escape(config)}</pre></details></html>\n",
    ]
    return "\n".join(parts)


def _table(results: Sequence[Mapping[str, Any]], baseline: str) -> str:
    rows = []
    for result in results:
        difference = signed(result["robust_difference"]["average"]) if "robust_difference" in result else ""
        levels = ", ".join(str(level) for level in result["levels"]) or "none"
        cells = [percent(result["robust"]["average"]), difference, percent(result["clean"]["average"])]
        cells += [percent(result[kind][rule]) for kind in ("robust", "clean") for rule in RULES[1:]]
        # The interval stands small under its value.
        shown = "".join(f"<td>{cell.replace(' [', '<small>[')}{'</small>' * ('[' in cell)}</td>" for cell in cells)
        rows.append(
            f"<tr><th scope='row'>{escape(result['defense'])}</th>{shown}<td>{result['nfe_defense']}</td>"
            f"<td>{levels}</td><td>{result['seconds']:.0f}</td></tr>"
        )
    head = ["robust<br>average", f"less<br>{escape(baseline)}", "clean<br>average"]
    head += [f"{kind}<br>{rule}" for kind in ("robust", "clean") for rule in RULES[1:]]
    head += ["network<br>calls", "levels", "seconds"]
    return (
        "<div class='scroll'><table><thead><tr><th>accuracy in %</th>"
        + "".join(f"<th scope='col'>{cell}</th>" for cell in head)
        + f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _held_out(results: Sequence[Mapping[str, Any]]) -> str:
    """By how much the average of an ensemble may be too low."""
    shown = [r for r in results if "robust_average_held_out" in r]
    if not shown:
        return ""
    values = ", ".join(f"{escape(r['defense'])} {percent(r['robust_average_held_out'])}" for r in shown)
    return (
        "<p>The average of an ensemble is the lowest of noisy averages for each sample: too low, by chance. With the "
        "attack chosen on all runs but one, and judged by that one, the robust average is not below what the best "
        f"attack leaves: {values}. The truth lies between the two.</p>"
    )


def _fewer_runs(results: Sequence[Mapping[str, Any]]) -> str:
    """Robust accuracy when an image is submitted M times: none may be wrong, or the vote must be right."""
    draws = [row[0] for row in results[0]["resubmission"]["robust"]]
    rows = []
    for result in results:
        curves = [result["resubmission"]["robust"], result["vote"]["robust"]]
        cells = [percent(values).replace(" [", "<small>[") for curve in curves for _, *values in curve[1:]]
        shown = "".join(f"<td>{cell}</small></td>" for cell in cells)
        rows.append(f"<tr><th scope='row'>{escape(result['defense'])}</th>{shown}</tr>")
    head = "".join(f"<th scope='col'>{kind}<br>{m} runs</th>" for kind in ("all of", "vote of") for m in draws[1:])
    return (
        "<details><summary>Robust accuracy over fewer runs</summary><p>An attacker may submit an image M times and "
        "needs one success (all of M runs must be right), or a defense may vote over M runs. Estimated without bias "
        f"from the {draws[-1]} runs of each sample, over all choices of M of them.</p>"
        f"<div class='scroll'><table><thead><tr><th>accuracy in %</th>{head}</tr></thead><tbody>{''.join(rows)}"
        "</tbody></table></div></details>"
    )


def _plot(results: Sequence[Mapping[str, Any]]) -> str:
    """Clean against robust average accuracy, with intervals, as an inline drawing."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.2), layout="constrained")
    for result in results:
        x, y = (100 * result[kind]["average"][0] for kind in ("clean", "robust"))
        spread = [
            [[100 * abs(result[kind]["average"][k] - result[kind]["average"][0])] for k in (1, 2)]
            for kind in ("clean", "robust")
        ]
        # A dollar sign in a name would start a formula.
        label = result["defense"].replace("$", r"\$")
        axes.errorbar(x, y, xerr=spread[0], yerr=spread[1], fmt="o", capsize=3, label=label)
    axes.set(xlabel="clean accuracy, average (%)", ylabel="robust accuracy, average (%)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, bbox_to_anchor=(1.0, 1.0), loc="upper left")
    drawing = svg(figure, "Clean against robust accuracy")
    pyplot.close(figure)
    return drawing


def svg(figure: Any, label: str) -> str:  # noqa: ANN401
    """A figure of matplotlib as an inline drawing."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    drawing = text.getvalue()
    return drawing[drawing.index("<svg") :].replace(
        "<svg", f"<svg class='plot' role='img' aria-label='{escape(label)}'", 1
    )


def _figure(record: Record, image: str, classes: Sequence[str]) -> str:
    right = sum(p == record.label for p in record.adversarial)
    clean = sum(p == record.label for p in record.clean)
    runs = len(record.adversarial)
    outcome = "held" if right == runs else "broken" if right == 0 else "shaken"
    return (
        f"<figure><img src='data:image/png;base64,{image}' alt='sample {record.index}, {escape(record.defense)}'>"
        f"<figcaption>{escape(record.defense)}, {escape(record.attack)}, sample {record.index} "
        f"(class {escape(classes[record.label])}): clean right in {clean} of {runs} runs, "
        f"<span class='{outcome}'>attacked right in {right} of {runs}</span></figcaption></figure>"
    )
