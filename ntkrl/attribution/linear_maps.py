"""The linear map of a ledger from changes of the params to changes at the probe tokens.

With c the cotangents of a token's logits, e_y − π for log π(y) and −π (log π + H) for H, and c'
those before the head's cap, changes dW, db of the head's role and dθ of the features' role change
them by  c'ᵀ (dW φ + db) + (Wᵀc')ᵀ J_φ dθ  to first order. The second part has two
algorithms:

    jvp    J_φ dθ by one JVP over the probe set per change and group
    vjp    ⟨J_φᵀ Wᵀc', dθ⟩ with the gradients of all probe tokens written out, groups by leaf

Array suffixes of this room, beside those of ntkrl.types:

    A  the two MEASURES                  S  probe sequences
    G  groups of parameters              P  probe tokens of a sequence
    K  changes of the params             R  gradients: (S, P, A) flattened
    T  terms of the loss; positions in `_TD`
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import ntk, trees
from ntkrl.numerics import at_least_float32, einsum
from ntkrl.types import Array, Params, Policy

MEASURES = ("log_prob", "entropy")


class ParameterGroups(NamedTuple):
    """Groups of the trained leaves, in leaf order; static.

    names: of the G groups.
    body: per leaf whether features depend on it.
    groups: per leaf the index of its group, or one index per layer.
    """

    names: tuple[str, ...]
    body: tuple[bool, ...]
    groups: tuple[tuple[int, ...], ...]

    @property
    def of_body(self) -> tuple[tuple[int, ...], ...]:
        """Groups of the leaves that features depend on."""
        return tuple(group for group, used in zip(self.groups, self.body, strict=True) if used)

    @property
    def moving(self) -> list[int]:
        """Indices of the groups that some feature depends on."""
        return sorted({index for group in self.of_body for index in group})


def parameter_groups(
    patterns: trees.Patterns, policy: Policy, params: Params, trained: Sequence[bool]
) -> ParameterGroups:
    """Return the groups of the trained leaves.

    Raises:
      ValueError: a group called "head", or what `trees.match` raises.
    """
    weights = jax.device_get(ntk.group_weights(patterns, ntk.as_network(policy), params))
    if "head" in weights:
        raise ValueError('groups: "head" names the head\'s role itself; call the group otherwise.')
    groups = []
    for flags, is_trained in zip(zip(*weights.values(), strict=True), trained, strict=True):
        flags_GL = np.stack([np.ravel(flag) for flag in flags])
        group = tuple(map(int, np.argmax(flags_GL, axis=0)))
        if is_trained:
            groups.append(group[:1] if len(set(group)) == 1 else group)
    names = [n for n, is_trained in zip(trees.names(params), trained, strict=True) if is_trained]
    head = () if policy.tied else (policy.head_weight, policy.head_bias)
    return ParameterGroups(tuple(weights), tuple(name not in head for name in names), tuple(groups))


class TokenCotangents(NamedTuple):
    """The probe tokens under the params before the step.

    values: `[2, O]` MEASURES.
    features: `[O, D]`.
    head: `[2, O, V]` cotangents of W φ + b.
    body: `[2, O, D]` cotangents of φ.
    """

    values: Array
    features: Array
    head: Array
    body: Array


def token_cotangents(
    network: ntk.Network, params: Params, phi_OD: Array, targets: Array
) -> TokenCotangents:
    """Compute the measures of the probe tokens, and their cotangents."""
    log_pi_OV = jax.nn.log_softmax(network.logits(params, phi_OD), axis=-1)
    pi_OV = jnp.exp(log_pi_OV)
    entropy_O = -jnp.sum(pi_OV * log_pi_OV, axis=-1)
    log_probs_O = jnp.take_along_axis(log_pi_OV, targets[:, None], axis=-1)[:, 0]
    score_OV = jax.nn.one_hot(targets, pi_OV.shape[-1], dtype=pi_OV.dtype) - pi_OV
    falls_OV = -pi_OV * (log_pi_OV + entropy_O[:, None])
    head_AOV = jnp.stack([score_OV, falls_OV]) * network.slopes(params, phi_OD)[None]
    weight_VD = network.weight(params).astype(head_AOV.dtype)
    return TokenCotangents(
        jnp.stack([log_probs_O, entropy_O]),
        at_least_float32(phi_OD),
        head_AOV,
        einsum("aov,vd->aod", head_AOV, weight_VD),
    )


def head_contributions(network: ntk.Network, cotangents: TokenCotangents, changes: Params) -> Array:
    """Return `[2, O, K]` of K changes of the head's role (trained leaves, K in front)."""
    named, total = trees.named_leaves(changes), jnp.zeros((), cotangents.head.dtype)
    count = next(iter(named.values())).shape[0]
    if network.head.weight in named:
        weight_KVD = at_least_float32(named[network.head.weight])
        logits_KOV = einsum("kvd,od->kov", weight_KVD, cotangents.features)
        total = total + einsum("aov,kov->aok", cotangents.head, logits_KOV)
    if network.head.bias in named:
        bias_KV = at_least_float32(named[network.head.bias])
        total = total + einsum("aov,kv->aok", cotangents.head, bias_KV)
    return jnp.broadcast_to(total, (*cotangents.head.shape[:2], count))


