"""PromptBatch → Rollout by cached sampling. Knows no reward and no loss."""

from ntkrl.rollout.sample import SamplerSettings, make_sampler

__all__ = ["SamplerSettings", "make_sampler"]
