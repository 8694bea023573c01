"""Contexts of a kernel: positions of sequences, checked, and grouped by sequence."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl.jaxpr import is_traced
from ntkrl.ntk.network import Mask, Network, shorten
from ntkrl.types import Array, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Contexts:
    """O positions in N sequences; each context is a position with all that precedes it.

    tokens: `[N, T]` int ids; for an ntk.Network any inputs with leading axis N.
    positions: `[O]` int column of each context's last token, in [0, T).
    rows: `[O]` int sequence of each context; None means one position per sequence (O = N).
    mask: `[N, T]` bool, True on real tokens; None means all are.
    """

    tokens: Any
    positions: Array | np.ndarray
    rows: Array | np.ndarray | None = None
    mask: Mask = None

    @property
    def count(self) -> int:
        """O."""
        return self.positions.shape[0]


def last_positions(tokens: Array | np.ndarray, mask: Mask = None) -> Contexts:
    """Return the contexts at every sequence's last real token.

    Args:
      tokens: `[N, T]` ids.
      mask: `[N, T]` bool, True on real tokens; None means all are.

    Returns:
      N contexts.

    Raises:
      ValueError: a sequence without a real token.
    """
    length = tokens.shape[1]
    if mask is None:
        return Contexts(tokens, jnp.full(tokens.shape[0], length - 1))
    real = np.asarray(mask, bool)
    if not real.any(axis=1).all():
        raise ValueError(f"rows {shorten(np.flatnonzero(~real.any(axis=1)))} are all padding.")
    return Contexts(tokens, jnp.asarray(length - 1 - real[:, ::-1].argmax(axis=1)), mask=mask)


def every_position(tokens: Array | np.ndarray, mask: Mask = None) -> Contexts:
    """Return the contexts at every real token, row by row.

    Args:
      tokens, mask: as in `last_positions`.

    Returns:
      As many contexts as there are real tokens.
    """
    real = np.ones(tokens.shape[:2], bool) if mask is None else np.asarray(mask, bool)
    rows, positions = np.nonzero(real)
    return Contexts(tokens, jnp.asarray(positions), jnp.asarray(rows), mask)


def check_contexts(
    contexts: Contexts, name: str, network: Network, params: Params, is_policy: bool
) -> Contexts:
    """Return the contexts with rows and mask filled in, or report all problems at once.

    Values are checked only where they are concrete: for traced contexts, only shapes are.

    Args:
      contexts: the contexts.
      name: their name in messages.
      network, params: the network that will read them.
      is_policy: True where the inputs must be token ids.

    Raises:
      ValueError: wrong ranks or lengths, ids, positions or rows out of range, or on padding.
    """
    inputs, count = contexts.tokens, contexts.positions.shape[0] if contexts.positions.ndim else 0
    if is_policy:
        _check_ids(inputs, network.weight(params).shape[0], name)
    sequences = {leaf.shape[0] for leaf in jax.tree.leaves(inputs)}
    if len(sequences) != 1:
        raise ValueError(
            f"{name}.tokens has arrays of unequal batch sizes {sorted(sequences)}; all must have "
            "the N sequences in front."
        )
    (batch,) = sequences
    if contexts.rows is None and contexts.positions.shape != (batch,):
        raise ValueError(
            f"{name}.positions has shape {contexts.positions.shape}, but without rows there is one "
            f"position per sequence, ({batch},); set rows to choose several."
        )
    rows = np.arange(count) if contexts.rows is None else contexts.rows
    length = _length(network, params, inputs, name)
    mask = np.ones((batch, length), bool) if contexts.mask is None else contexts.mask
    problems = []
    if contexts.positions.ndim != 1 or rows.shape != contexts.positions.shape:
        problems.append(
            f"positions {contexts.positions.shape} and rows {rows.shape} must be one list each, "
            "equally long"
        )
    elif not count:
        problems.append("there is no context: positions is empty")
    if tuple(mask.shape) != (batch, length):
        problems.append(f"mask has shape {mask.shape}, the sequences {(batch, length)}")
    if not problems and not is_traced((inputs, contexts.positions, rows, mask)):
        problems = _value_problems(
            np.asarray(contexts.positions),
            np.asarray(rows),
            np.asarray(mask, bool),
            network.takes_mask,
        )
    if problems:
        raise ValueError(f"{name}: " + "; ".join(problems) + ".")
    return Contexts(
        inputs,
        # concrete indices stay numpy, so that they can be read under jit
        contexts.positions if is_traced(contexts.positions) else np.asarray(contexts.positions),
        rows if is_traced(rows) else np.asarray(rows),
        mask if is_traced(mask) else np.asarray(mask, bool),
    )


class GroupedContexts(NamedTuple):
    """Contexts grouped by sequence, so that each sequence is evaluated once.

    tokens: inputs of S sequences, S in front.
    mask: `[S, T]`.
    positions: `[S, P]`, unused slots 0.
    slots: `[O]` slot s·P + p of each context.
    """

    tokens: Any
    mask: Array
    positions: Array
    slots: Array


def group_by_sequence(contexts: Contexts) -> GroupedContexts:
    """Group checked contexts by sequence; traced ones stay one sequence each."""
    sequences: Array | np.ndarray | None
    slots: Array | np.ndarray
    positions_SP: Array | np.ndarray
    if is_traced((contexts.rows, contexts.positions)):
        sequences, slots = contexts.rows, np.arange(contexts.count)
        positions_SP = contexts.positions[:, None]
    else:
        rows_O, positions_O = np.asarray(contexts.rows), np.asarray(contexts.positions)
        sequences, sequence_O = np.unique(rows_O, return_inverse=True)
        place_O = np.zeros_like(sequence_O)
        for s in range(len(sequences)):
            place_O[sequence_O == s] = np.arange((sequence_O == s).sum())
        width = int(place_O.max()) + 1
        positions_SP = np.zeros((len(sequences), width), np.int32)
        positions_SP[sequence_O, place_O] = positions_O
        slots = sequence_O * width + place_O
    return GroupedContexts(
        jax.tree.map(lambda leaf: jnp.asarray(leaf)[sequences], contexts.tokens),
        jnp.asarray(contexts.mask)[sequences],
        jnp.asarray(positions_SP),
        jnp.asarray(slots),
    )


def features_at(network: Network, params: Params, contexts: Contexts) -> Array:
    """Return the features φ of each context: `[O, D]`."""
    features_NTD = network.read(params, contexts.tokens, contexts.mask)
    return features_NTD[contexts.rows, contexts.positions]


def _check_ids(tokens: Any, vocab: int, name: str) -> None:
    is_array = isinstance(tokens, jax.Array | np.ndarray)
    if not is_array or tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        kind = f"{tokens.dtype} {tokens.shape}" if is_array else type(tokens).__name__
        raise ValueError(f"{name}.tokens must be integer ids of shape [N, T], not {kind}.")
    if not is_traced(tokens) and tokens.size:
        lowest, highest = int(np.min(np.asarray(tokens))), int(np.max(np.asarray(tokens)))
        if lowest < 0 or highest >= vocab:
            raise ValueError(
                f"{name}.tokens has ids from {lowest} to {highest}; the vocabulary is [0, {vocab})."
            )


def _length(network: Network, params: Params, inputs: Any, name: str) -> int:
    """Return T; features must be `[N, T, D]` with the head's D."""
    leaf = jax.tree.leaves(inputs)[0]
    mask = jnp.ones(leaf.shape[:2], bool)
    shape = jax.eval_shape(network.read, params, inputs, mask).shape
    width = network.weight(params).shape[1]
    if len(shape) != 3 or shape[0] != leaf.shape[0] or shape[2] != width:
        raise ValueError(
            f"features of {name} have shape {shape}; the head's weight needs "
            f"({leaf.shape[0]}, T, {width}). Is the head transposed?"
        )
    return shape[1]


def _value_problems(
    positions: np.ndarray, rows: np.ndarray, mask: np.ndarray, takes_mask: bool
) -> list[str]:
    count, length = mask.shape
    problems = _range_problems(positions, length, "positions")
    problems += _range_problems(rows, count, "rows")
    if problems:
        return problems
    if not (real := mask[rows, positions]).all():
        problems.append(f"contexts {shorten(np.flatnonzero(~real))} end on padding")
    before = np.arange(length)[None] <= positions[:, None]
    hole = (before & ~mask[rows]).any(axis=1)
    if hole.any() and not takes_mask:
        problems.append(
            f"contexts {shorten(np.flatnonzero(hole))} have padding before them, which a network "
            "without takes_mask cannot see; pad on the right, or let features take the mask"
        )
    return problems


def _range_problems(values: np.ndarray, limit: int, name: str) -> list[str]:
    bad = np.flatnonzero((values < 0) | (values >= limit))
    if not bad.size:
        return []
    return [f"{name} {shorten(values.ravel()[bad])} are outside [0, {limit})"]
