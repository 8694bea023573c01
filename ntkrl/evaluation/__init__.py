"""Metrics over sampled completions, and their comparison with a base policy."""

from ntkrl.evaluation.comparison import mean_interval
from ntkrl.evaluation.sampling import (
    Evaluated,
    evaluate_policy,
    make_evaluation_sample,
    prompts_together,
)

__all__ = [
    "Evaluated",
    "evaluate_policy",
    "make_evaluation_sample",
    "mean_interval",
    "prompts_together",
]
