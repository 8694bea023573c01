"""Grouped matrix products, y_m = x_m W[g_m]: the matrix of each row is chosen by its group.

JAX's `ragged_dot` has no `vmap` over rows with shared matrices, which kernels need, and on CPU and
GPU it multiplies every row by every matrix. The two primitives here, the product and the sum of
outer products of each group, are each other's derivatives and closed under `vmap`: a mapped axis
joins the rows, the groups or the columns. Rows are sorted by group and padded to blocks of a single
group, which a scan multiplies one by one; shapes are static whatever the groups.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ntkrl.numerics import HIGHEST, at_least_float32
from ntkrl.types import Array

SMALLEST_BLOCK, LARGEST_BLOCK = 8, 128  # rows


def grouped_product(rows: Array, kernels: Array, groups: Array) -> Array:
    """Multiply each row with the matrix of its group.

    Args:
      rows: `[M, K]`.
      kernels: `[X, K, N]`, of the dtype of the rows.
      groups: `[M]` int32 in [0, X), in any order.

    Returns:
      `[M, N]`.
    """
    return product_p.bind(rows, kernels, groups)


def grouped_outer(rows: Array, columns: Array, groups: Array, count: int) -> Array:
    """Sum the outer products of each group's rows.

    Args:
      rows: `[M, K]`.
      columns: `[M, N]`, of the dtype of the rows.
      groups: `[M]` int32 in [0, count), in any order.
      count: X.

    Returns:
      `[X, K, N]`.
    """
    return outer_p.bind(rows, columns, groups, count=count)


def is_grouped(primitive: Primitive, *_: Any, **__: Any) -> bool:
    """Return True for the primitives of this module, as a policy of `jax.checkpoint`."""
    return primitive in (product_p, outer_p)


class _RowBlocks(NamedTuple):
    """Rows in blocks of a single group.

    source: `[blocks, rows]` row of each place, M in padding.
    place: `[M]` place of each row among all blocks' rows.
    group: `[blocks]`.
    """

    source: Array
    place: Array
    group: Array


def _blocks(groups: Array, count: int) -> _RowBlocks:
    total = groups.shape[0]
    # padding adds at most a fourth, unless groups are small
    ideal = 1 << max(total // (4 * count), 1).bit_length() - 1
    size = min(max(ideal, SMALLEST_BLOCK), LARGEST_BLOCK)
    number = total // size + min(count, total)
    order = jnp.argsort(groups)
    by_order = groups[order]
    counts = jnp.zeros(count, jnp.int32).at[groups].add(1)
    padded = -(-counts // size) * size
    ends = jnp.cumsum(padded)
    shift = (ends - padded) - (jnp.cumsum(counts) - counts)
    places = shift[by_order] + jnp.arange(total, dtype=jnp.int32)
    source = jnp.full(number * size, total, jnp.int32).at[places].set(order.astype(jnp.int32))
    place = jnp.zeros(total, jnp.int32).at[order].set(places)
    group = jnp.searchsorted(ends, jnp.arange(number) * size, side="right")
    group = jnp.minimum(group, count - 1).astype(jnp.int32)
    return _RowBlocks(source.reshape(number, size), place, group)


def _product(rows: Array, kernels: Array, groups: Array) -> Array:
    blocks = _blocks(groups, kernels.shape[0])

    def multiply(carry: None, block: tuple[Array, Array]) -> tuple[None, Array]:
        source, group = block
        part = jnp.take(rows, source, axis=0, mode="fill", fill_value=0)
        kernel = jax.lax.dynamic_index_in_dim(kernels, group, keepdims=False)
        return carry, jnp.matmul(part, kernel, precision=HIGHEST)

    _, results = jax.lax.scan(multiply, None, (blocks.source, blocks.group))
    return results.reshape(-1, kernels.shape[2])[blocks.place]


def _outer(rows: Array, columns: Array, groups: Array, *, count: int) -> Array:
    blocks = _blocks(groups, count)
    wide = at_least_float32(rows[:0]).dtype

    def add(total: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
        source, group = block
        left, right = (
            jnp.take(x, source, axis=0, mode="fill", fill_value=0) for x in (rows, columns)
        )
        part = jnp.matmul(left.T, right, precision=HIGHEST, preferred_element_type=wide)
        part += jax.lax.dynamic_index_in_dim(total, group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total, part, group, 0), None

    start = jnp.zeros((count, rows.shape[1], columns.shape[1]), wide)
    total, _ = jax.lax.scan(add, start, (blocks.source, blocks.group))
    return total.astype(rows.dtype)


def _primitive(name: str, function: Any, shape: Any) -> Primitive:
    primitive = Primitive(name)
    primitive.def_impl(functools.partial(_run, function))
    primitive.def_abstract_eval(
        lambda rows, other, groups, **options: ShapedArray(shape(rows, other, options), rows.dtype)
    )
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    return primitive


def _run(function: Any, *operands: Array, **options: Any) -> Array:
    return jax.jit(function, static_argnames=tuple(options))(*operands, **options)


def _batch_product(operands: Any, axes: Any) -> tuple[Array, int]:
    rows, kernels, groups = operands
    if axes[0] is None and axes[2] is None:  # the axis joins the columns
        kernels = jnp.moveaxis(kernels, axes[1], 3)
        joined = kernels.reshape(*kernels.shape[:2], -1)
        result = product_p.bind(rows, joined, groups)
        return result.reshape(rows.shape[0], *kernels.shape[2:]), 2
    size = _mapped_size(operands, axes)
    rows, groups = (_leading(x, axis, size) for x, axis in ((rows, axes[0]), (groups, axes[2])))
    if axes[1] is not None:
        kernels = jnp.moveaxis(kernels, axes[1], 0)
        groups = groups + kernels.shape[1] * jnp.arange(size, dtype=groups.dtype)[:, None]
        kernels = kernels.reshape(-1, *kernels.shape[2:])
    joined = rows.reshape(-1, rows.shape[2])
    result = product_p.bind(joined, kernels, groups.reshape(-1))
    return result.reshape(*rows.shape[:2], -1), 0


def _batch_outer(operands: Any, axes: Any, *, count: int) -> tuple[Array, int]:
    rows, columns, groups = operands
    if axes[0] is None and axes[2] is None:
        columns = jnp.moveaxis(columns, axes[1], 2)
        result = outer_p.bind(rows, columns.reshape(columns.shape[0], -1), groups, count=count)
        return result.reshape(*result.shape[:2], *columns.shape[1:]), 3
    if axes[1] is None and axes[2] is None:
        rows = jnp.moveaxis(rows, axes[0], 1)
        result = outer_p.bind(rows.reshape(rows.shape[0], -1), columns, groups, count=count)
        return result.reshape(count, *rows.shape[1:], -1), 1
    size = _mapped_size(operands, axes)
    rows, columns, groups = (_leading(x, a, size) for x, a in zip(operands, axes, strict=True))
    groups = groups + count * jnp.arange(size, dtype=groups.dtype)[:, None]
    rows, columns = (x.reshape(-1, x.shape[2]) for x in (rows, columns))
    result = outer_p.bind(rows, columns, groups.reshape(-1), count=size * count)
    return result.reshape(size, count, *result.shape[1:]), 0


def _mapped_size(operands: Any, axes: Any) -> int:
    pairs = zip(operands, axes, strict=True)
    return next(x.shape[axis] for x, axis in pairs if axis is not None)


def _leading(x: Array, axis: int | None, size: int) -> Array:
    return jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)


def _transpose_product(cotangent: Any, rows: Any, kernels: Any, groups: Array):
    if type(cotangent) is ad.Zero:
        return None, None, None
    if ad.is_undefined_primal(rows):
        return product_p.bind(cotangent, jnp.swapaxes(kernels, 1, 2), groups), None, None
    count = kernels.aval.shape[0]
    return None, outer_p.bind(rows, cotangent, groups, count=count), None


def _transpose_outer(cotangent: Any, rows: Any, columns: Any, groups: Array, *, count: int):
    if type(cotangent) is ad.Zero:
        return None, None, None
    if ad.is_undefined_primal(rows):
        swapped = jnp.swapaxes(cotangent, 1, 2)
        return product_p.bind(columns, swapped, groups), None, None
    return None, product_p.bind(rows, cotangent, groups), None


product_p = _primitive(
    "grouped_product", _product, lambda rows, kernels, _: (rows.shape[0], kernels.shape[2])
)
outer_p = _primitive(
    "grouped_outer",
    _outer,
    lambda rows, columns, options: (options["count"], rows.shape[1], columns.shape[1]),
)
for _p in (product_p, outer_p):  # both are linear in each of the first two operands
    ad.defjvp(
        _p,
        lambda change, _, other, groups, _p=_p, **options: _p.bind(
            change, other, groups, **options
        ),
        lambda change, rows, _, groups, _p=_p, **options: _p.bind(rows, change, groups, **options),
        None,
    )
batching.primitive_batchers[product_p] = _batch_product
batching.primitive_batchers[outer_p] = _batch_outer
ad.primitive_transposes[product_p] = _transpose_product
ad.primitive_transposes[outer_p] = _transpose_outer
