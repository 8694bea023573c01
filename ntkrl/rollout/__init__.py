"""Prompts → completions, with what was recorded while drawing them."""

from ntkrl.rollout.external import ExternalSampler, load_engine
from ntkrl.rollout.sample import FEWEST_ROWS, Sampler
from ntkrl.rollout.settings import SamplerSettings

__all__ = ["FEWEST_ROWS", "ExternalSampler", "Sampler", "SamplerSettings", "load_engine"]
