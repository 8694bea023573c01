"""What one optimizer step did to the tokens it was taken on: who gained, who carried it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from ntkrl.numerics import masked_total, mean
from ntkrl.probe.confidence import advantage_covariance
from ntkrl.probe.signal import entropy_share
from ntkrl.probe.squeezing import token_masses
from ntkrl.scoring import completion_features, head_of
from ntkrl.types import Array, Params, Policy, UpdateBatch
from ntkrl.vocabulary import token_statistics

TILE = 8192
"""Rows of the vocabulary whose logits exist at a time."""


@functools.partial(jax.jit, static_argnames=("policy", "temperature", "chunk_tokens"))
def step_measures(
    policy: Policy,
    before: Params,
    after: Params,
    batch: UpdateBatch,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> dict[str, Array]:
    """Measure a step on its own batch.

    Args:
      policy: the network's functions.
      before, after: params on either side of the step.
      batch: what it was taken on, not packed.
      temperature: of sampling, > 0.
      chunk_tokens: positions whose logits exist at a time, ≥ 1.

    Returns:
      Scalars: `probe/squeeze_sampled`, `_greedy` and `_others`, mean change (nats) of the log-mass
      of the sampled token, of the likeliest before and of all others, over tokens with A < 0 (0
      without any); `probe/advantage_covariance` and its `_top`; `signal/entropy_share`, of
      A² ‖e_y − π‖² on the top 20 % of tokens by entropy.
    """
    rows, length = batch.completion_mask.shape
    targets_BC, mask = batch.tokens[:, -length:], batch.completion_mask
    heads = [head_of(policy, params) for params in (before, after)]
    features = [
        completion_features(policy, params, batch.tokens, batch.mask, length)
        for params in (before, after)
    ]
    old = token_statistics(heads[0], features[0], targets_BC, temperature, chunk_tokens, TILE)
    masses = [
        token_masses(
            head,
            phi_BCD.reshape(rows * length, -1),
            *(targets_BC.reshape(-1), old.argmax.reshape(-1)),
            *(temperature, min(chunk_tokens, 64), TILE),
        )
        for head, phi_BCD in zip(heads, features, strict=True)
    ]
    pushed_down = (mask & (batch.advantages < 0)).reshape(-1)
    changes = jax.tree.map(jnp.subtract, masses[1], masses[0])._asdict()
    found = {
        f"probe/squeeze_{name}": mean(masked_total(change, pushed_down))
        for name, change in changes.items()
    }
    together = advantage_covariance(old.log_probs, batch.advantages, mask)
    squares_BC = 1 - 2 * jnp.exp(old.log_probs) + old.sum_squares
    amounts_BC = jnp.square(batch.advantages) * squares_BC
    return found | {
        "probe/advantage_covariance": together.mean,
        "probe/advantage_covariance_top": together.top,
        "signal/entropy_share": entropy_share(old.entropy, amounts_BC, mask),
    }
