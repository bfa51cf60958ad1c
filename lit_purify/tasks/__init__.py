"""LightningModules: training the denoiser, training the classifier, evaluating robustness."""

from lit_purify.tasks.classifier import ClassifierTask
from lit_purify.tasks.denoiser import DenoiserTask
from lit_purify.tasks.frontier import FrontierTask
from lit_purify.tasks.robustness import RobustnessTask
from lit_purify.tasks.training import TrainingTask

__all__ = ["ClassifierTask", "DenoiserTask", "FrontierTask", "RobustnessTask", "TrainingTask"]
