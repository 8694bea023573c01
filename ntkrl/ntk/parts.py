"""Parts of a kernel: sets of parameters, their roles, and their weights.

The kernel is additive over any partition of the parameters. Built-in parts, for a head W that may
be tied to the embedding (J_out its output role, J_in its input role):

    head = output + bias          J_out J_outᵀ, and I_V from a bias           (R)
    body                          all parameters in the features' role        (G)
    input                         the share of the body that is J_in J_inᵀ
    cross = output_input + input_output      J_out J_inᵀ + J_in J_outᵀ
    full = head + body + cross

A named group is a set of parameters in all their roles, so the groups of a list add up to full.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ntkrl import trees
from ntkrl.ntk.network import Leaves, Network, as_network
from ntkrl.types import Array, Params, Policy

CLASSIFIER = "classifier"
Weights = tuple[Array, ...] | None
"""A factor per leaf, broadcastable to it: the diagonal of P in J P Jᵀ; None for ones."""


class Roles(NamedTuple):
    """The terms that a part consists of; static in compiled programs."""

    output: bool = False
    bias: bool = False
    body: bool = False
    output_input: bool = False
    input_output: bool = False


BUILT_IN = {
    "head": Roles(output=True, bias=True),
    "body": Roles(body=True),
    "cross": Roles(output_input=True, input_output=True),
    "full": Roles(True, True, True, True, True),
    "output": Roles(output=True),
    "input": Roles(body=True),
    "output_input": Roles(output_input=True),
    "input_output": Roles(input_output=True),
}
PARTS = tuple(BUILT_IN)


def by_layer(model: Policy | Network, params: Params) -> trees.Patterns:
    """Return groups `layer 0`, `layer 1`, …, and one per top-level module outside the layers.

    The head's own matrix is called "classifier", as "head" is a role.

    >>> groups = ntk.by_layer(policy, params)
    >>> [name for _, name in groups]
    ['embed', 'final_norm', 'classifier', 'layer 0', 'layer 1']
    >>> kernel = ntk.kernel(policy, params, ntk.last_positions(tokens), groups=groups)
    >>> total = sum(kernel.trace(name) for _, name in groups)
    >>> bool(jnp.allclose(total, kernel.trace(), rtol=1e-4))
    True
    """
    network, groups = as_network(model), {}
    for name, *_ in _spellings(network, params):
        prefix = _stack(network, name)
        if prefix is None:
            top = name.split("/")[0]
            groups[f"{_escape(top)}(/.*)?"] = CLASSIFIER if top in PARTS else top
        else:
            layer = name[len(prefix) + 1 :].split("/")[0]
            groups[f"{_escape(prefix)}/{layer}/.*"] = f"layer {layer}"
    return tuple(groups.items())


def by_module(model: Policy | Network, params: Params) -> trees.Patterns:
    """Return one group per module type, such as `attention/qkv`, all layers together."""
    network, groups = as_network(model), {}
    for name in trees.names(params):
        prefix = _stack(network, name)
        prefix = "" if prefix is None else f"{prefix}/"
        leaf = name[len(prefix) :]
        module = leaf.rpartition("/")[0] if "/" in leaf else leaf
        group = CLASSIFIER if module in PARTS else module
        groups[f"{_escape(prefix + module)}(/[^/]*)?"] = group
    return tuple(groups.items())


def check_groups(
    groups: trees.Patterns, network: Network, params: Params
) -> dict[str, frozenset[int]]:
    """Return `{group: indices of its spelled names}` of a list that covers the params.

    Raises:
      ValueError: a built-in name, or the errors of `trees.match`.
    """
    conflicts = sorted({name for _, name in groups} & set(PARTS))
    if conflicts:
        raise ValueError(
            f"groups: {', '.join(conflicts)} name built-in parts; rename these groups."
        )
    return _members(groups, network, params) if groups else {}


def group_weights(
    groups: trees.Patterns, network: Network, params: Params
) -> dict[str, tuple[Array, ...]]:
    """Return per group a factor per leaf: 1 where the group contains the leaf (or layer), else 0.

    Raises:
      ValueError: the errors of `trees.match`.
    """
    members = _members(groups, network, params)
    return {name: _indicators(network, params, chosen) for name, chosen in members.items()}


def resolve(
    name: str,
    network: Network,
    params: Params,
    groups: Mapping[str, frozenset[int]],
    precondition: Params | None,
) -> tuple[Roles, Weights]:
    """Return the terms of a part, and the weights of the params' leaves in it.

    Raises:
      ValueError: the name is neither built in nor a group.
    """
    if name not in PARTS and name not in groups:
        known = ", ".join([*PARTS, *groups])
        hint = "" if groups else "; kernel(..., groups=ntk.by_layer(policy, params)) adds groups"
        raise ValueError(f"part {name!r} is unknown; known are {known}{hint}.")
    weights: Weights = None
    names, head = trees.names(params), network.head
    if name in groups:
        weights = _indicators(network, params, groups[name])
        included = {leaf: bool(w.any()) for leaf, w in zip(names, weights, strict=True)}
        tied = included[head.weight]
        roles = Roles(tied, head.bias is not None and included[head.bias], True, tied, tied)
    else:
        roles = BUILT_IN[name]
        roles = roles._replace(bias=roles.bias and head.bias is not None)
        if name == "input":
            weights = tuple(jnp.asarray(float(leaf == head.weight)) for leaf in names)
    if precondition is not None:
        leaves = jax.tree.leaves(precondition)
        if weights is not None:
            leaves = [p * w for p, w in zip(leaves, weights, strict=True)]
        weights = tuple(leaves)
    return roles, weights


def _members(groups: trees.Patterns, network: Network, params: Params) -> dict[str, frozenset[int]]:
    labels = trees.match_names(groups, _spellings(network, params), "groups")
    return {
        label: frozenset(index for index, other in enumerate(labels) if other == label)
        for label in dict.fromkeys(labels)
    }


def _stack(network: Network, name: str) -> str | None:
    """Return the prefix of a parameter that is stacked by layer, or None."""
    return next((prefix for prefix in network.stacked if name.startswith(f"{prefix}/")), None)


def _spellings(network: Network, params: Params) -> list[tuple[str, ...]]:
    """Return the names of all parameters, one per layer of a stacked leaf, plain name last."""
    spellings: list[tuple[str, ...]] = []
    for name, leaf in trees.named_leaves(params).items():
        prefix = _stack(network, name)
        if prefix is None:
            spellings.append((name,))
        else:
            suffix = name[len(prefix) + 1 :]
            spellings += [(f"{prefix}/{i}/{suffix}", name) for i in range(leaf.shape[0])]
    return spellings


def _indicators(network: Network, params: Params, chosen: frozenset[int]) -> tuple[Array, ...]:
    """Return 1 for chosen names and 0 for others, `[L, 1, …]` for stacked leaves."""
    weights, index = [], 0
    for name, leaf in trees.named_leaves(params).items():
        stacked = _stack(network, name) is not None
        count = leaf.shape[0] if stacked else 1
        flags = jnp.asarray([float(index + i in chosen) for i in range(count)])
        weights.append(flags.reshape(-1, *(1,) * (leaf.ndim - 1)) if stacked else flags[0])
        index += count
    return tuple(weights)


def _escape(name: str) -> str:
    # names consist of word characters and slashes; dots and brackets are literal
    return "".join(c if c.isalnum() or c in "_/" else f"\\{c}" for c in name)


def check_precondition(precondition: Params, params: Params) -> None:
    """Check that a preconditioner has the structure and shapes of the params.

    Raises:
      ValueError: another structure or other shapes.
    """
    same, shapes = trees.same_structure(params, precondition), []
    if same:
        pairs = zip(trees.named_leaves(params).items(), jax.tree.leaves(precondition), strict=True)
        shapes = [name for (name, leaf), p in pairs if jnp.shape(p) != leaf.shape]
    if not same or shapes:
        names = f" (see {', '.join(shapes[:4])})" if shapes else ""
        raise ValueError(
            f"precondition must have the structure and the shapes of params{names}: one "
            "non-negative number per parameter, such as 1 / (sqrt(nu) + eps) of Adam."
        )


def used_weights(weights: Weights, used: Sequence[bool]) -> Weights:
    """Return the weights of the used leaves."""
    if weights is None:
        return None
    return tuple(weight for weight, is_used in zip(weights, used, strict=True) if is_used)


def scale_leaves(leaves: Leaves, weights: Weights) -> Leaves:
    """Multiply leaves by their weights."""
    if weights is None:
        return leaves
    return [(leaf * w).astype(leaf.dtype) for leaf, w in zip(leaves, weights, strict=True)]
