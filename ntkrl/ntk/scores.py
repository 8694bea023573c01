"""The scalar kernel of score functions: Gram matrices of ∇ log π of realised tokens."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl.ntk.contexts import Contexts
from ntkrl.ntk.make import kernel
from ntkrl.ntk.network import Network
from ntkrl.types import Array, Params, Policy


def score_gram(
    model: Policy | Network,
    params: Params,
    contexts: Contexts,
    targets: Array,
    *,
    weights: Array | None = None,
    by: str = "context",
    part: str = "full",
    chunk: int | None = None,
    **settings: Any,
) -> Array:
    """Return ⟨∇ log π(y_o | c_o), ∇ log π(y_u | c_u)⟩ for all pairs of contexts or sequences.

    Equal to g_oᵀ K(o, u) g_u with g = e_y − π, without any gradient per token in memory: at most
    `chunk` cotangents per layer are held at a time.

    >>> every = ntk.every_position(tokens[:, :-1])
    >>> gram = ntk.score_gram(policy, params, every, tokens[:, 1:].ravel())
    >>> gram.shape
    (6, 6)

    Args:
      model, params: as for `ntk.kernel`.
      contexts: O contexts, for instance `ntk.every_position(tokens, mask)`.
      targets: `[O]` int token whose log-prob is meant, in [0, V).
      weights: `[O]` factors on the score functions (advantages); None for ones.
      by: "context" for all pairs of contexts; "sequence" for pairs of sequences, each the weighted
        sum over its contexts, at one VJP a sequence.
      part: a part or group.
      chunk: directions taken at a time; None for as many as memory allows.
      **settings: `groups`, `precondition`, `algorithm`, `forward_mode`, `memory_gib` of
        `ntk.kernel`.

    Returns:
      `[O, O]`, or `[N', N']` for the N' rows that have contexts, in their order.

    Raises:
      ValueError: targets or weights that do not fit, and what `ntk.kernel` raises.
    """
    found = kernel(model, params, contexts, **settings)
    targets, count = np.asarray(targets), found.observed.count
    if targets.shape != (count,) or not np.issubdtype(targets.dtype, np.integer):
        raise ValueError(
            f"targets must be {count} token ids, one per context, not {targets.dtype} "
            f"{targets.shape}."
        )
    if targets.min() < 0 or targets.max() >= found.vocab_size:
        raise ValueError(
            f"targets hold ids from {targets.min()} to {targets.max()}; the vocabulary is "
            f"[0, {found.vocab_size})."
        )
    if weights is not None and jnp.shape(weights) != (count,):
        raise ValueError(f"weights must have shape ({count},), not {jnp.shape(weights)}.")
    found.afford(count * found.vocab_size, "the scores' softmax", "fewer contexts")
    scores_OV = _scores(found.network, params, found.readings[0].features, targets, weights)
    return found.bilinear(scores_OV, scores_OV, part, by=by, chunk=chunk)


@functools.partial(jax.jit, static_argnames=("network",))
def _scores(
    network: Network, params: Params, features_OD: Array, targets_O: Array, weights_O: Array | None
) -> Array:
    probs_OV = jax.nn.softmax(network.logits(params, features_OD), axis=-1)
    scores_OV = jax.nn.one_hot(targets_O, probs_OV.shape[-1], dtype=probs_OV.dtype) - probs_OV
    return scores_OV if weights_O is None else scores_OV * weights_O[:, None]
