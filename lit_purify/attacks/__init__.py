"""Attacks on a function from (image, noise) to logits, given the label."""

from lit_purify.attacks.apgd import APGD
from lit_purify.attacks.base import Attack, NotApplicableError, Queries
from lit_purify.attacks.capgd import CAPGD
from lit_purify.attacks.carlini_wagner import CarliniWagnerL2
from lit_purify.attacks.diffhammer import DiffHammer
from lit_purify.attacks.fgsm import FGSM
from lit_purify.attacks.foreign import ForeignAttack
from lit_purify.attacks.lf import LF
from lit_purify.attacks.perceptual import LPIPS, SSIM, Distance
from lit_purify.attacks.pgd import PGD
from lit_purify.attacks.restarts import Restarts
from lit_purify.attacks.saved_images import SavedImages
from lit_purify.attacks.square import Square
from lit_purify.attacks.transfer import Transfer

__all__ = [
    "APGD",
    "CAPGD",
    "FGSM",
    "LF",
    "LPIPS",
    "PGD",
    "SSIM",
    "Attack",
    "CarliniWagnerL2",
    "DiffHammer",
    "Distance",
    "ForeignAttack",
    "NotApplicableError",
    "Queries",
    "Restarts",
    "SavedImages",
    "Square",
    "Transfer",
]
