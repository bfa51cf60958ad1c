"""What is measured: a record for each sample, and accuracies over records."""

from lit_purify.metrics.records import Record, read_records
from lit_purify.metrics.robust_accuracy import RobustAccuracy

__all__ = ["Record", "RobustAccuracy", "read_records"]
