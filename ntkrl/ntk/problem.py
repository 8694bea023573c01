"""The state shared by all forms of a kernel: contexts, parts, Γ by the chosen algorithm."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import trees
from ntkrl.ntk import estimates, heads, parts
from ntkrl.ntk.body import Body, make_body
from ntkrl.ntk.contexts import Contexts, GroupedContexts, group_by_sequence
from ntkrl.ntk.directions import Directions, directions
from ntkrl.ntk.forms import Operands
from ntkrl.ntk.network import Network
from ntkrl.numerics import GIB
from ntkrl.types import Array, Params


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A network read at observed and updated contexts.

    network, params, observed, updated: checked arguments of `ntkrl.ntk.kernel`.
    groups: `{name: indices of spelled parameter names}`.
    precondition: the diagonal P as a tree like params, or None.
    algorithm, forward_mode: as given.
    budget: bytes a call may use beyond the params.
    symmetric: whether updated is observed.
    """

    network: Network
    params: Params
    observed: Contexts
    updated: Contexts
    groups: Mapping[str, list[int]]
    precondition: Params | None
    algorithm: str
    forward_mode: bool
    budget: int
    symmetric: bool

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.network.weight(self.params).shape[0]

    @property
    def feature_size(self) -> int:
        """D."""
        return self.network.weight(self.params).shape[1]

    @property
    def part_names(self) -> tuple[str, ...]:
        """Every part that can be asked for."""
        return (*parts.PARTS, *self.groups)

    @property
    def leaf_names(self) -> list[str]:
        """Names of the parameters, in leaf order."""
        return trees.names(self.params)

    @property
    def has_bias(self) -> bool:
        """Whether the head has a bias."""
        return self.network.head.bias is not None

    @functools.cached_property
    def tied(self) -> bool:
        """Whether features depend on the head's matrix."""
        return self.body_function.head_index is not None

    @functools.cached_property
    def body_function(self) -> Body:
        """The features as a function of the leaves they depend on."""
        return make_body(self.network, self.params, self.observed.tokens, self.observed.mask)

    @property
    def tied_body(self) -> Body:
        """The features as a function of the tied matrix alone."""
        return self.body_function.only_head()

    @functools.cached_property
    def readings(self) -> tuple[heads.Reading, heads.Reading]:
        """Features and slopes of both sides."""
        left = heads.reading(self.network, self.params, self.observed)
        if self.symmetric:
            return left, left
        return left, heads.reading(self.network, self.params, self.updated)

    def part(self, name: str) -> parts.Part:
        """Resolve a part by name.

        Raises:
          ValueError: it is unknown.
        """
        found = parts.resolve(name, self.network, self.params, self.groups, self.precondition)
        if self.tied:
            return found
        roles = found.roles._replace(output_input=False, input_output=False)
        return found._replace(roles=roles._replace(body=roles.body and name != "input"))

    def roles(self, part: str) -> parts.Roles:
        """Return the terms of a part."""
        return self.part(part).roles

    def operands(self, part: str) -> Operands:
        """Return the arrays of a part."""
        weights = self.part(part).weights
        head = heads.head_weights(self.network, self.params, weights)
        arrays = (self.params, self.observed, self.updated, *self.readings)
        return Operands(*arrays, weights, head)

    def sides(
        self, left: Array | None, right: Array | None, summed: bool = False
    ) -> tuple[Directions, Directions | None]:
        """Arrange directions `[O, B, D]` and `[U, B, D]` (None: unit vectors) by sequence."""
        here, there = self._grouped
        one = directions(here, left, self.feature_size, summed)
        if self.symmetric and left is right:
            return one, None
        return one, directions(there, right, self.feature_size, summed)

    @functools.cached_property
    def _grouped(self) -> tuple[GroupedContexts, GroupedContexts]:
        here = group_by_sequence(self.observed)
        return here, here if self.symmetric else group_by_sequence(self.updated)

    def estimates_of(
        self, part: str, here: Directions, there: Directions | None, chunk: int | None
    ) -> dict[str, estimates.Estimate]:
        """Return the Estimate of every algorithm to Γ of a part."""
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1, not {chunk}.")
        weights = parts.leaf_weights(self.part(part).weights, self.body_function.used)
        arguments = (self.body_function, self.params, here, there, weights)
        return estimates.estimates(*arguments, self.budget, chunk)

    def flat_gram(
        self, part: str, here: Directions, there: Directions | None, chunk: int | None = None
    ) -> Array:
        """Return Γ `[S_o·A_o, S_u·A_u]` of a part by the chosen algorithm."""
        found = self.estimates_of(part, here, there, chunk)
        chosen = estimates.choose(found, self.algorithm, self.budget)
        weights = parts.leaf_weights(self.part(part).weights, self.body_function.used)
        arrays = (self.params, here, there, weights)
        settings = (chosen.algorithm, chosen.chunk, self.forward_mode)
        return estimates.gram(self.body_function, *arrays, *settings)

    def gram(self, part: str, left: Array | None, right: Array | None, chunk: int | None) -> Array:
        """Return Γ of directions of contexts: `[O, B_o, U, B_u]`."""
        here, there = self.sides(left, right)
        flat = self.flat_gram(part, here, there, chunk)
        other = here if there is None else there
        shape = (-1, here.per_position, other.sequences * other.positions.shape[1])
        slots_o, slots_u = (side.slots for side in self._grouped)
        return flat.reshape(*shape, other.per_position)[slots_o][:, :, slots_u]

    def scalar_gram(
        self, part: str, left: Array, right: Array, summed: bool, chunk: int | None
    ) -> Array:
        """Return Γ of one direction `[O, D]` per context: `[O, U]`, by sequence when summed."""
        right_UBD = right[:, None]
        left_OBD = right_UBD if left is right else left[:, None]
        if not summed:
            return self.gram(part, left_OBD, right_UBD, chunk)[:, 0, :, 0]
        here, there = self.sides(left_OBD, right_UBD, summed=True)
        return self.flat_gram(part, here, there, chunk)

    def by_sequence(self, values: Array) -> Array:
        """Sum `[O, U]` over the contexts of each pair of sequences."""
        here, there = self._grouped
        for axis, side in enumerate((here, there)):
            sequence = side.slots // side.positions.shape[1]
            moved = jnp.moveaxis(values, axis, 0)
            summed = jax.ops.segment_sum(moved, sequence, side.positions.shape[0])
            values = jnp.moveaxis(summed, 0, axis)
        return values

    def zeros(self, shape: tuple[int, ...]) -> Array:
        """Return zeros in the dtype of results."""
        return jnp.zeros(shape, self.readings[0].features.dtype)

    def cotangents(self, array: Array, count: int, name: str) -> Array:
        """Return an array of shape `[count, V]` in the dtype of results.

        Raises:
          ValueError: another shape, or integers.
        """
        expected, array = (count, self.vocab_size), jnp.asarray(array)
        if array.shape != expected:
            raise ValueError(f"{name} must have shape {expected}, not {array.shape}.")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, not {array.dtype}.")
        return array.astype(self.readings[0].features.dtype)

    def afford(self, numbers: int, what: str, instead: str) -> None:
        """Refuse results above the memory budget.

        Raises:
          ValueError: it would not fit.
        """
        size = numbers * self.readings[0].features.dtype.itemsize
        if size > self.budget:
            raise ValueError(
                f"{what} would be {size / GIB:.3g} GiB, above memory_gib="
                f"{self.budget / GIB:.3g}; ask for {instead}, or raise memory_gib."
            )


def vocabulary_indices(chosen: Sequence[int] | Array | None, vocab: int, name: str) -> Array:
    """Return token ids as an array; None for all.

    Raises:
      ValueError: no list of integers, or ids outside the vocabulary.
    """
    if chosen is None:
        return jnp.arange(vocab)
    indices = np.asarray(chosen)
    if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(
            f"{name} must be a list of token ids, not {indices.dtype} {indices.shape}."
        )
    if indices.size and (indices.min() < 0 or indices.max() >= vocab):
        raise ValueError(
            f"{name} holds ids from {indices.min()} to {indices.max()}; the vocabulary is "
            f"[0, {vocab})."
        )
    return jnp.asarray(indices)
