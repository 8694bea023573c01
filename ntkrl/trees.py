"""Operations on parameters by name: match, partition, merge, shard.

A parameter's name is its path joined by "/", for example `layers/attention/qkv/kernel`.
Freezing, learning rates, weight decay, sharding and kernel groups are all ordered
`(pattern, value)` lists over those names: regular expressions that must match the full name;
the first match wins, every name must be covered and every pattern must match some name.
"""

import difflib
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ntkrl.types import Params

Patterns = Sequence[tuple[str, Any]]

ROWS = ("data", "fsdp")
"""Mesh axes that the rows of a batch are sharded over together."""


def names(tree: Params) -> list[str]:
    """Return the name of every leaf, in the order of `jax.tree.leaves`."""
    return [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def named_leaves(tree: Params) -> dict[str, Any]:
    """Return `{name: leaf}` in leaf order."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def not_finite(tree: Params) -> list[str]:
    """Return the names of the leaves that hold NaN or infinity."""
    finite = jax.jit(lambda tree: jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree))(tree)
    return [name for name, each in named_leaves(finite).items() if not each]


def changed(before: Params, after: Params) -> list[str]:
    """Return the names of the leaves that differ between two trees of one structure."""
    equal = jax.jit(lambda *pair: jax.tree.map(jnp.array_equal, *pair))(before, after)
    return [name for name, each in named_leaves(equal).items() if not each]


def same_structure(first: Params, second: Params) -> bool:
    """Test whether two trees have the same structure."""
    # Any, since jaxlib does not declare the type of a structure
    structures: list[Any] = [jax.tree.structure(tree) for tree in (first, second)]
    return structures[0] == structures[1]


def match(patterns: Patterns, tree: Params, what: str = "patterns") -> list[Any]:
    """Return for every leaf the value of the first pattern that matches its full name.

    Args:
      patterns: ordered `(regular expression, value)` pairs.
      tree: the params tree (arrays or shapes).
      what: name of the list in messages.

    Returns:
      One value per leaf, in leaf order. A list and not a tree, since values may be None.

    Raises:
      ValueError: a name is matched by no pattern, a pattern matches no name, or a pattern is
        not a regular expression; all problems in one message.
    """
    return match_names(patterns, [(name,) for name in names(tree)], what)


def match_names(
    patterns: Patterns, spellings: Sequence[tuple[str, ...]], what: str = "patterns"
) -> list[Any]:
    """Match names that each have one or several spellings, one of which must match.

    Args:
      patterns, what: as in `match`.
      spellings: the spellings of each name, the one for messages first.

    Returns:
      One value per name.

    Raises:
      ValueError: as in `match`.
    """
    problems = []
    compiled = []
    for pattern, value in patterns:
        try:
            compiled.append((re.compile(pattern), value))
        except re.error as error:
            problems.append(f"{pattern!r} is not a regular expression: {error}")
    values, uncovered = [], []
    for written in spellings:
        hits = [value for regex, value in compiled if any(map(regex.fullmatch, written))]
        values.append(hits[0] if hits else None)
        if not hits:
            uncovered.append(written[0])
    first_spellings = [written[0] for written in spellings]
    for regex, _ in compiled:
        if not any(any(map(regex.fullmatch, written)) for written in spellings):
            near = difflib.get_close_matches(regex.pattern, first_spellings, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            problems.append(f"{regex.pattern!r} matches no parameter{hint}")
    if uncovered:
        problems.append(
            f"no pattern covers {', '.join(uncovered)}; add a last row ('.*', …) for the rest"
        )
    if problems:
        known = ", ".join(first_spellings)
        raise ValueError(f"{what}: " + "; ".join(problems) + f". Parameters are: {known}.")
    return values


def partition(tree: Params, selected: Sequence[bool]) -> tuple[Params, Params]:
    """Split a tree in two of the same structure, with None in place of the other's leaves.

    Args:
      tree: any pytree.
      selected: one bool per leaf, in leaf order.

    Returns:
      `(chosen, rest)`; None is an empty subtree to JAX, so each has only its leaves.
    """
    leaves, treedef = jax.tree.flatten(tree)
    chosen = [leaf if keep else None for leaf, keep in zip(leaves, selected, strict=True)]
    rest = [None if keep else leaf for leaf, keep in zip(leaves, selected, strict=True)]
    return jax.tree.unflatten(treedef, chosen), jax.tree.unflatten(treedef, rest)


def merge(chosen: Params, rest: Params) -> Params:
    """Undo `partition`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, chosen, rest, is_leaf=lambda leaf: leaf is None
    )


