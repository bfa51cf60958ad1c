"""Networks: denoisers and classifiers, and their checkpoint files."""

from lit_purify.models.accelerated import (
    Precision,
    Replayed,
    Replays,
    accelerated,
    arithmetic,
    copied,
    replayed,
    rounded,
)
from lit_purify.models.classifier import Classifier, TimmClassifier
from lit_purify.models.denoiser import Denoiser
from lit_purify.models.files import load_classifier, load_denoiser
from lit_purify.models.layers import differentiable_twice
from lit_purify.models.matched import MatchedSchedule
from lit_purify.models.readers import load_ddpm, load_diffusers, load_guided_diffusion, load_score_sde
from lit_purify.models.resnet import ResNetClassifier
from lit_purify.models.table import TableClassifier, TableDenoiser
from lit_purify.models.unet import UNet
from lit_purify.models.wide_resnet import WideResNetClassifier

__all__ = [
    "Classifier",
    "Denoiser",
    "MatchedSchedule",
    "Precision",
    "Replayed",
    "Replays",
    "ResNetClassifier",
    "TableClassifier",
    "TableDenoiser",
    "TimmClassifier",
    "UNet",
    "WideResNetClassifier",
    "accelerated",
    "arithmetic",
    "copied",
    "differentiable_twice",
    "load_classifier",
    "load_ddpm",
    "load_denoiser",
    "load_diffusers",
    "load_guided_diffusion",
    "load_score_sde",
    "replayed",
    "rounded",
]
