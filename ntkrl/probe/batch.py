"""What one optimizer step did to the tokens it was taken on: who gained, who carried it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ntkrl.numerics import at_least_float32, masked_total, mean
from ntkrl.probe.confidence import advantage_covariance
from ntkrl.probe.geometry import ches, head_sums
from ntkrl.probe.signal import entropy_share
from ntkrl.probe.squeezing import token_masses
from ntkrl.scoring import completion_features, head_of
from ntkrl.softmax import OutputHead, SoftmaxOptions, token_statistics
from ntkrl.types import Array, Params, Policy, UpdateBatch

TILE = 8192
"""Rows of the vocabulary whose logits exist at a time."""


@functools.partial(jax.jit, static_argnames=("policy", "temperature", "chunk_tokens", "group"))
def step_measures(
    policy: Policy,
    before: Params,
    after: Params,
    batch: UpdateBatch,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    group: int | None = None,
) -> dict[str, Array]:
    """Measure a step on its own batch.

    Args:
      policy: the network's functions.
      before, after: params on either side of the step.
      batch: what it was taken on, not packed.
      temperature: of sampling, > 0.
      chunk_tokens: positions whose logits exist at a time, ≥ 1.
      group: completions of each prompt, in adjacent rows; None where prompts have one.

    Returns:
      Scalars: `probe/squeeze_sampled`, `_greedy` and `_others`, mean change (nats) of the log-mass
      of the sampled token, of the likeliest before and of all others, over tokens with A < 0 (0
      without any); `probe/advantage_covariance` and its `_top`; `signal/entropy_share`, of
      A² ‖e_y − π‖² on the top 20 % of tokens by entropy; with groups those of `group_measures`.
    """
    rows, length = batch.completion_mask.shape
    targets_BC, mask = batch.tokens[:, -length:], batch.completion_mask
    heads = [head_of(policy, params) for params in (before, after)]
    features = [
        completion_features(policy, params, batch.tokens, batch.mask, length)
        for params in (before, after)
    ]
    options = SoftmaxOptions(temperature, chunk_tokens, TILE)
    old = token_statistics(heads[0], features[0], targets_BC, options)
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
    if group is not None:
        read = (heads[0], features[0], targets_BC, batch.advantages, mask)
        found |= group_measures(*read, group, temperature)
    return found | {
        "probe/advantage_covariance": together.mean,
        "probe/advantage_covariance_top": together.top,
        "signal/entropy_share": entropy_share(old.entropy, amounts_BC, mask),
    }


def group_measures(
    head: OutputHead,
    features: Array,
    targets: Array,
    advantages: Array,
    mask: Array,
    group: int,
    temperature: float = 1.0,
) -> dict[str, Array]:
    """Measure what the completions of a prompt do to each other through the head.

    Args:
      head: of the policy before the step.
      features: `[B, C, D]`.
      targets: `[B, C]` tokens.
      advantages: `[B, C]`.
      mask: `[B, C]` completion mask.
      group: N completions of each prompt, in adjacent rows; divides B.
      temperature: of sampling, > 0.

    Returns:
      Scalars: `probe/ches` and `probe/ches_normalised`, mean over prompts of that of its best and
      its worst completion by advantage, prompts of equal advantages apart; and means over tokens o
      of Σ_u A_u I(o, u) over the prompt's own tokens u, see `geometry.head_sums`:
      `probe/head_sum_positive` and `probe/head_sum_negative`, u with A > 0 and A < 0, at tokens
      with A > 0 (their sums over tokens are −GWHES); `probe/head_sum_wrong`, u with A > 0 taken at
      A = 1, at tokens with A < 0 (NTHR). 0 where there is nothing to average.

    Source: Razin et al. 2410.08847; Deng et al. 2505.18830.
    """
    weights_BC = jnp.where(mask, at_least_float32(advantages), 0)
    lengths_B = jnp.sum(mask, axis=1)
    means_B = jnp.sum(weights_BC, axis=1) / jnp.maximum(lengths_B, 1)

    def pairs(extreme: Callable[..., Array], filler: float) -> tuple[Array, Array]:
        means_PN = jnp.where(lengths_B > 0, means_B, filler).reshape(-1, group)
        rows_P = jnp.arange(len(means_PN)) * group + extreme(means_PN, axis=1)
        return rows_P, means_B[rows_P]

    (best_P, high_P), (worst_P, low_P) = pairs(jnp.argmax, -jnp.inf), pairs(jnp.argmin, jnp.inf)
    scores = ches(features[best_P], mask[best_P], features[worst_P], mask[worst_P])
    found = {
        name: mean(masked_total(score_P, high_P > low_P))
        for name, score_P in zip(("ches", "ches_normalised"), scores, strict=True)
    }
    weighed = (features, targets, weights_BC)
    found |= _sums_by_prompt(head, weighed, group, temperature)
    return {f"probe/{name}": value for name, value in found.items()}


def _sums_by_prompt(
    head: OutputHead, weighed: tuple[Array, Array, Array], group: int, temperature: float
) -> dict[str, Array]:
    """Return the means of `head_sums` within prompts; weighed: features, tokens and A `[B, C]`."""
    features, targets, weights_BC = weighed
    positive_BC, negative_BC = jnp.maximum(weights_BC, 0), jnp.minimum(weights_BC, 0)
    given_BCK = jnp.stack([positive_BC, negative_BC, weights_BC > 0], axis=-1)

    def by_prompt(leaf: Array) -> Array:
        return leaf.reshape(-1, group * leaf.shape[1], *leaf.shape[2:])

    def prompt(own: tuple[Array, Array, Array]) -> Array:
        return head_sums(head, *own, temperature, TILE)

    sums_PUK = jax.lax.map(prompt, tuple(map(by_prompt, (features, targets, given_BCK))))
    up_PU, down_PU = by_prompt(weights_BC > 0), by_prompt(weights_BC < 0)
    wanted = (("positive", up_PU), ("negative", up_PU), ("wrong", down_PU))
    return {
        f"head_sum_{name}": mean(masked_total(sums_PUK[..., number], counted_PU))
        for number, (name, counted_PU) in enumerate(wanted)
    }
