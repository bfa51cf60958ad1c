"""Samplers, records and draws against a second, plain writing of what they promise."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

from lit_purify.attacks import PGD
from lit_purify.data import Digits
from lit_purify.defense import (
    DefendedClassifier,
    HeterogeneousPurifier,
    Mask,
    NoPurifier,
    RandomArea,
    SoftmaxThreshold,
    TopFraction,
    UniformPurifier,
)
from lit_purify.errors import InputError
from lit_purify.evaluation import Evaluator, Ledger, Record, RobustAccuracy, RobustnessTask, read_records
from lit_purify.evaluation.folder import RunFolder
from lit_purify.functional import mask as F
from lit_purify.functional.chunks import logits_in_chunks
from lit_purify.functional.diffusion import step_back
from lit_purify.functional.noise import ATTACK, EVALUATION, KeyedNoise, _to_normal, _to_uniform
from lit_purify.functional.schedule import Schedule
from lit_purify.functional.statistics import average_interval, wilson
from lit_purify.functional.threat import violations
from lit_purify.models import load_classifier, load_denoiser
from lit_purify.report.summary import summarize

ROOT = Path(__file__).parent.parent
TOP = TopFraction(0.3)


def keyed(count, run=0, stream=EVALUATION):
    return KeyedNoise(0, torch.arange(count), torch.full((count,), run), stream)


@pytest.mark.parametrize("kind", ["none", "single", "release", "multi"])
def test_heterogeneous_follows_its_docstring(kind, unet, classifier, images):
    """Written a second time, plainly: x0 from eps, then back; fresh noise at every draw."""
    high, low, steps, jump, small = 300, 100, 5, 12, 4
    purifier = HeterogeneousPurifier(unet, TOP, high, low, steps, kind, jump, small)
    u, abar, step = 2 * images - 1, Schedule.linear().abar.tolist(), -1
    mask = TOP(classifier, images, keyed(6))

    def draw():
        nonlocal step
        step += 1
        return keyed(6).normal(step, u)

    def at(t):
        return abar[t] ** 0.5 * u + (1 - abar[t]) ** 0.5 * draw()

    def merged(x, t):
        return torch.where(mask > 0, x, at(t))

    def back(x, t, s):
        eps = unet(x, torch.full((6,), t))
        clean = (x - (1 - abar[t]) ** 0.5 * eps) / abar[t] ** 0.5
        return abar[s] ** 0.5 * clean + (1 - abar[s]) ** 0.5 * eps

    def jumped(x, t):
        ratio = abar[t + jump] / abar[t]
        return ratio**0.5 * x + (1 - ratio) ** 0.5 * draw()

    def mended(x, t, walk):
        x = jumped(x, t)
        for k, (a, b) in enumerate(itertools.pairwise(walk)):
            x = back(merged(x, a) if k else x, a, b)
        return x

    def walk(t):
        return [t + 12, t + 9, t + 6, t + 3, t] if kind == "multi" else [t + 12, t]

    x = at(high)
    draw()  # the picture's
    for t, s in ((300, 233), (233, 167), (167, 100)):
        x = merged(x, t)
        if kind == "release":
            x = back(jumped(x, t), t + jump, s)
            continue
        if kind != "none" and t < high:
            x = mended(x, t, walk(t))
        x = back(x, t, s)
    if kind != "release":
        x = merged(x, low)
        if kind != "none":
            x = mended(x, low, walk(low))
    x = back(back(x, 100, 50), 50, 0)
    torch.testing.assert_close(purifier(images, keyed(6), mask), (x / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_share_of_steps_above_low_is_rounded(unet):
    assert HeterogeneousPurifier(unet, TOP, 100, 60, 4).levels == [100, 80, 60, 30]


def test_records_are_what_attack_and_runs_give_by_hand():
    """The attack's noise is of its own stream, and the attacked image is the one that is classified."""
    split = Digits().split("test")
    images = torch.stack([split.read(i) for i in range(6)])
    classifier = load_classifier(ROOT / "checkpoints/digits_classifier.safetensors")
    unet = load_denoiser(ROOT / "checkpoints/digits_denoiser.safetensors")
    attack = PGD("linf", 0.2, 3, 0.1, eot=2)
    purifier = UniformPurifier(unet, 200, 2)
    evaluator = Evaluator(classifier, {"uniform": purifier}, {"pgd": attack}, runs=5, chunk=8, seed=4)
    index, label = torch.arange(6) + 10, classifier(images).argmax(dim=1)
    ((records, _),) = evaluator.evaluate({"image": images, "label": label, "index": index}, Ledger())
    model, zero = DefendedClassifier(purifier, classifier), torch.zeros_like(index)
    adversarial = attack(model, images, label, KeyedNoise(4, index, zero, ATTACK), 8)
    noise = KeyedNoise(4, index, zero, EVALUATION)
    clean, broken = (
        logits_in_chunks(model.attacked(), x, noise, [0, 1, 2, 3, 4], 8).argmax(dim=2) for x in (images, adversarial)
    )
    assert [record.clean for record in records] == clean.tolist()
    assert [record.adversarial for record in records] == broken.tolist()
    assert not torch.equal(clean, broken)


