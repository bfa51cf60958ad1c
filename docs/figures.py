"""Draws the figures of docs/method.md with the shipped weights: ``python docs/figures.py`` in the root.

``python docs/figures.py mobilenetv2_100.safetensors`` draws README's photograph with timm's ImageNet weights.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

ROOT = Path(__file__).parent.parent
# Run as a script, this folder is on the path, the repository is not.
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402

from lit_purify.attacks import PGD  # noqa: E402
from lit_purify.data import Digits  # noqa: E402
from lit_purify.defense import (  # noqa: E402
    DefendedClassifier,
    HeterogeneousPurifier,
    InvertedMask,
    MinMaxThreshold,
    NoPurifier,
    Purifier,
    RandomArea,
    SoftmaxThreshold,
    TopFraction,
    Trace,
    UniformPurifier,
    VariableIntensityPurifier,
)
from lit_purify.functional.chunks import draws_in_chunks  # noqa: E402
from lit_purify.functional.levels import LevelMap  # noqa: E402
from lit_purify.functional.losses import margin_loss  # noqa: E402
from lit_purify.functional.noise import ATTACK, KeyedNoise  # noqa: E402
from lit_purify.functional.rendering import overlaid  # noqa: E402
from lit_purify.models import Denoiser, TimmClassifier, load_classifier, load_denoiser  # noqa: E402

INK = "#7d8590"
"""Read on white and on black ground."""
HIGH, LOW, STEPS, RULE = 150, 75, 4, TopFraction(0.3)
COLORS = {"uniform": "#3b82c4", "heterogeneous": "#d9622b", "variable": "#2f9e5b", "none": INK}
STYLE = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK) | {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.transparent": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10.0,
}


def keyed(index: Tensor, stream: int = 0) -> KeyedNoise:
    """Noise of some samples."""
    return KeyedNoise(0, index, torch.zeros_like(index), stream)


def calls(defended: DefendedClassifier, image: Tensor, noise: KeyedNoise) -> tuple[list[tuple[Tensor, Tensor]], Trace]:
    """The denoiser's inputs and levels at each call, and the trace of the purification."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: Denoiser, inputs: tuple[Tensor, Tensor | LevelMap]) -> None:
        x, t = inputs
        seen.append((x, t.dense if isinstance(t, LevelMap) else t))

    handle = defended.purifier.denoiser.register_forward_pre_hook(keep)
    with torch.no_grad():
        trace = defended.trace(image, noise)
    handle.remove()
    return seen, trace


def show(axes: Any, image: Tensor, title: str = "", **how: Any) -> None:  # noqa: ANN401
    """An image (C, H, W) in [0, 1], pixel by pixel."""
    pixels = image.detach().permute(1, 2, 0).squeeze(-1)
    axes.imshow(pixels, interpolation="nearest", **{"cmap": "gray", "vmin": 0, "vmax": 1} | how)
    axes.set_title(title, fontsize=9, pad=4)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def walk(defenses: dict[str, DefendedClassifier], image: Tensor, index: Tensor) -> Any:  # noqa: ANN401
    """The denoiser's input for each purifier, call by call."""
    seen = {name: calls(defended, image, keyed(index)) for name, defended in defenses.items()}
    columns = 3 + max(len(states) for states, _ in seen.values())
    figure, grid = plt.subplots(len(defenses), columns, figsize=(1.1 * columns, 1.45 * len(defenses)))
    for axes in grid.flat:
        axes.set_axis_off()
    for (name, (states, trace)), row in zip(seen.items(), grid, strict=True):
        show(row[0], image[0], "image")
        row[0].set_axis_on()
        row[0].set_ylabel(name, color=COLORS[name], fontsize=11, labelpad=8)
        if trace.mask is not None:
            show(row[1], overlaid(image[0].expand(3, -1, -1), trace.mask[0], 0.6), "mask")
        for axes, (x, t) in zip(row[2:], states, strict=False):
            values = sorted({int(level) for level in t.unique()}, reverse=True)
            # Noise leaves [-1, 1]: a wider scale of gray shows it.
            show(axes, x[0], "t = " + " | ".join(map(str, values)), vmin=-1.6, vmax=1.6)
        show(row[-1], trace.purified[0], "purified")
    figure.subplots_adjust(left=0.05, right=0.99, top=0.93, bottom=0.02, wspace=0.08, hspace=0.25)
    return figure


