"""Totals and lengths: small things every floor above needs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal

from ntkrl.types import Array, Total


def at_least_float32(values: Array) -> Array:
    """Cast to float32 unless the dtype is already wider."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


SHORTEST_BUCKET = 8
GIB = 2**30
"""Bytes of a GiB."""
HIGHEST = jax.lax.Precision.HIGHEST
einsum = functools.partial(jnp.einsum, precision=HIGHEST)
"""Products in full precision: accelerators otherwise multiply float32 in fewer bits."""


def bucket_length(longest: int, maximum: int) -> int:
    """Return the length to pad to: few different ones, since each compiles anew.

    Args:
      longest: tokens of the longest row, 1 to `maximum`.
      maximum: longest row allowed (tokens).

    Returns:
      The smallest power of two that is at least `longest` and 8, or `maximum` if smaller.

    Raises:
      ValueError: `longest` outside its range.
    """
    if not 1 <= longest <= maximum:
        raise ValueError(f"the longest row has {longest} tokens; allowed are 1 to {maximum}.")
    return min(max(SHORTEST_BUCKET, 1 << (longest - 1).bit_length()), maximum)


def masked_total(values: Array, mask: Array) -> Total:
    """Sum `values` where `mask`, and count the mask; both of one shape."""
    return Total(jnp.sum(jnp.where(mask, values, 0)), jnp.sum(mask))


def mean(total: Total) -> Array:
    """Divide a Total; an empty one is 0, never NaN."""
    return total.total / jnp.maximum(total.count, 1)


def primal(tree: Any) -> tuple[Any, bool]:
    """Unwrap an argument of a custom_vjp's forward rule that was defined with symbolic_zeros.

    Returns:
      `(values, moved)`, moved where a cotangent of some leaf is wanted.
    """

    def is_wrapped(leaf: Any) -> bool:
        return isinstance(leaf, CustomVJPPrimal)

    wrapped = jax.tree.leaves(tree, is_leaf=is_wrapped)
    values = jax.tree.map(lambda leaf: leaf.value, tree, is_leaf=is_wrapped)
    return values, any(leaf.perturbed for leaf in wrapped)