def test_clean_is_counted_once_when_several_processes_resume(classifier):
    attacks = {"a": PGD("linf", 0.1, 1, 0.1), "b": PGD("l2", 0.1, 1, 0.1)}
    ranks = [RobustnessTask(Evaluator(classifier, {"none": NoPurifier()}, attacks, runs=1)) for _ in range(2)]
    for rank, task in enumerate(ranks):
        task.resume([Record("none", "a", 1, 3, [3], [3], 0, 0, 0)], count=rank == 0)
    ranks[1]._count([Record("none", "b", 1, 3, [3], [3], 0, 0, 0)])
    assert sum(int(task.metrics["none"].count) for task in ranks) == 1


@dataclasses.dataclass(frozen=True)
class Spy(KeyedNoise):
    seen: list = dataclasses.field(default_factory=list)

    def _draw(self, step, like, **kind):
        self.seen.extend((int(i), int(r), step) for i, r in zip(self.index, self.run, strict=True))
        return super()._draw(step, like, **kind)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_key_is_drawn_twice(norm, unet, classifier, images):
    """Random starts, random masks and the sampler's draws, over restarts, steps and EOT draws."""
    spy = Spy(0, torch.arange(6), torch.zeros(6, dtype=torch.long), ATTACK)
    purifier = HeterogeneousPurifier(unet, RandomArea(TOP), 300, 100, 3)
    attack = PGD(norm, 0.1, 2, 0.05, eot=2, restarts=2)
    attack(DefendedClassifier(purifier, classifier), images, torch.arange(6), spy, chunk=6)
    assert len(spy.seen) == len(set(spy.seen))


def test_random_start_is_used_and_differs_between_restarts(images):
    starts = []

    def flat(x, noise):
        starts.append(x.detach().clone())
        return torch.stack([0 * x.sum(dim=(1, 2, 3)), 0 * x.sum(dim=(1, 2, 3))], dim=1)

    attack = PGD("linf", 0.1, 1, 0.05, loss="margin", restarts=2)
    attack(flat, images, torch.zeros(6, dtype=torch.long), keyed(6), chunk=6)
    assert not torch.equal(starts[0], images)
    assert not torch.equal(starts[0], starts[2])


def test_best_is_the_highest_loss_that_was_seen(classifier, images):
    seen, label = [], torch.arange(6)

    def model(x, noise):
        out = classifier(x)
        seen.append(torch.nn.functional.cross_entropy(out.detach(), label, reduction="none"))
        return out

    attack = PGD("linf", 0.2, 5, 0.4, select="best")
    found = torch.nn.functional.cross_entropy(
        classifier(attack(model, images, label, keyed(6), 6)), label, reduction="none"
    )
    torch.testing.assert_close(found, torch.stack(seen).amax(dim=0))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_gradient_that_is_no_number_is_an_error(norm, images):
    def model(x, noise):
        nothing = (x - x).sum(dim=(1, 2, 3)).sqrt()
        return torch.stack([x.sum(dim=(1, 2, 3)) + nothing, -x.sum(dim=(1, 2, 3))], dim=1)

    with pytest.raises(RuntimeError, match="gradient"):
        PGD(norm, 0.1, 2, 0.05)(model, images, torch.zeros(6, dtype=torch.long), keyed(6), chunk=6)


def test_values_below_the_range_are_violations():
    image = torch.full((2, 1, 2, 2), 0.5)
    assert violations(image - 0.6, image, "linf", 1.0).all()


def test_eta_between_ddim_and_ddpm_scales_the_noise():
    at, x = Schedule.linear().at, torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    one, half = (step_back(x, x, at(400), at(150), eta, x + 1.0) for eta in (1.0, 0.5))
    assert float(half / one) == pytest.approx(0.5, rel=1e-12)


def test_extreme_words_stay_in_range():
    words, out = torch.tensor([0, 0xFFFFFFFF]), torch.empty(2, 2, dtype=torch.float64)
    _to_uniform(words, words, out)
    assert out.float().max() < 1.0
    _to_normal(words, words, out)
    assert torch.isfinite(out).all()


