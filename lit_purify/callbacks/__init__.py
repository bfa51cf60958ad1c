"""Callbacks that write files, show progress and log to W&B while a task runs."""

from lit_purify.callbacks.progress import Progress
from lit_purify.callbacks.run_writer import RunWriter
from lit_purify.callbacks.stopping import Stopping
from lit_purify.callbacks.wandb_report import WandbReport
from lit_purify.callbacks.wandb_run import WandbRun, WandbTraining

__all__ = ["Progress", "RunWriter", "Stopping", "WandbReport", "WandbRun", "WandbTraining"]