def levels(defenses: dict[str, DefendedClassifier], image: Tensor, index: Tensor) -> Any:  # noqa: ANN401
    """Levels of the denoiser's input, call by call."""
    figure, rows = plt.subplots(1, len(defenses), figsize=(9, 2.6), sharey=True, layout="constrained")
    for (name, defended), axes in zip(defenses.items(), rows, strict=True):
        states, _ = calls(defended, image, keyed(index))
        strong = [int(t.max()) for _, t in states] + [0]
        weak = [int(t.min()) for _, t in states] + [0]
        axes.plot(strong, color=COLORS[name], marker="o", ms=5, lw=1.6, label="on the mask")
        if weak != strong:
            axes.plot(weak, color=COLORS[name], marker="o", ms=5, lw=1.6, ls=":", mfc="none", label="elsewhere")
            axes.legend(frameon=False, fontsize=9)
        axes.set_title(name, color=COLORS[name], fontsize=11)
        axes.set(xlabel="network call", xticks=range(len(strong)), xticklabels=[*range(1, len(strong)), "end"])
        axes.grid(alpha=0.15, color=INK)
    rows[0].set_ylabel("level (noising steps)")
    return figure


def masks(classifier: Any, image: Tensor, index: Tensor) -> Any:  # noqa: ANN401
    """The masks of each rule."""
    rules = {
        "image": None,
        "SoftmaxThreshold\ntau 0.03": SoftmaxThreshold(0.03),
        "MinMaxThreshold\ntau 0.5": MinMaxThreshold(0.5),
        "TopFraction\n0.3": RULE,
        "InvertedMask\nof TopFraction": InvertedMask(RULE),
        "RandomArea\nof TopFraction": RandomArea(RULE),
    }
    figure, grid = plt.subplots(len(image), len(rules), figsize=(1.5 * len(rules), 1.5 * len(image) + 0.35))
    for row, (title, rule) in enumerate(rules.items()):
        mask = None if rule is None else rule(classifier, image, keyed(index))
        for k, axes in enumerate(grid[:, row]):
            color = image[k].expand(3, -1, -1)
            show(axes, color if mask is None else overlaid(color, mask[k], 0.6), "" if k else title)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.87, bottom=0.01, wspace=0.06, hspace=0.06)
    return figure


def agreement(defenses: dict[str, DefendedClassifier], data: Any) -> Any:  # noqa: ANN401
    """How well two averages of n gradients agree: the quartiles over images of their cosine."""
    image = torch.stack([item["image"] for item in data])
    label, index = (torch.tensor([item[key] for item in data]) for key in ("label", "index"))
    sizes = [1, 2, 4, 8, 16, 32]
    figure, axes = plt.subplots(figsize=(5.4, 3.2), layout="constrained")
    for name, defended in defenses.items():
        draws = list(range(2 * max(sizes)))
        gradient = draws_in_chunks(
            defended.attacked(), margin_loss, image, label, keyed(index, ATTACK), draws, 256
        ).gradient
        cosines = []
        for n in sizes:
            means = gradient.flatten(2).unflatten(1, (-1, 2, n)).mean(dim=3)
            cosines.append(torch.cosine_similarity(means[:, :, 0], means[:, :, 1], dim=2).mean(dim=1))
        low, middle, high = torch.stack(cosines).quantile(torch.tensor([0.25, 0.5, 0.75]), dim=1)
        axes.plot(sizes, middle, color=COLORS[name], marker="o", ms=4, lw=1.6, label=name)
        axes.fill_between(sizes, low, high, color=COLORS[name], alpha=0.12, lw=0)
        print(name, [f"{value:.2f}" for value in middle.tolist()])
    axes.set_xscale("log", base=2)
    axes.set(xticks=sizes, xticklabels=sizes, xlabel="draws averaged (EOT)", ylabel="cosine of two such gradients")
    axes.grid(alpha=0.15, color=INK)
    axes.legend(frameon=False, fontsize=9)
    return figure


