"""The command lines; only this folder reads arguments and the environment."""

import os

# Must be set before torch is imported: hides C++ stacks after a lost connection.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from lit_purify.cli.evaluation import evaluate
from lit_purify.cli.training import train

__all__ = ["evaluate", "train"]
