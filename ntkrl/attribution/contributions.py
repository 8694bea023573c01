"""What changes of the params do to the probe tokens' log-prob and entropy, to first order.

With c the cotangents of a token's logits, e_y − π for log π(y) and −π (log π + H) for H, a change
(dW, dθ) of the head's and the features' role changes them by  c'ᵀ (dW φ + db) + (Wᵀc')ᵀ J_φ dθ,
c' the cotangent before the head's cap. The second part, of every group of parameters, in two forms:

    push    J_φ dθ by one JVP over the probe set per change and group
    gram    ⟨J_φᵀ Wᵀc', dθ⟩ with the gradients of all probe tokens written out, groups by leaf
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import ntk, trees
from ntkrl.ntk import Network, as_network, features_at, group_weights
from ntkrl.numerics import at_least_float32, einsum
from ntkrl.types import Array, Params, Policy

MEASURES = ("log_prob", "entropy")


class Members(NamedTuple):
    """Which parameters belong to which group, in leaf order of the trained leaves; static.

    names: of the G groups.
    body: per leaf whether features depend on it.
    groups: per leaf the index of its group, or one index per layer.
    """

    names: tuple[str, ...]
    body: tuple[bool, ...]
    groups: tuple[tuple[int, ...], ...]

    @property
    def used(self) -> tuple[tuple[int, ...], ...]:
        """Groups of the leaves that features depend on."""
        return tuple(own for own, used in zip(self.groups, self.body, strict=True) if used)


def members_of(
    groups: trees.Patterns, policy: Policy, params: Params, trained: Sequence[bool]
) -> Members:
    """Return the groups of the trained leaves.

    Raises:
      ValueError: a group called "head", or what `trees.match` raises.
    """
    weights = group_weights(groups, as_network(policy), params)
    if "head" in weights:
        raise ValueError('groups: "head" names the head\'s role itself; call the group otherwise.')
    per_leaf = zip(*jax.device_get(list(weights.values())), strict=True)
    found = []
    for flags, keep in zip(per_leaf, trained, strict=True):
        own = tuple(int(g) for g in np.argmax(np.stack([f.ravel() for f in flags]), axis=0))
        if keep:
            found.append(own[:1] if len(set(own)) == 1 else own)
    names = [n for n, keep in zip(trees.names(params), trained, strict=True) if keep]
    apart = () if policy.tied else (policy.head_weight, policy.head_bias)
    return Members(tuple(weights), tuple(name not in apart for name in names), tuple(found))


class Side(NamedTuple):
    """The probe tokens under the params before.

    values: `[2, O]` MEASURES.
    features: `[O, D]`.
    head: `[2, O, V]` cotangents of W φ + b.
    body: `[2, O, D]` cotangents of φ.
    """

    values: Array
    features: Array
    head: Array
    body: Array


def side_of(network: Network, params: Params, phi_OD: Array, targets: Array) -> Side:
    """Read the probe tokens' features, and how measures change with the head and the features."""
    log_pi_OV = jax.nn.log_softmax(network.logits(params, phi_OD), axis=-1)
    pi_OV = jnp.exp(log_pi_OV)
    entropy_O = -jnp.sum(pi_OV * log_pi_OV, axis=-1)
    log_probs_O = jnp.take_along_axis(log_pi_OV, targets[:, None], axis=-1)[:, 0]
    score_OV = jax.nn.one_hot(targets, pi_OV.shape[-1], dtype=pi_OV.dtype) - pi_OV
    falls_OV = -pi_OV * (log_pi_OV + entropy_O[:, None])
    head_AOV = jnp.stack([score_OV, falls_OV]) * network.slopes(params, phi_OD)[None]
    weight_VD = network.weight(params).astype(head_AOV.dtype)
    return Side(
        jnp.stack([log_probs_O, entropy_O]),
        at_least_float32(phi_OD),
        head_AOV,
        einsum("aov,vd->aod", head_AOV, weight_VD),
    )


def by_head(network: Network, side: Side, changes: Params) -> Array:
    """Return `[2, O, K]` of K changes of the head's role (trained leaves, K in front)."""
    named, found = trees.named_leaves(changes), jnp.zeros((), side.head.dtype)
    count = next(iter(named.values())).shape[0]
    if network.head.weight in named:
        weight_KVD = at_least_float32(named[network.head.weight])
        logits_KOV = einsum("kvd,od->kov", weight_KVD, side.features)
        found = found + einsum("aov,kov->aok", side.head, logits_KOV)
    if network.head.bias in named:
        bias_KV = at_least_float32(named[network.head.bias])
        found = found + einsum("aov,kv->aok", side.head, bias_KV)
    return jnp.broadcast_to(found, (*side.head.shape[:2], count))


