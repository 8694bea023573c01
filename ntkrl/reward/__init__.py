"""Rewards: Python functions under TRL's contract, checked, weighted and summed.

Promises: a function that raises or returns anything but numbers stops the run with a message
that names it, its file and the row; completions are never evaluated as code. Imports nothing
else of this package.
"""

from ntkrl.reward.expressions import evaluate, score
from ntkrl.reward.functions import RewardFunction, RewardResult, RewardSet
from ntkrl.reward.loading import load_function

__all__ = [
    "RewardFunction",
    "RewardResult",
    "RewardSet",
    "evaluate",
    "load_function",
    "score",
]
