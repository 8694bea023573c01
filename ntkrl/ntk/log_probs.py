"""First-order changes of log-probs by parameter group, and the kernel of their gradients.

Δ log π(·|o) = T(o) J(o) u + O(‖u‖²), T(o) = I − 1π(c)ᵀ. Linear in u, so it splits exactly over
any partition of the parameters; u may be a gradient step or the update of any optimizer.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import trees
from ntkrl.ntk.contexts import Contexts, check_contexts, features_at
from ntkrl.ntk.make import kernel
from ntkrl.ntk.network import Network, as_network
from ntkrl.ntk.parts import group_weights, scale_leaves
from ntkrl.numerics import at_least_float32
from ntkrl.types import Array, Params, Policy

BODY_GROUP: trees.Patterns = ((r".*", "body"),)


class TokenChanges(NamedTuple):
    """First-order changes of next-token distributions (nats), `[O]` each.

    log_prob: of the target tokens. entropy: of the distributions. max_log_prob: of their arg-max
    tokens.
    """

    log_prob: Array
    entropy: Array
    max_log_prob: Array


def predict(
    model: Policy | Network,
    params: Params,
    direction: Params,
    observed: Contexts,
    targets: Array | None = None,
    groups: trees.Patterns = BODY_GROUP,
) -> dict[str, Array]:
    """Predict Δ log π of observed contexts, split by group of parameters.

    >>> step = jax.tree.map(lambda leaf: 1e-3 * leaf, params)
    >>> change = ntk.predict(policy, params, step, ntk.last_positions(tokens))
    >>> sorted(change), change["head"].shape[0]
    (['body', 'head'], 2)

    Args:
      model: a Policy, or an `ntk.Network` of your own.
      params: the params tree.
      direction: tree like `params`, the change of the params (for example θ_{t+1} − θ_t).
      observed: O contexts.
      targets: `[O]` int tokens to predict the change of; None for the full vocabulary.
      groups: `(pattern, name)` list that partitions the parameters in their features' role, as for
        `kernel`; the head's role is a group of its own, called "head". A tied matrix counts in
        both.

    Returns:
      `{group: Δ log π}`, `[O]` with targets and `[O, V]` without (nats); the sum over groups is
      the total first-order change.

    Raises:
      ValueError: contexts or targets that do not fit, a direction of another shape, a pattern
        list that does not cover the parameters.
    """
    network, observed, weights = _checked(model, params, direction, observed, targets, groups)
    return _predict(network, params, direction, (observed, targets), weights)


def predict_changes(
    model: Policy | Network,
    params: Params,
    direction: Params,
    observed: Contexts,
    targets: Array,
    groups: trees.Patterns = BODY_GROUP,
) -> dict[str, TokenChanges]:
    """Predict the changes of log π, of the entropy and of the likeliest token, split by group.

    ∂H/∂z = −π (log π + H). Arguments and errors as for `predict`, with targets.

    Returns:
      `{group: TokenChanges}`; the sum over groups is the total first-order change.
    """
    network, observed, weights = _checked(model, params, direction, observed, targets, groups)
    return _predict(network, params, direction, (observed, targets), weights, every=True)


def _checked(
    model: Policy | Network,
    params: Params,
    direction: Params,
    observed: Contexts,
    targets: Array | None,
    groups: trees.Patterns,
) -> tuple[Network, Contexts, dict[str, tuple[Array, ...]]]:
    """Check the arguments of `predict`; return network, contexts and factors of the groups."""
    network = as_network(model)
    observed = check_contexts(observed, "observed", network, params, isinstance(model, Policy))
    if not trees.same_structure(params, direction) or any(
        a.shape != b.shape
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(direction), strict=True)
    ):
        raise ValueError("direction must have the structure and the shapes of params.")
    if targets is not None and tuple(targets.shape) != (observed.count,):
        raise ValueError(
            f"targets must have shape ({observed.count},), not {tuple(targets.shape)}."
        )
    weights = group_weights(groups, network, params)
    if "head" in weights:
        raise ValueError('groups: "head" is the name of the head\'s role; rename the group.')
    return network, observed, weights


@functools.partial(jax.jit, static_argnames=("network", "every"))
def _predict(
    network: Network,
    params: Params,
    direction: Params,
    where: tuple[Contexts, Array | None],
    weights: dict[str, tuple[Array, ...]],
    every: bool = False,
) -> dict[str, Any]:
    """Return of each group Δ log π, or with `every` TokenChanges; where: contexts and targets."""
    observed, targets_O = where
    phi_OD, push_features = jax.linearize(lambda p: features_at(network, p, observed), params)
    logits_OV, push_head = jax.linearize(network.logits, params, phi_OD)
    probs_OV = jax.nn.softmax(logits_OV, axis=-1)

    def read(logit_change_OV: Array) -> Any:
        change_OV = at_least_float32(logit_change_OV)
        mean_O = jnp.sum(probs_OV * change_OV, axis=-1)
        if targets_O is None:
            return change_OV - mean_O[:, None]

        def of_tokens(tokens_O: Array) -> Array:
            return jnp.take_along_axis(change_OV, tokens_O[:, None], axis=-1)[:, 0] - mean_O

        if not every:
            return of_tokens(targets_O)
        # H drops out of ∂H/∂z, as centred changes have the mean 0
        log_probs_OV = jax.nn.log_softmax(at_least_float32(logits_OV), axis=-1)
        centred_OV = change_OV - mean_O[:, None]
        entropy_O = -jnp.sum(probs_OV * log_probs_OV * centred_OV, axis=-1)
        likeliest_O = jnp.argmax(probs_OV, axis=-1)
        return TokenChanges(of_tokens(targets_O), entropy_O, of_tokens(likeliest_O))

    zeros = jax.tree.map(jnp.zeros_like, params)
    changes = {"head": read(push_head(direction, jnp.zeros_like(phi_OD)))}
    leaves, treedef = jax.tree.flatten(direction)
    for group, factors in weights.items():
        group_direction = jax.tree.unflatten(treedef, scale_leaves(leaves, factors))
        changes[group] = read(push_head(zeros, push_features(group_direction)))
    return changes


def score_gram(
    model: Policy | Network,
    params: Params,
    contexts: Contexts,
    targets: Array,
    *,
    weights: Array | None = None,
    by: str = "context",
    **options: Any,
) -> Array:
    """Return ⟨∇ log π(y_o | c_o), ∇ log π(y_u | c_u)⟩ for all pairs of contexts or sequences.

    Equal to g_oᵀ K(o, u) g_u with g = e_y − π, without storing a gradient per token: at most
    `chunk` cotangents per layer exist at a time.

    >>> every = ntk.every_position(tokens[:, :-1])
    >>> gram = ntk.score_gram(policy, params, every, tokens[:, 1:].ravel())
    >>> gram.shape
    (6, 6)

    Args:
      model, params: as for `ntk.kernel`.
      contexts: O contexts, for instance `ntk.every_position(tokens, mask)`.
      targets: `[O]` int token of each log-prob, in [0, V).
      weights: `[O]` factors on the score functions (advantages); None for ones.
      by: "context" for all pairs of contexts; "sequence" for pairs of sequences, each the weighted
        sum over its contexts, at one VJP a sequence.
      **options: `part` and `chunk` of `Kernel.bilinear`; those of `ntk.kernel`.

    Returns:
      `[O, O]`, or `[S, S]` for the S sequences that have contexts, in the order of rows.

    Raises:
      ValueError: targets or weights that do not fit, and the errors of `ntk.kernel`.
    """
    form = {name: options.pop(name) for name in ("part", "chunk") if name in options}
    score_kernel = kernel(model, params, contexts, **options)
    problem, targets_O = score_kernel.problem, np.asarray(targets)
    count, vocab = problem.observed.count, problem.vocab_size
    if targets_O.shape != (count,) or not np.issubdtype(targets_O.dtype, np.integer):
        raise ValueError(
            f"targets must be {count} token ids, one per context, not {targets_O.dtype} "
            f"{targets_O.shape}."
        )
    if targets_O.min() < 0 or targets_O.max() >= vocab:
        raise ValueError(
            f"targets have ids from {targets_O.min()} to {targets_O.max()}; the vocabulary is "
            f"[0, {vocab})."
        )
    if weights is not None and jnp.shape(weights) != (count,):
        raise ValueError(f"weights must have shape ({count},), not {jnp.shape(weights)}.")
    problem.check_size((count, vocab), "the scores' softmax", "fewer contexts")
    features_OD = problem.head_inputs[0].features
    scores_OV = _scores(problem.network, params, features_OD, targets_O, weights)
    return score_kernel.bilinear(scores_OV, scores_OV, by=by, **form)


@functools.partial(jax.jit, static_argnames=("network",))
def _scores(
    network: Network,
    params: Params,
    features_OD: Array,
    targets_O: Array | np.ndarray,
    weights_O: Array | None,
) -> Array:
    probs_OV = jax.nn.softmax(network.logits(params, features_OD), axis=-1)
    scores_OV = jax.nn.one_hot(targets_O, probs_OV.shape[-1], dtype=probs_OV.dtype) - probs_OV
    return scores_OV if weights_O is None else scores_OV * weights_O[:, None]
