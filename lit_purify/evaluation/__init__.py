"""Evaluating defenses under attacks: the evaluator, its records, the folder of a run."""

from lit_purify.evaluation.frontier import FrontierTask
from lit_purify.evaluation.metric import RobustAccuracy
from lit_purify.evaluation.module import RobustnessTask
from lit_purify.evaluation.records import Record, read_records

__all__ = ["FrontierTask", "Record", "RobustAccuracy", "RobustnessTask", "read_records"]
