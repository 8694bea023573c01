"""Prompts → completions, with what was recorded while drawing them."""

from ntkrl.rollout.external import ExternalSampler, load_engine
from ntkrl.rollout.sample import Sampler, check_length
from ntkrl.rollout.settings import RolloutSettings, SamplerSettings

__all__ = ["ExternalSampler", "RolloutSettings", "Sampler", "SamplerSettings", "check_length", "load_engine"]
