"""The training loop and its batch sources, train state, checkpoints and probe hook."""

from ntkrl.training.batch_sources import BATCH_SOURCES
from ntkrl.training.checkpointing import RunCheckpointer
from ntkrl.training.loop import train
from ntkrl.training.preference_source import PreferenceSource
from ntkrl.training.probe_hook import ProbeHook, bare
from ntkrl.training.rollout_source import RolloutSource
from ntkrl.training.sources import StepContext, SupervisedSource
from ntkrl.training.states import States
from ntkrl.training.steps import jitted_step

__all__ = [
    "BATCH_SOURCES",
    "PreferenceSource",
    "ProbeHook",
    "RolloutSource",
    "RunCheckpointer",
    "States",
    "StepContext",
    "SupervisedSource",
    "bare",
    "jitted_step",
    "train",
]
