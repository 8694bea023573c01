"""Metrics over sampled completions, and their comparison with a base policy."""

from ntkrl.evaluation.comparison import mean_interval, powers
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
    "powers",
    "prompts_together",
]
