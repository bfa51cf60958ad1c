"""Train and evaluate heterogeneous diffusion-based adversarial purification (Pei et al., CVPR 2025)."""

from lit_purify import attacks, defense
from lit_purify.api import Result, audit, evaluate, gradcheck, purify
from lit_purify.attacks import *  # noqa: F403
from lit_purify.defense import *  # noqa: F403
from lit_purify.errors import InputError
from lit_purify.models import Classifier, Denoiser, TimmClassifier, load_classifier, load_denoiser

__version__ = "0.2.0"

__all__ = ["Classifier", "Denoiser", "InputError", "Result", "TimmClassifier", "audit", "evaluate", "gradcheck"]
__all__ += ["load_classifier", "load_denoiser", "purify"]
__all__ += attacks.__all__
__all__ += defense.__all__
