"""From settings to the model, prompts and rewards of a run, checked before anything is traced."""

from ntkrl.setup.assemble import Prompts, Setup, Start, assemble, assemble_model, check_vocabulary
from ntkrl.setup.rewards import Problems, is_code, reward_set

__all__ = [
    "Problems",
    "Prompts",
    "Setup",
    "Start",
    "assemble",
    "assemble_model",
    "check_vocabulary",
    "is_code",
    "reward_set",
]
