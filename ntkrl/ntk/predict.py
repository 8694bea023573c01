"""First-order change of log-probs along any direction in parameter space, by group.

Δ log π(·|o) = T(o) J(o) u + O(‖u‖²), T(o) = I − 1π(c)ᵀ. Linear in u, so it splits exactly over
any partition of the parameters; u may be a gradient step or what an optimizer really did.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from ntkrl import trees
from ntkrl.ntk.contexts import Contexts, check_contexts, features_at
from ntkrl.ntk.gradients import weighted
from ntkrl.ntk.network import Network, as_network
from ntkrl.ntk.parts import group_weights
from ntkrl.numerics import at_least_float32
from ntkrl.types import Array, Params, Policy

BODY_GROUP: trees.Patterns = ((r".*", "body"),)


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
      targets: `[O]` int tokens whose change is wanted; None for the whole vocabulary.
      groups: `(pattern, name)` list that divides the parameters in their features' role, as for
        `kernel`; the head's role is a group of its own, called "head". A tied matrix counts in
        both.

    Returns:
      `{group: Δ log π}`, `[O]` with targets and `[O, V]` without (nats); the sum over groups is
      the whole first-order change.

    Raises:
      ValueError: contexts or targets that do not fit, a direction of another shape, a pattern
        list that does not cover the parameters.
    """
    network = as_network(model)
    observed = check_contexts(observed, "observed", network, params, isinstance(model, Policy))
    same = jax.tree.structure(params) == jax.tree.structure(direction)
    if not same or any(
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
        raise ValueError('groups: "head" names the head\'s role itself; call the group otherwise.')
    return _predict(network, params, direction, observed, targets, weights)


@functools.partial(jax.jit, static_argnames=("network",))
def _predict(
    network: Network,
    params: Params,
    direction: Params,
    observed: Contexts,
    targets_O: Array | None,
    weights: dict[str, tuple[Array, ...]],
) -> dict[str, Array]:
    phi_OD, push_features = jax.linearize(lambda p: features_at(network, p, observed), params)
    logits_OV, push_head = jax.linearize(network.logits, params, phi_OD)
    probs_OV = jax.nn.softmax(logits_OV, axis=-1)

    def log_prob_change(logit_change_OV: Array) -> Array:
        change_OV = at_least_float32(logit_change_OV)
        centre_O = jnp.sum(probs_OV * change_OV, axis=-1)
        if targets_O is None:
            return change_OV - centre_O[:, None]
        return jnp.take_along_axis(change_OV, targets_O[:, None], axis=-1)[:, 0] - centre_O

    still = jax.tree.map(jnp.zeros_like, params)
    changes = {"head": log_prob_change(push_head(direction, jnp.zeros_like(phi_OD)))}
    leaves, treedef = jax.tree.flatten(direction)
    for group, factors in weights.items():
        moved = jax.tree.unflatten(treedef, weighted(leaves, factors))
        changes[group] = log_prob_change(push_head(still, push_features(moved)))
    return changes
