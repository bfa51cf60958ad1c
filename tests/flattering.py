"""Defenses and attacks that flatter a robust accuracy, on a task where the true one is known.

Four classes, each a Walsh pattern of +1 and -1 over 8x8 pixels; two patterns differ in half the pixels. Sample i is
gray plus m_i times its pattern. The logits of a linear classifier on the patterns, divided by the number of pixels, are
m_i for its class and 0 for the others, and a change of size eps moves their difference by at most eps
(|w_a - w_b|_1 = 64): a sample withstands every Linf attack if and only if m_i > eps.
"""

import torch
from torch import nn

from lit_purify.attacks import PGD
from lit_purify.defense import Attacked, DefendedClassifier, Gradient, Mask, NoPurifier, Trace
from lit_purify.functional.noise import ATTACK
from lit_purify.functional.schedule import Schedule
from lit_purify.models import Classifier, Denoiser

SIDE, CLASSES = 8, 4


def patterns():
    """(4, 64), orthogonal, none of them constant."""
    hadamard = torch.ones(1, 1)
    for _ in range(6):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    return hadamard[[21, 38, 13, 50]]


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
    network = classifier(scale)
    return DefendedClassifier(purifier(Idle(), network, **arguments), network)


# Shattered, detached and misleading gradients


class Quantized(NoPurifier):
    """Rounds to 256 levels."""

    def trace(self, image, noise):
        rounded = (image * 255).round() / 255
        return Trace(rounded, rounded)


class Cut(NoPurifier):
    """No gradient at all."""

    def trace(self, image, noise):
        return Trace(image.detach(), image.detach())


class Misleading(NoPurifier):
    """The value is right, the gradient is that of the negative."""

    def trace(self, image, noise):
        turned = 2.0 * image.detach() - image
        return Trace(turned, turned)


class Plateaus(NoPurifier):
    """Steps of 1/32 with a faint slope along waves in between: nonzero gradients that say nothing of the steps."""

    def trace(self, image, noise):
        stairs = (image * 32).round() / 32 + 1e-3 * torch.sin(700.0 * image)
        return Trace(stairs, stairs)


# Randomness


class Shaken(NoPurifier):
    """Multiplies a pixel's contrast by 1 + sigma n: of its gradient one draw has the right sign with Phi(1 / sigma)."""

    def __init__(self, denoiser, network, sigma=2.0):
        super().__init__(denoiser, network)
        self.sigma = sigma

    def trace(self, image, noise):
        shaken = 0.5 + (image - 0.5) * (1.0 + self.sigma * noise.normal(0, image))
        return Trace(shaken, shaken)


class Blurred(NoPurifier):
    """Adds noise."""

    def __init__(self, denoiser, network, sigma=0.3):
        super().__init__(denoiser, network)
        self.sigma = sigma

    def trace(self, image, noise):
        moved = image + self.sigma * noise.normal(0, image)
        return Trace(moved, moved)


class FrozenForTheAttack(Shaken):
    """Fresh noise for the evaluation, one draw for the attack."""

    def trace(self, image, noise):
        frozen = noise.stream == ATTACK
        return super().trace(image, type(noise)(noise.seed, noise.index, 0 * noise.run, ATTACK) if frozen else noise)


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


class Torn(NoPurifier):
    """A loud view, drawn at times, and a faint one, drawn more often, that pull against each other.

    The average over draws follows the loud one and takes it from the defense, which keeps its vote by the other.
    """

    def trace(self, image, noise):
        contrast = image - 0.5
        # Lost by less contrast, and by more.
        loud, faint = 10.0 * (contrast - 0.06 * contrast.sign()), 0.2 * contrast.sign() - contrast
        seen = 0.5 + torch.where(noise.uniform(0, image[:, :, :1, :1]) < 0.3, loud, faint)
        return Trace(seen, seen)


class Rare(NoPurifier):
    """Nothing is lost under the usual draw, which pulls the average away from what is lost under a rare one."""

    def trace(self, image, noise):
        contrast = image - 0.5
        usual, rare = 10.0 * (contrast + 0.2 * contrast.sign()), 0.2 * contrast.sign() - contrast
        seen = 0.5 + torch.where(noise.uniform(0, image[:, :, :1, :1]) < 0.2, rare, usual)
        return Trace(seen, seen)


