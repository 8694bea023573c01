"""Pieces every decoder family shares: attention over a cache, rotary positions, a layer scan.

Attention is written out instead of calling `jax.nn.dot_product_attention`: that one casts the
softmax to float32 (float64 kernels need float64 throughout) and its fused forms have no
forward-mode derivative, which the kernels need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ntkrl.numerics import at_least_float32
from ntkrl.types import Array, Cache

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_fast": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}
"""Hugging Face's activation names that the families here accept."""


def attention(queries: Array, keys: Array, values: Array, allowed: Array) -> Array:
    """Attend from each query to the allowed keys, with the usual 1/√E scale.

    Args:
      queries: `[B, T, H, E]`.
      keys, values: `[B, S, K, E]`, H a multiple of K.
      allowed: `[B, T, S]` bool. A query with no allowed key (padding) gets the mean value:
        finite, and never read.

    Returns:
      `[B, T, H, E]`, in the dtype of `values`.
    """
    batch, length, heads, width = queries.shape
    kv_heads = keys.shape[2]
    grouped_BTKGE = queries.reshape(batch, length, kv_heads, heads // kv_heads, width)
    scores_BKGTS = at_least_float32(jnp.einsum("btkge,bske->bkgts", grouped_BTKGE, keys))
    lowest = jnp.finfo(scores_BKGTS.dtype).min
    scores_BKGTS = jnp.where(allowed[:, None, None], scores_BKGTS * width**-0.5, lowest)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(values.dtype)
    mixed_BTKGE = jnp.einsum("bkgts,bske->btkge", probs_BKGTS, values)
    return mixed_BTKGE.reshape(batch, length, heads, width)


def rotary_tables(positions: Array, size: int, theta: float) -> tuple[Array, Array]:
    """Return cos and sin `[B, T, size]` of the half-rotation form (Su et al. 2104.09864).

    Args:
      positions: `[B, T]` int.
      size: rotated dimensions of a head, even.
      theta: base of the geometric frequencies.
    """
    exponents = jnp.arange(0, size, 2).astype(float)  # float64 under x64, else float32
    frequencies = theta ** (-exponents / size)
    angles_BTF = jnp.einsum("bt,f->btf", positions.astype(frequencies.dtype), frequencies)
    angles_BTE = jnp.concatenate([angles_BTF, angles_BTF], axis=-1)
    return jnp.cos(angles_BTE), jnp.sin(angles_BTE)


def rotate(heads: Array, tables: tuple[Array, Array]) -> Array:
    """Rotate the first dimensions of each head, as many as the tables have; pass the rest.

    Args:
      heads: `[B, T, H, E]`.
      tables: cos and sin, each `[B, T, R]`, R ≤ E.
    """
    cos, sin = (table[:, :, None, :] for table in tables)
    size = cos.shape[-1]
    turned, kept = heads[..., :size], heads[..., size:]
    low, high = jnp.split(turned, 2, axis=-1)
    turned = turned * cos + jnp.concatenate([-high, low], axis=-1) * sin
    return jnp.concatenate([turned.astype(heads.dtype), kept], axis=-1)


class Reading(NamedTuple):
    """What a layer needs to know about the tokens it reads, equal for all layers.

    tables: rotary cos and sin.
    allowed: `[B, T, S]` which keys each query may see.
    start: column of the cache where the new keys go, or None without a cache.
    """

    tables: tuple[Array, Array]
    allowed: Array
    start: Array | None


def stacked(make_layer: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs):
    """Build one module whose every leaf carries a leading layer axis."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make_layer(nnx.Rngs(0))))
    keys = jax.random.split(rngs.params(), layers)
    state = jax.vmap(lambda key: nnx.split(make_layer(nnx.Rngs(key)))[1])(keys)
    return nnx.merge(graphdef, state)


def scan_layers(
    layers: nnx.Module,
    x_BTD: Array,
    reading: Reading,
    cache: Cache | None,
    remat: bool,
) -> tuple[Array, Cache | None]:
    """Run stacked layers in turn, writing the cache in place along the way."""
    graphdef, state = nnx.split(layers)

    def body(carry, layer):
        x_BTD, keys, values = carry
        layer_state, index = layer
        module = nnx.merge(graphdef, layer_state)

        def remember(new_keys: Array, new_values: Array) -> tuple[Array, Array]:
            nonlocal keys, values
            if keys is None:
                return new_keys, new_values
            at = (index, 0, reading.start, 0, 0)
            keys = jax.lax.dynamic_update_slice(keys, new_keys[None].astype(keys.dtype), at)
            values = jax.lax.dynamic_update_slice(values, new_values[None].astype(values.dtype), at)
            return keys[index].astype(x_BTD.dtype), values[index].astype(x_BTD.dtype)

        x_BTD = module(x_BTD, reading, remember)
        return (x_BTD, keys, values), None

    count = jax.tree.leaves(state)[0].shape[0]
    body = jax.checkpoint(body) if remat else body
    held = (None, None) if cache is None else (cache.keys, cache.values)
    (x_BTD, keys, values), _ = jax.lax.scan(body, (x_BTD, *held), (state, jnp.arange(count)))
    if cache is None:
        return x_BTD, None
    return x_BTD, cache.replace(keys=keys, values=values)


def positions_and_mask(mask_BT: Array, cache: Cache | None) -> tuple[Array, Array, Cache | None]:
    """Return positions `[B, T]`, allowed `[B, T, S]` and the cache with the mask written."""
    if cache is None:
        columns = jnp.arange(mask_BT.shape[1])
        positions_BT = jnp.maximum(jnp.cumsum(mask_BT, axis=1) - 1, 0)
        allowed_BTS = (columns[None, :, None] >= columns[None, None, :]) & mask_BT[:, None, :]
        return positions_BT, allowed_BTS, None
    before_B1 = jnp.sum(cache.mask, axis=1, keepdims=True)
    positions_BT = jnp.maximum(before_B1 + jnp.cumsum(mask_BT, axis=1) - 1, 0)
    mask_BS = jax.lax.dynamic_update_slice(cache.mask, mask_BT, (0, cache.length))
    columns_S = jnp.arange(mask_BS.shape[1])
    columns_T = cache.length + jnp.arange(mask_BT.shape[1])
    allowed_BTS = (columns_T[None, :, None] >= columns_S[None, None, :]) & mask_BS[:, None, :]
    cache = cache.replace(mask=mask_BS, length=cache.length + mask_BT.shape[1])
    return positions_BT, allowed_BTS, cache
