"""Parts of a kernel: which parameters, in which role, with which weight.

The kernel is additive over any partition of the parameters. Built-in parts, for a head W that may
be tied to the embedding (J_out its output role, J_in its input role):

    head = output + bias          J_out J_outᵀ, and I_V from a bias           (R)
    body                          all parameters as the features read them    (G)
    input                         the share of the body that is J_in J_inᵀ
    cross = output_input + input_output      J_out J_inᵀ + J_in J_outᵀ
    full = head + body + cross

A named group is a set of parameters in all their roles, so the groups of a list add up to full.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ntkrl import trees
from ntkrl.ntk.network import Network, as_network
from ntkrl.types import Array, Params, Policy

PARTS = ("head", "body", "cross", "full", "output", "input", "output_input", "input_output")
CLASSIFIER = "classifier"


class Roles(NamedTuple):
    """Which terms a part is made of; static in compiled programs."""

    output: bool = False
    bias: bool = False
    body: bool = False
    output_input: bool = False
    input_output: bool = False


class Part(NamedTuple):
    """A part that was asked for.

    roles: its terms.
    weights: per leaf of the params a factor that broadcasts to it (the diagonal of P in J P Jᵀ,
        zero outside a group), or None for ones everywhere.
    """

    roles: Roles
    weights: tuple[Array, ...] | None


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
    for spellings in _spelled(network, params):
        name = spellings[0]
        prefix = next((p for p in network.stacked if name.startswith(f"{p}/")), None)
        if prefix is None:
            top = name.split("/")[0]
            groups[f"{_escaped(top)}(/.*)?"] = CLASSIFIER if top in PARTS else top
        else:
            layer = name[len(prefix) + 1 :].split("/")[0]
            groups[f"{_escaped(prefix)}/{layer}/.*"] = f"layer {layer}"
    return tuple(groups.items())


def by_module(model: Policy | Network, params: Params) -> trees.Patterns:
    """Return one group per module type, such as `attention/qkv`, all layers together."""
    network, groups = as_network(model), {}
    for spellings in _spelled(network, params):
        plain = spellings[-1]
        prefix = next((f"{p}/" for p in network.stacked if plain.startswith(f"{p}/")), "")
        leaf = plain[len(prefix) :]
        module = leaf.rpartition("/")[0] if "/" in leaf else leaf
        name = CLASSIFIER if module in PARTS else module
        groups[f"{_escaped(prefix + module)}(/[^/]*)?"] = name
    return tuple(groups.items())


def check_groups(groups: trees.Patterns, network: Network, params: Params) -> dict[str, list[int]]:
    """Return `{group: indices into the spelled names}` of a list that covers the params.

    Raises:
      ValueError: a name that is built in, or what `trees.match` raises.
    """
    taken = sorted({name for _, name in groups} & set(PARTS))
    if taken:
        raise ValueError(
            f"groups: {', '.join(taken)} name built-in parts; call these groups otherwise."
        )
    return _members(groups, network, params) if groups else {}


def group_weights(
    groups: trees.Patterns, network: Network, params: Params
) -> dict[str, tuple[Array, ...]]:
    """Return per group one factor per leaf: 1 where the group holds the leaf (or layer), else 0.

    Raises:
      ValueError: what `trees.match` raises.
    """
    found = _members(groups, network, params)
    return {name: _indicators(network, params, set(chosen)) for name, chosen in found.items()}


def resolve(
    part: str,
    network: Network,
    params: Params,
    groups: dict[str, list[int]],
    precondition: Params | None,
) -> Part:
    """Return the terms and weights of a part by name.

    Raises:
      ValueError: the name is neither built in nor a group.
    """
    if part not in PARTS and part not in groups:
        known = ", ".join([*PARTS, *groups])
        hint = "" if groups else "; kernel(..., groups=ntk.by_layer(policy, params)) adds groups"
        raise ValueError(f"part {part!r} is unknown; known are {known}{hint}.")
    roles, weights = Roles(True, True, True, True, True), None
    names = trees.names(params)
    if part in groups:
        weights = _indicators(network, params, set(groups[part]))
        holds = {name: bool(w.any()) for name, w in zip(names, weights, strict=True)}
        tied = holds[network.head.weight]
        bias = network.head.bias is not None and holds[network.head.bias]
        roles = Roles(tied, bias, True, tied, tied)
    else:
        roles = BUILT_IN[part]
        if part == "input":
            weights = tuple(jnp.asarray(float(name == network.head.weight)) for name in names)
    if precondition is not None:
        leaves = jax.tree.leaves(precondition)
        if weights is not None:
            leaves = [p * w for p, w in zip(leaves, weights, strict=True)]
        weights = tuple(leaves)
    return Part(roles, weights)


def _members(groups: trees.Patterns, network: Network, params: Params) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    labels = trees.match_names(groups, _spelled(network, params), "groups")
    for index, label in enumerate(labels):
        found.setdefault(label, []).append(index)
    return found


def _spelled(network: Network, params: Params) -> list[tuple[str, ...]]:
    """Return the names of all parameters, one per layer of a stacked leaf, plain name last."""
    found = []
    for name, leaf in trees.named_leaves(params).items():
        prefix = next((p for p in network.stacked if name.startswith(f"{p}/")), None)
        if prefix is None:
            found.append((name,))
            continue
        rest = name[len(prefix) + 1 :]
        found += [(f"{prefix}/{layer}/{rest}", name) for layer in range(leaf.shape[0])]
    return found


def _indicators(network: Network, params: Params, chosen: set[int]) -> tuple[Array, ...]:
    """Return 1 for chosen names and 0 for others, `[L, 1, …]` for stacked leaves."""
    weights, index = [], 0
    for name, leaf in trees.named_leaves(params).items():
        stacked = any(name.startswith(f"{prefix}/") for prefix in network.stacked)
        count = leaf.shape[0] if stacked else 1
        flags = jnp.asarray([float(index + i in chosen) for i in range(count)])
        weights.append(flags.reshape(-1, *(1,) * (leaf.ndim - 1)) if stacked else flags[0])
        index += count
    return tuple(weights)


def _escaped(name: str) -> str:
    # names hold word characters and slashes; a dot or a bracket is meant as itself
    return "".join(c if c.isalnum() or c in "_/" else f"\\{c}" for c in name)


def checked_precondition(precondition: Params, params: Params) -> Params:
    """Return a preconditioner that fits, or say what does not.

    Raises:
      ValueError: another structure or other shapes than the params.
    """
    same = jax.tree.structure(params) == jax.tree.structure(precondition)
    shapes = (
        []
        if not same
        else [
            name
            for (name, leaf), p in zip(
                trees.named_leaves(params).items(), jax.tree.leaves(precondition), strict=True
            )
            if jnp.shape(p) != leaf.shape
        ]
    )
    if not same or shapes:
        where = f" (see {', '.join(shapes[:4])})" if shapes else ""
        raise ValueError(
            f"precondition must have the structure and the shapes of params{where}: one "
            "non-negative number per parameter, such as 1 / (sqrt(nu) + eps) of Adam."
        )
    return precondition


def leaf_weights(weights: Sequence[Array] | None, used: Sequence[bool]) -> tuple[Array, ...] | None:
    """Return the weights of the used leaves."""
    if weights is None:
        return None
    return tuple(weight for weight, keep in zip(weights, used, strict=True) if keep)
