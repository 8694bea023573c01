"""Which positions of which sequences a kernel is about."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl.types import Array, Params, Policy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Contexts:
    """O positions in N sequences; the network is read at each, with all that precedes it.

    tokens: `[N, T]` int ids.
    positions: `[O]` int column of each context's last token, in [0, T).
    rows: `[O]` int sequence of each context; None means one position per sequence (O = N).
    mask: `[N, T]` bool, True on real tokens; None means all are.
    """

    tokens: Array
    positions: Array
    rows: Array | None = None
    mask: Array | None = None

    @property
    def count(self) -> int:
        """O."""
        return self.positions.shape[0]


def checked(contexts: Contexts, what: str) -> Contexts:
    """Return the contexts with rows and mask filled in, or say all that is wrong with them.

    Args:
      contexts: concrete (not traced) contexts.
      what: how they are called in messages.

    Raises:
      ValueError: wrong ranks or lengths, positions or rows out of range, or on padding.
    """
    tokens = np.asarray(contexts.tokens)
    positions = np.asarray(contexts.positions)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"{what}.tokens must be integer ids of shape [N, T], not {tokens.dtype} {tokens.shape}."
        )
    count, length = tokens.shape
    if contexts.rows is None and positions.shape != (count,):
        raise ValueError(
            f"{what}.positions has shape {positions.shape}, but without rows there is one position "
            f"per sequence, ({count},); give rows to choose several."
        )
    rows = np.arange(count) if contexts.rows is None else np.asarray(contexts.rows)
    mask = np.ones_like(tokens, bool) if contexts.mask is None else np.asarray(contexts.mask)
    problems = []
    if positions.ndim != 1 or rows.shape != positions.shape:
        problems.append(
            f"positions {positions.shape} and rows {rows.shape} must be one list each, equally long"
        )
    if mask.shape != tokens.shape:
        problems.append(f"mask has shape {mask.shape}, tokens {tokens.shape}")
    problems += _outside(positions, length, "positions") + _outside(rows, count, "rows")
    if not problems and not (real := mask[rows, positions].astype(bool)).all():
        problems.append(f"contexts {_first(np.flatnonzero(~real))} end on padding")
    if problems:
        raise ValueError(f"{what}: " + "; ".join(problems) + ".")
    return Contexts(
        jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(rows), jnp.asarray(mask, bool)
    )


def features_at(policy: Policy, params: Params, contexts: Contexts) -> Array:
    """Return the features φ of each context: `[O, D]`."""
    features_NTD = policy.features(params, contexts.tokens, contexts.mask)
    return features_NTD[contexts.rows, contexts.positions]


def _outside(values: np.ndarray, limit: int, name: str) -> list[str]:
    bad = np.flatnonzero((values < 0) | (values >= limit))
    if not bad.size:
        return []
    return [f"{name} {_first(values.ravel()[bad])} are outside [0, {limit})"]


def _first(values: Any, most: int = 8) -> str:
    shown = ", ".join(str(value) for value in values[:most])
    return shown if len(values) <= most else f"{shown} and {len(values) - most} more"
