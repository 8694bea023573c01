"""The batch source of each training method."""

from ntkrl.training.preference_source import PreferenceSource
from ntkrl.training.rollout_source import RolloutSource
from ntkrl.training.sources import SupervisedSource

BATCH_SOURCES = {"rl": RolloutSource, "sft": SupervisedSource, "reward": PreferenceSource}
