"""The command line: the only place that reads arguments and the environment."""

from lit_purify.cli.evaluation import evaluate
from lit_purify.cli.training import train

__all__ = ["evaluate", "train"]
