"""Prompts → completions with their log-probs: a sampler on the mesh, or an external engine."""

from ntkrl.rollout.exact import ExactSampler, UpdateReading
from ntkrl.rollout.external import ExternalSampler, load_engine
from ntkrl.rollout.rollout_mesh import DecodingWork, make_rollout_mesh
from ntkrl.rollout.sampler import Sampler, check_length
from ntkrl.rollout.settings import RolloutSettings, SamplerSettings
