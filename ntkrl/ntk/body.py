"""The features as a function of the leaves they depend on, and as a program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ntkrl import trees
from ntkrl.jaxpr import TracedFunction, trace
from ntkrl.ntk.network import Head, Network
from ntkrl.types import Array, Params


@dataclasses.dataclass(frozen=True)
class Body:
    """The features as a function of the leaves they depend on; static within a program.

    network: the Network.
    used: per leaf of the params, whether features depend on it.
    head_index: place of the head's matrix among the used leaves; None where it is not tied.
    shardings: per used leaf its NamedSharding, or None where leaves are on one device.
    """

    network: Network
    used: tuple[bool, ...]
    head_index: int | None = None
    shardings: tuple[Any, ...] | None = None

    def leaves(self, tree: Params) -> list[Array]:
        """Return the used leaves of a tree like the params."""
        flat = jax.tree.leaves(tree)
        return [leaf for leaf, used in zip(flat, self.used, strict=True) if used]

    def function(self, params: Params) -> Callable[[list[Array], Any, Array], Array]:
        """Return `(leaves, tokens, mask) -> [S, T, D]`, unused params closed over."""
        _, rest = trees.partition(params, self.used)
        treedef = jax.tree.structure(params)

        def read(leaves: list[Array], tokens: Any, mask: Array) -> Array:
            given = iter(leaves)
            chosen = [next(given) if used else None for used in self.used]
            whole = trees.merge(jax.tree.unflatten(treedef, chosen), rest)
            return self.network.read(whole, tokens, mask)

        return read

    def of_head(self, leaves: list[Array]) -> Array:
        """Return the tied matrix of used leaves as `[V, D]`."""
        stored = leaves[self.head_index]
        return stored.T if self.network.head.transposed else stored

    def from_head(self, moved: Array, params: Params) -> list[Array]:
        """Return used leaves that are zero but for the tied matrix, given as `[V, D]`."""
        stored = moved.T if self.network.head.transposed else moved
        leaves = [jnp.zeros_like(leaf) for leaf in self.leaves(params)]
        leaves[self.head_index] = stored.astype(leaves[self.head_index].dtype)
        return leaves

    def only_head(self) -> Body:
        """Return the Body whose one leaf is the tied matrix."""
        place = [index for index, used in enumerate(self.used) if used][self.head_index]
        used = tuple(index == place for index in range(len(self.used)))
        shardings = None if self.shardings is None else (self.shardings[self.head_index],)
        return Body(self.network, used, 0, shardings)

    def pinned(self, leaves: list[Array]) -> list[Array]:
        """Keep parameter-sized intermediates where the parameters are."""
        if self.shardings is None:
            return leaves
        return [
            jax.lax.with_sharding_constraint(leaf, sharding)
            for leaf, sharding in zip(leaves, self.shardings, strict=True)
        ]

    def spread(self, cotangents: Array) -> Array:
        """Spread directions `[S, A, …]` over the devices that hold the params."""
        if self.shardings is None:
            return cotangents
        mesh = self.shardings[0].mesh
        if cotangents.shape[1] % mesh.size:
            return cotangents
        spec = PartitionSpec(None, mesh.axis_names)
        return jax.lax.with_sharding_constraint(cotangents, NamedSharding(mesh, spec))

    def program(self, params: Params, tokens: Any, mask: Array) -> TracedFunction:
        """Return the features of one sequence, traced: inputs are all leaves, tokens and mask."""
        return traced(self.network, params, tokens, mask)


def make_body(network: Network, params: Params, tokens: Any, mask: Array) -> Body:
    """Find the leaves that features depend on, and where they are sharded."""
    program = traced(network, params, tokens, mask)
    live, leaves = program.live(), jax.tree.leaves(params)
    used = tuple(slot in live for slot in program.inputs[: len(leaves)])
    held = [leaf for leaf, keep in zip(leaves, used, strict=True) if keep]
    spread = [
        leaf.sharding if not isinstance(leaf, jax.core.Tracer) else None
        for leaf in held
        if isinstance(leaf, jax.Array)
    ]
    named = len(spread) == len(held) and all(isinstance(one, NamedSharding) for one in spread)
    several = named and any(one.mesh.size > 1 for one in spread)
    names = [name for name, keep in zip(trees.names(params), used, strict=True) if keep]
    tied = names.index(network.head.weight) if network.head.weight in names else None
    # heads that differ in bias, scale or cap share the programs of one body
    plain = Head(network.head.weight, transposed=network.head.transposed)
    bare = dataclasses.replace(network, head=plain)
    return Body(bare, used, tied, tuple(spread) if several else None)


def traced(network: Network, params: Params, tokens: Any, mask: Array) -> TracedFunction:
    """Trace the features of one sequence; equal shapes are traced once."""
    leaves, treedef = jax.tree.flatten(params)
    data, data_treedef = jax.tree.flatten((tokens, mask))
    shapes = [(leaf.shape, leaf.dtype) for leaf in leaves]
    shapes += [((1, *leaf.shape[1:]), leaf.dtype) for leaf in data]
    return _traced(network, treedef, data_treedef, tuple(shapes))


@functools.lru_cache(maxsize=128)
def _traced(
    network: Network, treedef: Any, data_treedef: Any, shapes: tuple[Any, ...]
) -> TracedFunction:
    count = treedef.num_leaves

    def flat(*arguments: Array) -> Array:
        params = jax.tree.unflatten(treedef, arguments[:count])
        tokens, mask = jax.tree.unflatten(data_treedef, arguments[count:])
        return network.read(params, tokens, mask)

    return trace(flat, *(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes))
