"""Rewards: Python functions under TRL's contract, verifiers, reward models, weighted and summed.

Promises: completions are never evaluated as code; a function that hangs, dies or returns anything
but numbers stops the run with a message that names it, its file and the row, or counts as the
default the config gives. Users' functions run in processes of their own, which import this room
without JAX: what needs it (`reward.networks`) is imported by its own name.
"""

from ntkrl.reward.expressions import evaluate, score
from ntkrl.reward.functions import RewardFunction, RewardResult, RewardSet
from ntkrl.reward.loading import load_function, open_function
from ntkrl.reward.normalisation import read_normalisation, read_rewards, write_rewards
from ntkrl.reward.settings import RewardSettings
from ntkrl.reward.verifiers import BUILT_IN, final_answer

__all__ = [
    "BUILT_IN",
    "RewardFunction",
    "RewardResult",
    "RewardSet",
    "RewardSettings",
    "evaluate",
    "final_answer",
    "load_function",
    "open_function",
    "read_normalisation",
    "read_rewards",
    "score",
    "write_rewards",
]
