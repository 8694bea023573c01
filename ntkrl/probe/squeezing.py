"""Probability mass moved by an update: factors of the change, and masses by token."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ntkrl.numerics import at_least_float32, einsum
from ntkrl.probe.distributions import sum_over_tiles, tile_log_probs
from ntkrl.softmax import DEFAULT_OPTIONS, OutputHead, SoftmaxOptions
from ntkrl.types import Array


class AKGFactors(NamedTuple):
    """Δ log π(·|o) = η 𝒜(o) K(o, u) 𝒢(u) to first order, for one o and one u.

    adjust: 𝒜 = I − 1 π(o)ᵀ `[V, V]`, from logits to log-probs.
    kernel: K(o, u) `[V, V]`.
    residual: 𝒢 = A (e_y − π(u)) `[V]`, ascent direction of the objective in the logits at u.
    change: their product `[V]`, for η = 1 (nats).
    """

    adjust: Array
    kernel: Array
    residual: Array
    change: Array


@jax.jit
def akg_factors(
    observed: Array, kernel: Array, updated: Array, target: Array, advantage: Array
) -> AKGFactors:
    """Decompose the change of a probe token's distribution by one update token.

    Linear in the kernel: pass the dense head, body or cross part for its share.

    Args:
      observed, updated: logits at o and at u `[V]`.
      kernel: K(o, u) `[V, V]`, a block of `ntk.Kernel.dense`.
      target: y, the token at u.
      advantage: A, the weight on its score function; 1 for supervised training.

    Source: Ren & Sutherland 2407.10490, proposition 1.
    """
    pi_V = jax.nn.softmax(at_least_float32(observed))
    size = pi_V.shape[0]
    adjust_VV = jnp.eye(size, dtype=pi_V.dtype) - jnp.broadcast_to(pi_V[None], (size, size))
    score_V = jax.nn.one_hot(target, size, dtype=pi_V.dtype)
    residual_V = advantage * (score_V - jax.nn.softmax(at_least_float32(updated)))
    change_V = einsum("vw,wx,x->v", adjust_VV, kernel, residual_V)
    return AKGFactors(adjust_VV, kernel, residual_V, change_V)


class Masses(NamedTuple):
    """Log-probability by token at each position; all `[O]` (nats).

    sampled: log π of the sampled token.
    greedy: log π of the token that was likeliest before the update.
    others: log of the mass of all other tokens.
    """

    sampled: Array
    greedy: Array
    others: Array


@functools.partial(jax.jit, static_argnames=("options",))
def token_masses(
    head: OutputHead,
    features: Array,
    sampled: Array,
    greedy: Array,
    options: SoftmaxOptions = DEFAULT_OPTIONS,
) -> Masses:
    """Compute the three masses, by tiles; `others` is a sum and not 1 less the other two.

    Args:
      head, features: the head's arrays, and `[O, D]`.
      sampled, greedy: `[O]` int tokens y, and y* that were likeliest before the update.
      options: temperature and chunk sizes.
    """

    def position(operands: tuple[Array, Array, Array]) -> Masses:
        phi_D, y, best = operands
        log_probs = tile_log_probs(head, phi_D, options)

        def term(number: Array) -> Masses:
            tile, log_pi_R = log_probs(number)
            ids_R = tile.start + jnp.arange(log_pi_R.shape[0])
            is_y_R, is_best_R = tile.fresh & (ids_R == y), tile.fresh & (ids_R == best)
            return Masses(
                jnp.sum(jnp.where(is_y_R, log_pi_R, 0)),
                jnp.sum(jnp.where(is_best_R, log_pi_R, 0)),
                jnp.sum(jnp.where(is_y_R | is_best_R, 0, jnp.exp(log_pi_R))),
            )

        masses = sum_over_tiles(term, head, options.chunk_vocabulary)
        return masses._replace(others=jnp.log(masses.others))

    return jax.lax.map(position, (features, sampled, greedy), batch_size=options.chunk_tokens)


@jax.jit
def squeezing(
    before: Masses, after: Masses, advantages: Array, edges: Sequence[float] = (0.1, 0.5, 0.9)
) -> dict[str, Array]:
    """Average the changes of the three masses by sign of the advantage and by π(y) before.

    Squeezing is: a negative advantage on an unlikely y moves mass to the arg max, so that
    `greedy` rises while `sampled` and `others` fall in the first row.

    Args:
      before, after: of the same O positions and tokens on either side of an update.
      advantages: `[O]` of the sampled tokens; positions with 0 are left out.
      edges: k rising probabilities that cut [0, 1] in k + 1 bins, each with its lower edge.

    Returns:
      `[2, k + 1]` arrays, first row A < 0, second A > 0: `tokens` (count), and mean changes
      `sampled`, `greedy`, `others` (nats), 0 where a bin is empty.

    Source: Ren & Sutherland 2407.10490, section 3.3; bins ours.
    """
    bins_O = jnp.searchsorted(jnp.asarray(edges), jnp.exp(before.sampled), side="right")
    of_sign_2O = jnp.stack([advantages < 0, advantages > 0])
    in_bin_KO = bins_O[None] == jnp.arange(len(edges) + 1)[:, None]
    cells_2KO = of_sign_2O[:, None] & in_bin_KO[None]
    tokens_2K = jnp.sum(cells_2KO, axis=-1)
    changes = jax.tree.map(jnp.subtract, after, before)._asdict()
    means = {
        name: jnp.sum(jnp.where(cells_2KO, change_O[None, None], 0), axis=-1)
        / jnp.maximum(tokens_2K, 1)
        for name, change_O in changes.items()
    }
    return {"tokens": tokens_2K, **means}
