"""Attacks: they see a function from (image, noise) to logits, and the label."""

from lit_purify.attacks.base import Attack
from lit_purify.attacks.pgd import PGD

__all__ = ["PGD", "Attack"]
