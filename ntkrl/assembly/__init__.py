"""From a config to the pieces the loops move: the floor under train.py and evaluate.py."""

from ntkrl.assembly.against import mean_interval
from ntkrl.assembly.collect import Collected, collect
from ntkrl.assembly.evaluation import (
    Evaluated,
    evaluate,
    make_evaluation_sample,
    prompts_together,
)
from ntkrl.assembly.keeping import Keeper, best_of
from ntkrl.assembly.preferences import PreferenceSource
from ntkrl.assembly.rewards import Problems, is_code, reward_set
from ntkrl.assembly.rollouts import RolloutSource
from ntkrl.assembly.schedule import due
from ntkrl.assembly.settings import RunSettings, read_settings
from ntkrl.assembly.setup import Prompts, Setup, Start, assemble, assemble_model, check_vocabulary
from ntkrl.assembly.sources import SupervisedSource, Turn
from ntkrl.assembly.states import States
from ntkrl.assembly.steps import jitted_step
from ntkrl.assembly.watching import Watcher, bare

SOURCES = {"rl": RolloutSource, "sft": SupervisedSource, "reward": PreferenceSource}

__all__ = [
    "SOURCES",
    "Collected",
    "Evaluated",
    "Keeper",
    "PreferenceSource",
    "Problems",
    "Prompts",
    "RolloutSource",
    "RunSettings",
    "Setup",
    "Start",
    "States",
    "SupervisedSource",
    "Turn",
    "Watcher",
    "bare",
    "assemble",
    "assemble_model",
    "best_of",
    "check_vocabulary",
    "collect",
    "due",
    "evaluate",
    "is_code",
    "jitted_step",
    "make_evaluation_sample",
    "mean_interval",
    "prompts_together",
    "read_settings",
    "reward_set",
]