def test_top_fraction_takes_the_largest_of_the_maximum_over_blocks():
    maps = torch.tensor([[[[1.0, 0.6]], [[0.0, 0.6]]]])
    assert F.top_fraction(maps, 0.5).tolist() == [[[[1.0, 0.0]]]]
    plateau = torch.full((1, 1, 16, 16), 0.5)
    plateau[..., 8:, :] += 2.0**-24 * 1.5
    assert F.top_fraction(plateau, 0.5)[0, 0, :8].eq(1).all()


def test_masks_are_built_without_a_graph_and_use_their_power(classifier, images):
    class Probe(Mask):
        def build(self, classifier, image, noise):
            assert not torch.is_grad_enabled()
            return torch.ones_like(image[:, :1])

    Probe()(classifier, images, keyed(6))
    expected = F.threshold_union(F.softmax_normalize(F.saliency(classifier.features(images), (8, 8), 1.0)), 0.02)
    assert torch.equal(SoftmaxThreshold(0.02, power=1.0)(classifier, images, keyed(6)), expected)


def test_effective_number_uses_the_sample_variance():
    share = [0.0, 0.5, 0.5, 1.0]
    spread = sum((s - 0.5) ** 2 for s in share) / 3
    assert average_interval(2.0, 1.5, 4, 8) == pytest.approx(wilson(0.5, 0.25 * 4 / spread))


def record(defense="none", attack="a", index=0, right=True):
    return Record(defense, attack, index, 1, [1, 1], [int(right), int(right)], 0.1, 0.2, 0.0)


def test_paired_difference_is_to_the_baseline_under_the_same_attack():
    broken = {("none", "a"): 4, ("none", "b"): 3, ("uniform", "a"): 1, ("uniform", "b"): 0}
    facts = {"dataset": "Digits", "samples": 4, "runs": 2, "classifier": "ResNet"}
    records = [record(d, a, i, right=i >= n) for (d, a), n in broken.items() for i in range(4)]
    described = [
        {"defense": d, "attack": a, "nfe_defense": 0, "norm": "linf", "eps": float(k)}
        for k, (d, a) in enumerate(broken)
    ]
    results = summarize(records, described, facts, "none")["results"]
    assert [r["robust_difference"]["average"][0] for r in results[2:]] == [0.75, 0.75]
    assert "robust_difference" not in results[0]
    assert results[2]["robust"]["average"][0] == 0.75


def test_records_file(tmp_path):
    path, good = tmp_path / "records.jsonl", [record(index=i).line() for i in range(3)]
    path.write_text(good[0] + good[1] + good[0] + good[2][:20])
    assert [r.index for r in read_records(path)] == [0, 1]
    path.write_text(good[0] + good[1][:20] + "\n" + good[2])
    with pytest.raises(InputError, match="line 2"):
        read_records(path)


def test_a_torn_first_line_is_mended(tmp_path):
    folder = RunFolder(tmp_path)
    folder.records.write_text(record().line()[:30])
    folder.part(1).write_text(record(index=1).line()[:30])
    assert folder.collect(write=True) == []
    with folder.records.open("a") as stream:
        stream.write(record(index=2).line())
    assert [r.index for r in folder.collect(write=True)] == [2]
    assert not folder.part(1).exists()


def test_one_run_at_a_time_writes_into_a_folder(tmp_path):
    first = RunFolder(tmp_path)
    first.lock()
    with pytest.raises(InputError, match="another run is writing"):
        RunFolder(tmp_path).lock()
    first.release()
    RunFolder(tmp_path).lock()


def test_metric_states_add_up_over_processes():
    assert {each.__name__ for each in RobustAccuracy(2)._reductions.values()} == {"dim_zero_sum"}


def test_ddpm_leaves_a_clean_pixel_finite():
    levels = torch.tensor([[[[0, 10]]]])
    at, x = Schedule.linear().at, torch.ones(1, 1, 1, 2)
    assert torch.isfinite(step_back(x, x, at(levels), at(levels // 2), 1.0, x)).all()


def test_multi_step_resampling_needs_room_for_its_steps(unet, images):
    with pytest.raises(InputError, match="steps = 20"):
        HeterogeneousPurifier(unet, TOP, 300, 100, 3, "multi", jump=10, resampling_steps=20)
    purifier = HeterogeneousPurifier(unet, TOP, 300, 100, 3, "multi")
    assert purifier(images, keyed(6), torch.ones_like(images)).shape == images.shape