class FewKeys(Shaken):
    """Three draws for the attack, as many as it likes for the evaluation."""

    def trace(self, image, noise):
        few = noise.stream == ATTACK
        return super().trace(image, type(noise)(noise.seed, noise.index, noise.run % 3, ATTACK) if few else noise)


class OtherUnderAttack(NoPurifier):
    """Under the attack's noise its negative."""

    def trace(self, image, noise):
        shown = 0.5 + (-1.0 if noise.stream == ATTACK else 1.0) * (image - 0.5)
        return Trace(shown + 1e-6 * noise.normal(0, image), shown)


class Ablated(NoPurifier):
    """Honest: shows a tenth of the pixels, at random, the others gray."""

    def trace(self, image, noise):
        seen = torch.where(noise.uniform(0, image) < 0.1, image, torch.full_like(image, 0.5))
        return Trace(seen, seen)


class Halves(NoPurifier):
    """Shows the classifier the upper or the lower half: on the samples themselves both give the same logits."""

    def trace(self, image, noise):
        upper = noise.uniform(0, image[:, :, :1, :1]) < 0.5
        rows = torch.arange(SIDE).reshape(1, 1, -1, 1) < SIDE // 2
        seen = torch.where(upper == rows, image, torch.full_like(image, 0.5))
        return Trace(seen, seen)


# Attack and defense are not the same


class WeakWhenAttacked(NoPurifier):
    """Turns into its negative whenever it is differentiated."""

    def trace(self, image, noise):
        sign = -1.0 if torch.is_grad_enabled() and image.requires_grad else 1.0
        shown = 0.5 + sign * (image - 0.5)
        return Trace(shown, shown)


class VotesWhenDefending(Shaken):
    """Averages sixteen draws, but for the attack, which sees one."""

    def trace(self, image, noise):
        if torch.is_grad_enabled() and image.requires_grad:
            return super().trace(image, noise)
        seen = torch.stack([0.5 + (image - 0.5) * (1.0 + self.sigma * noise.normal(k, image)) for k in range(16)])
        return Trace(seen.mean(dim=0), image)


class Negative(NoPurifier):
    """Inverts the image, and the classifier behind it reads negatives: the identity is the wrong gradient."""

    def trace(self, image, noise):
        return Trace(1.0 - image, 1.0 - image)


class OtherLevels(Gradient):
    """Says that it is exact and hands over another level than the defense's."""

    def attacked(self, defended):
        purifier = type(defended.purifier)(defended.purifier.denoiser, defended.classifier, 20, 1)
        model = DefendedClassifier(purifier, defended.classifier)
        return Attacked(defended, model, "exact", "none", purifier.nfe, purifier.levels)


class HalfView(Gradient):
    """Says that it is exact, has the right outputs, and the gradient of the lower half alone, turned."""

    def attacked(self, defended):
        def logits(image, noise):
            lower = torch.arange(SIDE).reshape(1, 1, -1, 1) >= SIDE // 2
            return defended(torch.where(lower, 2.0 * image.detach() - image, image.detach()), noise)

        return Attacked(defended, logits, "exact", "none", defended.purifier.nfe, defended.purifier.levels)


class Stale(Gradient):
    """A surrogate that is right about the function and wrong about its gradient."""

    def attacked(self, defended):
        def logits(image, noise):
            return defended(2.0 * image.detach() - image, noise)

        return Attacked(defended, logits, "surrogate", "none", defended.purifier.nfe, defended.purifier.levels)


class Bright(Mask):
    """Pixels above gray."""

    relaxable = True

    def build(self, classifier, image, noise):
        return (image > 0.5).to(image.dtype)

    def relaxed(self, classifier, image, noise, temperature):
        return torch.sigmoid((image - 0.5) / temperature)


class Steered(NoPurifier):
    """Only the mask tells the classifier anything; with the mask frozen a faint slope leads the wrong way."""

    def __init__(self, denoiser, network):
        super().__init__(denoiser, network)
        self.mask = Bright()

    def trace(self, image, noise):
        mask = self.mask(self.classifier, image, noise)
        seen = 0.5 + 0.2 * (2.0 * mask - 1.0) - 1e-3 * (image - 0.5)
        return Trace(seen, seen, mask)
