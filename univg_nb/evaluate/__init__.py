"""Evaluation: replies of a model to a benchmark, and their scores.

`generate` records replies, `score` and `compare` turn them into numbers with
intervals, `benchmarks` does both for the models of a run.
"""

from univg_nb.evaluate.intervals import mcnemar_test, paired_bootstrap, wilson_interval
from univg_nb.evaluate.predictions import Reply, read_predictions

__all__ = [
    "Reply",
    "mcnemar_test",
    "paired_bootstrap",
    "read_predictions",
    "wilson_interval",
]