def shardings(tree: Params, patterns: Patterns, mesh: Mesh) -> Params:
    """Return the NamedSharding of every leaf.

    A pattern may match the full name or its end, so that a single list serves params, gradients and
    optimizer moments (`opt_state/…/mu/head/weight`); patterns may go unused.

    Args:
      tree: params, or a state with trees of their structure (arrays or shapes).
      patterns: `(pattern, mesh axis or None per dimension)`; missing dimensions are not sharded.
      mesh: the device mesh.

    Returns:
      A tree of NamedSharding. A dimension that its mesh axis does not divide is not sharded.

    Raises:
      ValueError: a name is matched by no pattern.
    """
    leaves, treedef = jax.tree.flatten(tree)
    compiled = [(re.compile(f"(?:.*/)?(?:{pattern})"), axes) for pattern, axes in patterns]
    placed = []
    for name, leaf in zip(names(tree), leaves, strict=True):
        hits = [axes for regex, axes in compiled if regex.fullmatch(name)]
        if not hits:
            raise ValueError(f"sharding: no pattern covers {name}; add a last row ('.*', ()).")
        spec = [
            axis if axis is not None and size % mesh.shape[axis] == 0 else None
            for size, axis in zip(leaf.shape, hits[0], strict=False)
        ]
        placed.append(NamedSharding(mesh, PartitionSpec(*spec)))
    return jax.tree.unflatten(treedef, placed)


def constrain(value: Any, mesh: Mesh | None, *axes: Any) -> Any:
    """Constrain the sharding of an array in a jitted function.

    Args:
      value: the array.
      mesh: the device mesh; None or a single device means no constraint.
      axes: per dimension the mesh axis or axes that it is sharded over; None for no sharding. A
        dimension that they do not divide, or that is not listed, is left to the compiler.

    Returns:
      The array.
    """
    if mesh is None or mesh.size == 1:
        return value
    spec = [PartitionSpec.UNCONSTRAINED] * value.ndim
    for number, names in enumerate(axes):
        group = (names,) if isinstance(names, str) else names
        if names is None or value.shape[number] % _size(mesh, group) == 0:
            spec[number] = names
    return jax.lax.with_sharding_constraint(value, NamedSharding(mesh, PartitionSpec(*spec)))


def spread_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Constrain the first axis of arrays to be sharded over ROWS."""
    return jax.tree.map(lambda leaf: constrain(leaf, mesh, ROWS), tree)


def replicate(value: Any, mesh: Mesh | None) -> Any:
    """Constrain an array to be replicated on every device."""
    return constrain(value, mesh, *(None,) * value.ndim)


def unstacked_patterns(
    patterns: Patterns, stacked: Sequence[str]
) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
    """Return a list for `shardings` of params whose stacked leaves are split by layer.

    Args:
      patterns: those of stacked params, `layers/…`; the result has `layers/3/…`, without the axes
        of the leading dimension.
      stacked: prefixes of the stacked leaves.
    """

    def unstacked(pattern: str, axes: tuple[str | None, ...]) -> tuple[str, tuple[str | None, ...]]:
        for prefix in stacked:
            if pattern.startswith(f"{prefix}/"):
                return f"{prefix}/\\d+/{pattern.removeprefix(f'{prefix}/')}", axes[1:]
        return pattern, axes

    return tuple(unstacked(pattern, axes) for pattern, axes in patterns)


def row_parts(mesh: Mesh) -> int:
    """Return the number of shards of the rows of a batch."""
    return _size(mesh, ROWS)


def blocks(mesh: Mesh | None, rows: int) -> int:
    """Return the number of shards of some rows: 1 where the mesh does not divide them."""
    parts = 1 if mesh is None else row_parts(mesh)
    return 1 if rows % parts else parts


def _size(mesh: Mesh, axes: Sequence[str]) -> int:
    return math.prod(mesh.shape[name] for name in axes)


def gather_to_host(leaf: Any) -> np.ndarray:
    """Return an array as numpy, gathered from all processes; a collective call."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(jax.tree_util.keystr((key,), simple=True) for key in path)
