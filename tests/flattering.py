"""Defenses and attacks that flatter a robust accuracy, on a task where the true one is known.

Four classes, each a Walsh pattern of +1 and -1 over 8x8 pixels; two patterns differ in half the pixels. Sample i is
gray plus m_i times its pattern. The logits of a linear classifier on the patterns, divided by the number of pixels, are
m_i for its class and 0 for the others, and a change of size eps moves their difference by at most eps
(|w_a - w_b|_1 = 64): a sample withstands every Linf attack if and only if m_i > eps.
"""

from dataclasses import replace

import torch
from torch import nn

from lit_purify.attacks import PGD, Attack, Queries
from lit_purify.defense import AttackView, DefendedClassifier, Gradient, Mask, NoPurifier, Trace
from lit_purify.functional.chunks import AttackedFunction
from lit_purify.functional.noise import ATTACK
from lit_purify.functional.schedule import Schedule
from lit_purify.models import Classifier, Denoiser

SIDE, CLASSES = 8, 4


TRIGGERS = (5, 10, 24, 33)


def patterns(rows=(21, 38, 13, 50)):
    """(4, 64), orthogonal, none of them constant; of other rows orthogonal to these."""
    hadamard = torch.ones(1, 1)
    for _ in range(6):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    return hadamard[list(rows)]


def samples(count, low=0.02, high=0.2):
    """Images (B, 1, 8, 8), labels (B,) and margins m (B,) spread evenly; classes in turn."""
    margin, label = torch.linspace(low, high, count), torch.arange(count) % CLASSES
    image = 0.5 + margin[:, None] * patterns()[label]
    return image.reshape(count, 1, SIDE, SIDE), label, margin


class Idle(Denoiser):
    """Predicts no noise."""

    channels, size = 1, SIDE

    def __init__(self):
        super().__init__()
        self.schedule = Schedule.linear()

    def forward(self, x, t):
        return torch.zeros_like(x)


