"""Evaluation of defenses under attacks: the evaluator, its records and the run folder."""

from lit_purify.evaluation.evaluator import Evaluator
from lit_purify.evaluation.ledger import Ledger, View
from lit_purify.evaluation.module import EvaluationListener, RobustnessTask
from lit_purify.evaluation.records import Record, read_records

__all__ = ["EvaluationListener", "Evaluator", "Ledger", "Record", "RobustnessTask", "View", "read_records"]
