"""From a config to the pieces the loops move: the floor under train.py and evaluate.py."""

from ntkrl.assembly.collect import Collected, collect, draw_probe_set, evaluate, make_sample
from ntkrl.assembly.preferences import PreferenceSource
from ntkrl.assembly.settings import RunSettings, read_settings
from ntkrl.assembly.setup import Prompts, Setup, Start, assemble, assemble_model, check_vocabulary
from ntkrl.assembly.sources import RolloutSource, SupervisedSource

SOURCES = {"rl": RolloutSource, "sft": SupervisedSource, "reward": PreferenceSource}

__all__ = [
    "SOURCES",
    "Collected",
    "PreferenceSource",
    "Prompts",
    "RolloutSource",
    "RunSettings",
    "Setup",
    "Start",
    "SupervisedSource",
    "assemble",
    "assemble_model",
    "check_vocabulary",
    "collect",
    "draw_probe_set",
    "evaluate",
    "make_sample",
    "read_settings",
]