def photograph(checkpoint: Path) -> Any:  # noqa: ANN401
    """A photograph on its way through the paper's sampler.

    The photograph is scikit-learn's ``china.jpg`` by danielbuechele, CC BY 2.0. The denoiser has learned 32x32 images:
    the figure shows the steps, not how robust they are.
    """
    size, level = 224, (200, 75)
    half = [128 / 255] * 3
    classifier = TimmClassifier("mobilenetv2_100", 1000, size, mean=half, std=half, checkpoint=checkpoint)
    denoiser = load_denoiser("checkpoints/cifar10_denoiser.safetensors").requires_grad_(False)
    picture = Image.fromarray(load_sample_image("china.jpg")).crop((20, 0, 447, 427)).resize((size, size))
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255.0
    label = classifier(image).argmax(dim=1)
    torch.manual_seed(0)
    adversarial = PGD(eps=2 / 255, steps=20)(classifier, image, label)
    defended = DefendedClassifier(HeterogeneousPurifier(denoiser, TopFraction(0.3), *level, steps=10), classifier)
    with torch.no_grad():
        trace = defended.trace(adversarial, keyed(torch.zeros(1, dtype=torch.long)))
    assert trace.mask is not None
    panels = {
        "photograph": image,
        "adversarial": adversarial,
        "mask: where the classifier looks": overlaid(adversarial[0], trace.mask[0], 0.6)[None],
        "noised": trace.noised,
        "purified": trace.purified,
    }
    figure, row = plt.subplots(1, len(panels), figsize=(11.4, 2.5))
    for axes, (title, panel) in zip(row, panels.items(), strict=True):
        show(axes, panel[0].clamp(0.0, 1.0), title)
    figure.subplots_adjust(left=0.002, right=0.998, top=0.9, bottom=0.005, wspace=0.02)
    return figure


def main() -> None:
    """All figures, each beside this file."""
    if len(sys.argv) > 1:
        with plt.rc_context(STYLE | {"figure.facecolor": "white", "savefig.transparent": False}):
            photograph(Path(sys.argv[1])).savefig(ROOT / "docs" / "photograph.jpg", dpi=110, pil_kwargs={"quality": 88})
        return
    classifier = load_classifier("checkpoints/digits_classifier.safetensors").requires_grad_(False)
    denoiser = load_denoiser("checkpoints/digits_denoiser.safetensors").requires_grad_(False)
    purifiers: dict[str, Purifier] = {
        "uniform": UniformPurifier(denoiser, level=100, steps=STEPS),
        "heterogeneous": HeterogeneousPurifier(denoiser, RULE, HIGH, LOW, STEPS),
        "variable": VariableIntensityPurifier(denoiser, RULE, HIGH, LOW, STEPS),
        "none": NoPurifier(),
    }
    every = {name: DefendedClassifier(purifier, classifier) for name, purifier in purifiers.items()}
    defenses = {name: defended for name, defended in every.items() if name != "none"}
    data = Digits().evaluated
    some = [data[k] for k in (2, 5, 9)]
    image, index = torch.stack([item["image"] for item in some]), torch.tensor([item["index"] for item in some])
    drawn = {
        "walk": lambda: walk(defenses, image[:1], index[:1]),
        "levels": lambda: levels(defenses, image[:1], index[:1]),
        "masks": lambda: masks(classifier, image, index),
        "eot": lambda: agreement(every, [data[k] for k in range(32)]),
    }
    with plt.rc_context(STYLE):
        for name, draw in drawn.items():
            draw().savefig(ROOT / "docs" / f"method_{name}.png", dpi=110)


if __name__ == "__main__":
    main()