def linearised(
    network: Network, chosen: Params, rest: Params, contexts: ntk.Contexts
) -> tuple[Array, Callable[[Params], Array]]:
    """Return the features `[O, D]` at the contexts, and what a change of `chosen` does to them."""
    return jax.linearize(lambda c: features_at(network, trees.merge(c, rest), contexts), chosen)


def pusher(
    members: Members, push: Callable[[Params], Array], side: Side
) -> Callable[[Params], Array]:
    """Return the map from K changes to `[G, 2, O, K]`, by JVPs (`push`, see `linearised`)."""
    held = sorted({group for own in members.used for group in own})
    if not held:
        return lambda changes: jnp.zeros(
            (len(members.names), *side.head.shape[:2], len(jax.tree.leaves(changes)[0])),
            side.head.dtype,
        )

    def one(change: Params) -> Array:
        leaves, treedef = jax.tree.flatten(change)

        def group(number: Array) -> Array:
            own = [
                leaf * _flags(of, number, leaf).astype(leaf.dtype)
                for leaf, of in zip(leaves, members.groups, strict=True)
            ]
            moved_OD = at_least_float32(push(jax.tree.unflatten(treedef, own)))
            return einsum("aod,od->ao", side.body, moved_OD)

        found = jnp.zeros((len(members.names), *side.head.shape[:2]), side.head.dtype)
        return found.at[np.asarray(held)].set(jax.vmap(group)(jnp.asarray(held)))

    return jax.vmap(one, out_axes=-1)


def gradients(
    network: Network,
    members: Members,
    chosen: Params,
    rest: Params,
    sequences: tuple[Array, Array, Array, Array],
) -> list[Array]:
    """Return the gradients of probe tokens' measures: leaves `[S·P·2, …]` of the features' role.

    Args:
      network, members, chosen, rest: as elsewhere.
      sequences: tokens and mask `[S, T]`, positions `[S, P]` and cotangents of the features there
        `[S, P, 2, D]`.
    """
    body, other = trees.partition(chosen, members.body)

    def sequence(given: tuple[Array, Array, Array, Array]) -> Params:
        tokens, mask, positions_P, pull_PAD = given

        def read(own: Params) -> Array:
            params = trees.merge(trees.merge(own, other), rest)
            return network.read(params, tokens[None], mask[None])[0]

        phi_TD, back = jax.vjp(read, body)

        def token(position: Array, pull_D: Array) -> Params:
            return back(jnp.zeros_like(phi_TD).at[position].set(pull_D.astype(phi_TD.dtype)))[0]

        return jax.vmap(jax.vmap(token, (None, 0)))(positions_P, pull_PAD)

    # one after another: a fifth faster than together on a CPU, whose caches they fill
    found = jax.lax.map(sequence, sequences)
    return [leaf.reshape(-1, *leaf.shape[3:]) for leaf in jax.tree.leaves(found)]


def against(members: Members, rows: Sequence[Array], changes: Params) -> Array:
    """Return `[G, R, K]`: gradients of R rows times K changes, by group."""
    body, _ = trees.partition(changes, members.body)
    leaves, found = jax.tree.leaves(body), []
    for row, change, own in zip(rows, leaves, members.used, strict=True):
        row_RLM = at_least_float32(row).reshape(row.shape[0], len(own), -1)
        change_KLM = at_least_float32(change).reshape(change.shape[0], len(own), -1)
        layer_LRK = einsum("rlm,klm->lrk", row_RLM, change_KLM)
        belongs_GL = np.arange(len(members.names))[:, None] == np.asarray(own)[None]
        found.append(einsum("gl,lrk->grk", jnp.asarray(belongs_GL, layer_LRK.dtype), layer_LRK))
    return sum(found)


def _flags(own: tuple[int, ...], group: Array, leaf: Array) -> Array:
    """Tell whether the group holds a leaf, or each of its layers, in a shape that fits it."""
    flags_L = jnp.asarray(own) == group
    return flags_L[0] if len(own) == 1 else flags_L.reshape(-1, *(1,) * (leaf.ndim - 1))
