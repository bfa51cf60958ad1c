"""Training of denoisers and classifiers, and export of the trained networks."""

from lit_purify.training.checkpoints import Averaging
from lit_purify.training.classifier import ClassifierTask
from lit_purify.training.denoiser import DenoiserTask
from lit_purify.training.export import Export
from lit_purify.training.previews import Previews
from lit_purify.training.task import TrainingTask

__all__ = ["Averaging", "ClassifierTask", "DenoiserTask", "Export", "Previews", "TrainingTask"]