class Linear(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.register_buffer("weight", scale * patterns() / SIDE**2)

    def forward(self, x):
        return (x - 0.5).flatten(1) @ self.weight.T


def classifier(scale=10.0):
    """Logits ``scale`` m_i; from 1e4 on the softmax saturates in float32."""
    return Classifier(Linear(scale), SIDE, CLASSES, channels=1).eval()


def defense(purifier=NoPurifier, scale=10.0, **arguments):
    return DefendedClassifier(purifier(Idle(), **arguments), classifier(scale))


class Shown(NoPurifier):
    """Shows the classifier what ``shown`` gives."""

    def trace(self, image, noise, mask=None):
        seen = self.shown(image, noise)
        return Trace(seen, seen)


def coin(image, noise, chance):
    """True with a chance, once for each image."""
    return noise.uniform(0, image[:, :, :1, :1]) < chance


# Shattered, detached and misleading gradients


class Quantized(Shown):
    """Rounds to 256 levels."""

    def shown(self, image, noise):
        return (image * 255).round() / 255


class Cut(Shown):
    """No gradient at all."""

    def shown(self, image, noise):
        return image.detach()


class Misleading(Shown):
    """The value is right, the gradient is that of the negative."""

    def shown(self, image, noise):
        return 2.0 * image.detach() - image


class Plateaus(Shown):
    """Steps of 1/32 with a faint slope along waves in between: nonzero gradients that say nothing of the steps."""

    def shown(self, image, noise):
        return (image * 32).round() / 32 + 1e-3 * torch.sin(700.0 * image)


# Randomness


class Shaken(Shown):
    """Multiplies a pixel's contrast by 1 + sigma n: of its gradient one draw has the right sign with Phi(1 / sigma)."""

    sigma = 2.0

    def shown(self, image, noise):
        return 0.5 + (image - 0.5) * (1.0 + self.sigma * noise.normal(0, image))


class Blurred(Shown):
    """Adds noise."""

    def shown(self, image, noise):
        return image + 0.3 * noise.normal(0, image)


class FrozenForTheAttack(Shaken):
    """Fresh noise for the evaluation, one draw for the attack."""

    def shown(self, image, noise):
        return super().shown(image, replace(noise, run=0 * noise.run) if noise.stream == ATTACK else noise)


class _OneDraw:
    """Noise whose runs are all the first."""

    def __init__(self, noise):
        self.noise = noise

    def runs(self, runs):
        return self.noise.runs([0] * len(runs))

    def __getattr__(self, name):
        return getattr(self.noise, name)


class FrozenPGD(PGD):
    """An attack that draws once."""

    def perturb(self, model, image, label, noise, chunk):
        return super().perturb(model, image, label, _OneDraw(noise), chunk)


class Torn(Shown):
    """A loud view, drawn at times, and a faint one, drawn more often, that pull against each other.

    The average over draws follows the loud one and takes it from the defense, which keeps its vote by the other.
    """

    def shown(self, image, noise):
        contrast = image - 0.5
        # Lost by less contrast, and by more.
        loud, faint = 10.0 * (contrast - 0.06 * contrast.sign()), 0.2 * contrast.sign() - contrast
        return 0.5 + torch.where(coin(image, noise, 0.3), loud, faint)


class Rare(Shown):
    """Nothing is lost under the usual draw, which pulls the average away from what is lost under a rare one."""

    def shown(self, image, noise):
        contrast = image - 0.5
        usual, rare = 10.0 * (contrast + 0.2 * contrast.sign()), 0.2 * contrast.sign() - contrast
        return 0.5 + torch.where(coin(image, noise, 0.2), rare, usual)


class Triggered(Linear):
    """Beside its pattern each class has a trigger: contrast above 0.3 along a direction of its own counts threefold."""

    def forward(self, x):
        along = (x - 0.5).flatten(1) @ patterns(TRIGGERS).to(x).T / SIDE**2
        return super().forward(x) + 30.0 * (along - 0.3).relu()


class Scattered(Shown):
    """Under each draw a sample is vulnerable in another direction: along the trigger of one class.

    The image's margin is 3 for m = 0.3, and the class of the draw has 0.3 + 30 q_k, with q_k the contrast along its
    trigger: a change along that alone takes all draws of that class. The average over draws follows the sign of the
    sum of all four, along which no q_k is above 0.375 eps: it takes none.
    """

    def shown(self, image, noise):
        weight, contrast = patterns(TRIGGERS).to(image), (image - 0.5).flatten(1)
        along = contrast @ weight.T / SIDE**2
        drawn = (CLASSES * noise.uniform(0, image[:, :, :1, :1]).reshape(-1, 1)).long()
        pulled = torch.zeros_like(along).scatter(1, drawn, 0.31 + along.gather(1, drawn))
        return 0.5 + (contrast + (pulled - along) @ weight).reshape(image.shape)


def scattered():
    """A defense of samples with m = 0.3."""
    return DefendedClassifier(Scattered(Idle()), Classifier(Triggered(10.0), SIDE, CLASSES, channels=1).eval())


class OtherUnderAttack(Shown):
    """Under the attack's noise its negative."""

    def shown(self, image, noise):
        sign = -1.0 if noise.stream == ATTACK else 1.0
        return 0.5 + sign * (image - 0.5) + 1e-6 * noise.normal(0, image)


class Halves(Shown):
    """Shows the classifier the upper or the lower half: on the samples themselves both give the same logits."""

    def shown(self, image, noise):
        rows = torch.arange(SIDE).reshape(1, 1, -1, 1) < SIDE // 2
        return torch.where(coin(image, noise, 0.5) == rows, image, torch.full_like(image, 0.5))


# Attack and defense are not the same


class WeakWhenAttacked(Shown):
    """Turns into its negative whenever it is differentiated."""

    def shown(self, image, noise):
        sign = -1.0 if torch.is_grad_enabled() and image.requires_grad else 1.0
        return 0.5 + sign * (image - 0.5)


class VotesWhenDefending(Shaken):
    """Averages sixteen draws, but for the attack, which sees one."""

    def shown(self, image, noise):
        if torch.is_grad_enabled() and image.requires_grad:
            return super().shown(image, noise)
        seen = torch.stack([0.5 + (image - 0.5) * (1.0 + self.sigma * noise.normal(k, image)) for k in range(16)])
        return seen.mean(dim=0)


class Negative(Shown):
    """Inverts the image, and the classifier behind it reads negatives: the identity is the wrong gradient."""

    def shown(self, image, noise):
        return 1.0 - image


class OtherLevels(Gradient):
    """Says that it is exact and hands over another level than the defense's."""

    def attacked(self, defended):
        purifier = type(defended.purifier)(defended.purifier.denoiser, 20, 1)
        model = DefendedClassifier(purifier, defended.classifier)
        return AttackView(defended, model.attacked(), "exact", "none", purifier.nfe, purifier.levels)


def view(defended, shown, gradient):
    """The defense, shown another image than is attacked."""
    function = AttackedFunction(lambda image, noise: defended(shown(image), noise))
    return AttackView(defended, function, gradient, "none", defended.purifier.nfe, defended.purifier.levels)


class HalfView(Gradient):
    """Says that it is exact, has the right outputs, and the gradient of the lower half alone, turned."""

    def attacked(self, defended):
        lower = torch.arange(SIDE).reshape(1, 1, -1, 1) >= SIDE // 2
        return view(defended, lambda image: torch.where(lower, 2.0 * image.detach() - image, image.detach()), "exact")


class Stale(Gradient):
    """A surrogate that is right about the function and wrong about its gradient."""

    def attacked(self, defended):
        return view(defended, lambda image: 2.0 * image.detach() - image, "surrogate")


class Bright(Mask):
    """Pixels above gray."""

    relaxable = True

    def build(self, classifier, image, noise):
        return (image > 0.5).to(image.dtype)

    def relaxed(self, classifier, image, noise, temperature):
        return torch.sigmoid((image - 0.5) / temperature)


class Steered(NoPurifier):
    """Only the mask tells the classifier anything; with the mask frozen a faint slope leads the wrong way."""

    mask = Bright()

    def trace(self, image, noise, mask=None):
        seen = 0.5 + 0.2 * (2.0 * mask - 1.0) - 1e-3 * (image - 0.5)
        return Trace(seen, seen, mask)


class Lazy(Attack):
    """An attack of somebody's own: a single short step, and no stronger version."""

    steps = eot = 1
    queries = Queries(1, 1)

    def perturb(self, model, image, label, noise, chunk):
        step = PGD(self.norm, self.eps, 1, self.eps / 8, random_start=False)
        return step.perturb(model, image, label, noise, chunk)
