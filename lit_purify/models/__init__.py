"""Networks: the denoiser and the classifier, and the files that hold them."""

from lit_purify.models.classifier import Classifier, TimmClassifier
from lit_purify.models.denoiser import Denoiser
from lit_purify.models.files import load_classifier, load_denoiser
from lit_purify.models.resnet import ResNetClassifier
from lit_purify.models.unet import UNet

__all__ = [
    "Classifier",
    "Denoiser",
    "ResNetClassifier",
    "TimmClassifier",
    "UNet",
    "load_classifier",
    "load_denoiser",
]
