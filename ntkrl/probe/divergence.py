"""How far two policies are apart on given contexts, token by token."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ntkrl.probe.tiles import log_probs_by_tile, sum_over_tiles
from ntkrl.softmax import OutputHead
from ntkrl.types import Array


class Divergences(NamedTuple):
    """Distances of the next-token distributions π and ρ at each position; all `[O]`.

    kl: KL(π‖ρ) (nats, ≥ 0).
    kl_reverse: KL(ρ‖π) (nats, ≥ 0).
    total_variation: ½ Σ_v |π_v − ρ_v|, in [0, 1].
    """

    kl: Array
    kl_reverse: Array
    total_variation: Array


def divergences(
    policy: tuple[OutputHead, Array],
    other: tuple[OutputHead, Array],
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    chunk_vocabulary: int | None = None,
) -> Divergences:
    """Compare two policies at O positions, whose logits exist for a tile at a time.

    With ρ the policy before training, `kl_reverse` has the order of RL's razor: base first.

    Args:
      policy: head and features `[O, D]` of π.
      other: head and features `[O, D']` of ρ, over the same vocabulary.
      temperature: divides the logits of both; > 0.
      chunk_tokens: positions whose logits exist at a time, ≥ 1.
      chunk_vocabulary: vocabulary rows whose logits exist at a time, ≥ 1; None for all.

    Returns:
      Divergences of `[O]` arrays.

    Raises:
      ValueError: different vocabularies or numbers of positions.

    Source: Shenfeld et al. 2509.04259 (forgetting tracks KL on the new task).
    """
    sizes = [(head.weight.shape[0], features.shape[0]) for head, features in (policy, other)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"policies differ in vocabulary or positions: (V, O) is {sizes[0]} and {sizes[1]}."
        )
    return _divergences(policy, other, temperature, chunk_tokens, chunk_vocabulary)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _divergences(
    policy: tuple[OutputHead, Array],
    other: tuple[OutputHead, Array],
    temperature: float,
    chunk_tokens: int,
    chunk_vocabulary: int | None,
) -> Divergences:
    heads = policy[0], other[0]

    def position(features: tuple[Array, Array]) -> Divergences:
        log_pi, log_rho = (
            log_probs_by_tile(head, phi_D, temperature, chunk_vocabulary)
            for head, phi_D in zip(heads, features, strict=True)
        )

        def term(number: Array) -> Divergences:
            here_R, there_R = log_pi(number)[1], log_rho(number)[1]
            pi_R, rho_R = jnp.exp(here_R), jnp.exp(there_R)
            return Divergences(
                _weighed(pi_R, here_R - there_R),
                _weighed(rho_R, there_R - here_R),
                0.5 * jnp.sum(jnp.abs(pi_R - rho_R)),
            )

        return sum_over_tiles(term, heads[0], chunk_vocabulary)

    return jax.lax.map(position, (policy[1], other[1]), batch_size=chunk_tokens)


def _weighed(probs_R: Array, gap_R: Array) -> Array:
    # where: a token without mass adds nothing, whatever its gap
    return jnp.sum(jnp.where(probs_R > 0, probs_R * gap_R, 0))