def linearize_features(
    network: ntk.Network, trained: Params, frozen: Params, contexts: ntk.Contexts
) -> tuple[Array, Callable[[Params], Array]]:
    """Return the features `[O, D]` at the contexts, and their JVP along changes of `trained`."""
    return jax.linearize(
        lambda leaves: ntk.features_at(network, trees.merge(leaves, frozen), contexts), trained
    )


def body_contributions(
    groups: ParameterGroups,
    features_jvp: Callable[[Params], Array],
    cotangents: TokenCotangents,
    changes: Params,
) -> Array:
    """Return `[G, 2, O, K]` of K changes of the features' role, one JVP for each group."""
    shape = (len(groups.names), *cotangents.head.shape[:2])
    if not groups.moving:
        return jnp.zeros((*shape, len(jax.tree.leaves(changes)[0])), cotangents.head.dtype)

    def contribution(change: Params) -> Array:
        leaves, treedef = jax.tree.flatten(change)

        def of_group(index: Array) -> Array:
            masked = [
                leaf * _group_mask(group, index, leaf).astype(leaf.dtype)
                for leaf, group in zip(leaves, groups.groups, strict=True)
            ]
            moved_OD = at_least_float32(features_jvp(jax.tree.unflatten(treedef, masked)))
            return einsum("aod,od->ao", cotangents.body, moved_OD)

        by_group = jax.vmap(of_group)(jnp.asarray(groups.moving))
        zeros = jnp.zeros(shape, cotangents.head.dtype)
        return zeros.at[np.asarray(groups.moving)].set(by_group)

    return jax.vmap(contribution, out_axes=-1)(changes)


def _group_mask(group: tuple[int, ...], index: Array, leaf: Array) -> Array:
    """Flag a leaf, or each of its layers, that belongs to group `index`; broadcasts to the leaf."""
    flags_L = jnp.asarray(group) == index
    return flags_L[0] if len(group) == 1 else flags_L.reshape(-1, *(1,) * (leaf.ndim - 1))


def probe_gradients(
    network: ntk.Network,
    groups: ParameterGroups,
    trained: Params,
    frozen: Params,
    sequences: tuple[Array, Array, Array, Array],
) -> list[Array]:
    """Return the gradients of probe tokens' measures: leaves `[S·P·2, …]` of the features' role.

    Args:
      network, groups, trained, frozen: of the policy, and the partition of its params.
      sequences: tokens and mask `[S, T]`, positions `[S, P]` and cotangents of the features there
        `[S, P, 2, D]`.
    """
    body, other = trees.partition(trained, groups.body)

    def of_sequence(sequence: tuple[Array, Array, Array, Array]) -> Params:
        tokens, mask, positions_P, cotangents_PAD = sequence

        def features(leaves: Params) -> Array:
            params = trees.merge(trees.merge(leaves, other), frozen)
            return network.read(params, tokens[None], mask[None])[0]

        phi_TD, vjp_fn = jax.vjp(features, body)

        def of_token(position: Array, cotangent_D: Array) -> Params:
            zeros_TD = jnp.zeros_like(phi_TD)
            return vjp_fn(zeros_TD.at[position].set(cotangent_D.astype(phi_TD.dtype)))[0]

        return jax.vmap(jax.vmap(of_token, (None, 0)))(positions_P, cotangents_PAD)

    # sequentially: a fifth faster than batched on a CPU, whose caches a batch fills
    gradients = jax.lax.map(of_sequence, sequences)
    return [leaf.reshape(-1, *leaf.shape[3:]) for leaf in jax.tree.leaves(gradients)]


def contract_gradients(
    groups: ParameterGroups, gradients: Sequence[Array], changes: Params
) -> Array:
    """Return `[G, R, K]`, by group the inner products of R gradients and K changes."""
    body, _ = trees.partition(changes, groups.body)
    products = []
    for row, change, group in zip(gradients, jax.tree.leaves(body), groups.of_body, strict=True):
        row_RLM = at_least_float32(row).reshape(row.shape[0], len(group), -1)
        change_KLM = at_least_float32(change).reshape(change.shape[0], len(group), -1)
        layer_LRK = einsum("rlm,klm->lrk", row_RLM, change_KLM)
        belongs_GL = np.arange(len(groups.names))[:, None] == np.asarray(group)[None]
        products.append(einsum("gl,lrk->grk", jnp.asarray(belongs_GL, layer_LRK.dtype), layer_LRK))
    return functools.reduce(jnp.add, products)
