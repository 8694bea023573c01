"""Rewards: Python functions under TRL's contract, built-in ones, reward models, their weighted sum.

Completions are never executed. A function that hangs, dies or returns anything but numbers stops
the run with a message that names it, its file and the row, or counts as the configured default.
User functions run in worker processes, which import this room without JAX: `RewardModel`,
`RewardTexts` and `padded_batch_size` are loaded on first use.
"""

from typing import Any

from ntkrl.reward.built_in import (
    BUILT_IN,
    evaluate,
    expression_score,
    final_answer,
)
from ntkrl.reward.contract import RewardFunction, TrainerState
from ntkrl.reward.in_process import IN_PROCESS, open_callable
from ntkrl.reward.loading import load_function, open_function
from ntkrl.reward.options import fit_budget
from ntkrl.reward.reward_set import (
    RewardResult,
    RewardSet,
    completion_values,
    read_normalisation,
    read_rewards,
    write_rewards,
)
from ntkrl.reward.settings import RewardSettings

_NEEDS_JAX = ("RewardModel", "RewardTexts", "padded_batch_size")

__all__ = [
    "BUILT_IN",
    "IN_PROCESS",
    "RewardFunction",
    "RewardResult",
    "RewardSet",
    "RewardSettings",
    "TrainerState",
    "completion_values",
    "evaluate",
    "expression_score",
    "final_answer",
    "fit_budget",
    "load_function",
    "open_callable",
    "open_function",
    "read_normalisation",
    "read_rewards",
    "write_rewards",
    *_NEEDS_JAX,
]


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_JAX:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ntkrl.reward import reward_models

    return getattr(reward_models, name)
