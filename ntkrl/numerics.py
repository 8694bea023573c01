"""Totals, padded lengths, products with weights and scans over microbatches."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from ntkrl.messages import quoted
from ntkrl.types import Array, Total


def at_least_float32(values: Array) -> Array:
    """Cast to float32 unless the dtype is already wider."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
"""Dtypes of params, networks and key-value caches, by their name in a config."""
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
      `(values, perturbed)`, perturbed where a cotangent of some leaf is needed.
    """

    def is_wrapped(leaf: Any) -> bool:
        return isinstance(leaf, CustomVJPPrimal)

    wrapped = jax.tree.leaves(tree, is_leaf=is_wrapped)
    values = jax.tree.map(lambda leaf: leaf.value, tree, is_leaf=is_wrapped)
    return values, any(leaf.perturbed for leaf in wrapped)


def split_rows(tree: Any, parts: int) -> Any:
    """Split arrays `[B, …]` along the rows: `[parts, ⌈B/parts⌉, …]`, zeros at the end.

    Part k holds rows k, k + parts, …: rows sharded over devices stay sharded in every part.
    """

    def split(leaf: Array) -> Array:
        rows = -(-leaf.shape[0] // parts)
        padding = [(0, rows * parts - leaf.shape[0])] + [(0, 0)] * (leaf.ndim - 1)
        return jnp.moveaxis(jnp.pad(leaf, padding).reshape(rows, parts, *leaf.shape[1:]), 1, 0)

    return jax.tree.map(split, tree)


def join_rows(values: Array, rows: int) -> Array:
    """Undo `split_rows` of one array."""
    return jnp.moveaxis(values, 0, 1).reshape(-1, *values.shape[2:])[:rows]


def scan_microbatches(
    function: Callable[[Any], tuple[Any, Any]], parts: Any, combine: Callable[[Any, Any], Any]
) -> tuple[Any, Any]:
    """Apply a function to one part of a batch after another and accumulate its first result.

    Args:
      function: `part -> (sums, outputs)`.
      parts: arrays with the parts in front, for instance from `split_rows`.
      combine: adds the sums of two parts; it starts from zeros.

    Returns:
      The combined sums, and the outputs of each part, stacked.
    """
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    if jax.tree.leaves(parts)[0].shape[0] == 1:
        sums, outputs = function(first)
        return sums, jax.tree.map(lambda leaf: leaf[None], outputs)
    shapes, _ = jax.eval_shape(function, first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def body(sums: Any, part: Any) -> tuple[Any, Any]:
        part_sums, outputs = function(part)
        return combine(sums, part_sums), outputs

    return jax.lax.scan(body, zeros, parts)


_reverse_mode = contextvars.ContextVar("reverse_mode", default=False)


@contextlib.contextmanager
def reverse_mode() -> Iterator[None]:
    """Trace `dense_product` for derivatives in reverse mode only."""
    token = _reverse_mode.set(True)
    try:
        yield
    finally:
        _reverse_mode.reset(token)


def dense_product(
    x: Array, weight_KM: Array, dimension_numbers: Any, precision: Any = None, **options: Any
) -> Array:
    """Multiply `[..., K]` by a weight `[K, M]`; a `dot_general` for flax's Linear.

    The gradient of the weight, xᵀ dy, contracts both operands over rows. XLA multiplies such a
    pair at about half speed on CPUs, and undoes a transposition that it can see. Under
    `reverse_mode` xᵀ is therefore written out on CPUs.
    """
    if not _reverse_mode.get():
        return jax.lax.dot_general(x, weight_KM, dimension_numbers, precision, **options)
    # explicit: the derivative is traced outside the caller's jax.default_matmul_precision
    return _dense_product(HIGHEST if precision is None else precision, x, weight_KM)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense_product(precision: Any, x: Array, weight_KM: Array) -> Array:
    return _contract(precision, x, x.ndim - 1, weight_KM, 0)


def _dense_product_forward(precision: Any, x: Any, weight_KM: Any) -> tuple[Array, Any]:
    (x, x_moves), (weight_KM, weight_moves) = primal(x), primal(weight_KM)
    product = _contract(precision, x, x.ndim - 1, weight_KM, 0)
    # a frozen weight needs no x
    return product, (x if weight_moves else None, weight_KM if x_moves else None)


def _dense_product_backward(
    precision: Any, residuals: tuple[Array | None, Array | None], cotangent: Array
) -> tuple[Array | None, Array | None]:
    x, weight_KM = residuals
    d_x = d_weight = None
    if isinstance(cotangent, SymbolicZero):
        return d_x, d_weight

    def written_out(x: Array, cotangent: Array) -> Array:
        # barriers: neither the arithmetic that gives x nor the product moves across the copy
        x_NK = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]))
        x_KN = jax.lax.optimization_barrier(x_NK.T)
        return _contract(precision, x_KN, 1, cotangent.reshape(-1, cotangent.shape[-1]), 0)

    def folded(x: Array, cotangent: Array) -> Array:
        rows = tuple(range(x.ndim - 1))
        return _contract(precision, cotangent, rows, x, rows).T

    if x is not None:
        d_weight = jax.lax.platform_dependent(x, cotangent, cpu=written_out, default=folded)
    if weight_KM is not None:
        d_x = _contract(precision, cotangent, cotangent.ndim - 1, weight_KM, 1)
    return d_x, d_weight


_dense_product.defvjp(_dense_product_forward, _dense_product_backward, symbolic_zeros=True)


def _contract(
    precision: Any,
    left: Array,
    left_axes: int | Sequence[int],
    right: Array,
    right_axes: int | Sequence[int],
) -> Array:
    """Multiply two arrays over an axis or axes of each."""
    first, second = ((a,) if isinstance(a, int) else a for a in (left_axes, right_axes))
    return jax.lax.dot_general(left, right, ((first, second), ((), ())), precision)


def check_dtype(dtype: Any) -> None:
    """Refuse a dtype of params or networks that is not of floating point.

    Raises:
      ValueError: no dtype, or one of whole numbers.
    """
    try:
        floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        known = ", ".join(repr(name) for name in DTYPES)
        raise ValueError(f"dtype is {quoted(dtype)}; pass one of floating point, such as {known}.")
