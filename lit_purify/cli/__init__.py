"""The command line: the only place that reads arguments and the environment."""

import os

# Before torch is imported: a lost connection is reported in one line, not in C++ stacks as well.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from lit_purify.cli.evaluation import evaluate
from lit_purify.cli.training import train

__all__ = ["evaluate", "train"]
