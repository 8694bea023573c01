"""The starting model with diverse features: the moments they are made diverse by."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ntkrl import data, models, trees
from ntkrl.numerics import at_least_float32, einsum
from ntkrl.scoring import completion_features
from ntkrl.settings import RunSettings
from ntkrl.types import Array, Params, Policy, UpdateBatch

MOST_TEXTS, TOGETHER = 4096, 256
"""Texts that are read at most, and at a time."""


def whitened(
    settings: RunSettings, policy: Policy, params: Params, tokenizer: Any, mesh: Mesh
) -> tuple[Policy, Params]:
    """Make features diverse on the texts that `model.whiten` names.

    Raises:
      ValueError: the file is wrong, or what `models.whitened` raises.
    """
    texts = data.read_set(settings.model.whiten, ("prompt", "completion"))
    texts = data.take(texts, range(min(MOST_TEXTS, len(texts.prompts))))
    prompt, completion = settings.data.max_prompt_tokens, settings.rollout.max_completion_tokens
    encoded = data.encode_prompts(tokenizer, texts, prompt)
    # a sampled text may fill the budget, and gets its end token beside
    completions = data.encode_completions(tokenizer, texts, completion + 1)
    lengths = max(map(len, encoded)), max(map(len, completions))
    sums, count = 0.0, 0
    for start in range(0, len(encoded), TOGETHER):
        rows = np.arange(start, min(start + TOGETHER, len(encoded)))
        given = encoded, completions, np.resize(rows, TOGETHER), tokenizer.pad_token_id
        batch = data.supervised_batch(*given, *lengths)
        counted_BC = batch.completion_mask & (np.arange(TOGETHER) < len(rows))[:, None]
        sums += _moments(policy, params, batch, counted_BC)
        count += int(jnp.sum(counted_BC))
    policy, params = models.whitened(policy, params, sums / count)
    return policy, jax.device_put(params, trees.shardings(params, policy.sharding, mesh))


@functools.partial(jax.jit, static_argnames=("policy",))
def _moments(policy: Policy, params: Params, batch: UpdateBatch, counted: Array) -> Array:
    """Return the sum of φ φᵀ over tokens that count, `[D, D]`."""
    length = batch.completion_mask.shape[1]
    phi_BCD = completion_features(policy, params, batch.tokens, batch.mask, length)
    kept_BCD = at_least_float32(phi_BCD) * counted[..., None]
    return einsum("bcd,bce->de", kept_BCD, kept_BCD)
