"""Pieces every decoder family shares: attention over a cache, norms, a layer scan.

Attention is written out instead of calling `jax.nn.dot_product_attention`: that one casts the
softmax to float32 (float64 kernels need float64 throughout) and its fused forms have no
forward-mode derivative, which the kernels need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ntkrl import trees
from ntkrl.models.family import Adapters, Running
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


def attention(
    queries: Array,
    keys: Array,
    values: Array,
    allowed: Array,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Array:
    """Attend from each query to the allowed keys.

    Args:
      queries: `[B, T, H, E]`.
      keys, values: `[B, K, S, E]`, H a multiple of K.
      allowed: `[B, T, S]` bool. A query with no allowed key (padding) gets the mean value:
        finite, and never read.
      scale: factor on the scores; None for the usual 1/√E.
      soft_cap: κ of κ tanh(score / κ), or None.

    Returns:
      `[B, T, H, E]`, in the dtype of `values`.
    """
    batch, length, heads, width = queries.shape
    shared, columns = keys.shape[1:3]
    group = heads // shared
    # the dot's batch axes first and its rows together: CPUs are twice as fast than on "btkge,bske"
    rows_BKRE = jnp.transpose(
        queries.reshape(batch, length, shared, group, width), (0, 2, 3, 1, 4)
    ).reshape(batch, shared, group * length, width)
    scores_BKRS = at_least_float32(jnp.einsum("bkre,bkse->bkrs", rows_BKRE, keys))
    scores_BKRS *= width**-0.5 if scale is None else scale
    if soft_cap is not None:
        scores_BKRS = soft_cap * jnp.tanh(scores_BKRS / soft_cap)
    scores_BKGTS = scores_BKRS.reshape(batch, shared, group, length, columns)
    lowest = jnp.finfo(scores_BKGTS.dtype).min
    scores_BKGTS = jnp.where(allowed[:, None, None], scores_BKGTS, lowest)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(values.dtype)
    probs_BKRS = probs_BKGTS.reshape(batch, shared, group * length, columns)
    mixed_BKRE = jnp.einsum("bkrs,bkse->bkre", probs_BKRS, values)
    mixed_BKGTE = mixed_BKRE.reshape(batch, shared, group, length, width)
    return jnp.transpose(mixed_BKGTE, (0, 3, 1, 2, 4)).reshape(batch, length, heads, width)


class RMSNorm(nnx.Module):
    """x / √(mean x² + ε) · (offset + scale), in float32 or better; Zhang & Sennrich 1910.07467."""

    def __init__(self, width: int, epsilon: float, dtype: Any, offset: float = 0.0):
        self.epsilon, self.offset = epsilon, offset
        self.scale = nnx.Param(jnp.full((width,), 1.0 - offset, dtype))

    def __call__(self, x: Array) -> Array:
        wide = at_least_float32(x)
        size = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        scale = self.offset + self.scale[...].astype(wide.dtype)
        scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * jax.lax.rsqrt(size + self.epsilon) * scale).astype(x.dtype)


class MLP(nnx.Module):
    """down(act(up x)), both with bias."""

    def __init__(self, config: Any, rngs: nnx.Rngs, dtype: Any):
        make = linear(config, rngs, dtype)
        self.activation = config.hidden_act
        sizes = (config.hidden_size, config.intermediate_size)
        self.up, self.down = make("mlp/up", *sizes, True), make("mlp/down", *sizes[::-1], True)

    def __call__(self, x: Array) -> Array:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


def layer_norm(width: int, epsilon: float, rngs: nnx.Rngs, dtype: Any) -> nnx.LayerNorm:
    """Return a LayerNorm with bias that agrees with torch's to rounding."""
    # the fast variance E[x²] − E[x]² loses digits that parity with the reference needs
    kept = {"use_fast_variance": False, "param_dtype": dtype, "rngs": rngs}
    return nnx.LayerNorm(width, epsilon=epsilon, **kept)


class Adapted(nnx.Linear):
    """A Linear with a low-rank adapter: x W + (x A B) α/r + b; Hu et al. 2106.09685."""

    def __init__(self, inputs: int, outputs: int, adapters: Adapters, rngs: nnx.Rngs, **given: Any):
        super().__init__(inputs, outputs, rngs=rngs, **given)
        self.scaling, dtype = adapters.scaling, given["param_dtype"]
        # as PEFT starts them: A uniform in ±1/√inputs, B zero
        start = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.lora_a = nnx.Param(start(rngs.params(), (inputs, adapters.rank), dtype))
        self.lora_b = nnx.Param(jnp.zeros((adapters.rank, outputs), dtype))

    def __call__(self, x: Array) -> Array:
        moved = (x @ self.lora_a[...].astype(x.dtype)) @ self.lora_b[...].astype(x.dtype)
        return super().__call__(x) + self.scaling * moved


def linear(config: Any, rngs: nnx.Rngs, dtype: Any) -> Callable[..., nnx.Linear]:
    """Return `(name, inputs, outputs, use_bias) -> nnx.Linear` with normal weights.

    Args:
      config: of a family; its `initializer_range` and `adapters` count.
      rngs, dtype: of the parameters.
    """
    init = nnx.initializers.normal(config.initializer_range)

    def make(name: str, inputs: int, outputs: int, use_bias: bool) -> nnx.Linear:
        given = {"use_bias": use_bias, "kernel_init": init, "param_dtype": dtype, "rngs": rngs}
        if config.adapters is not None and name in config.adapters.modules:
            return Adapted(inputs, outputs, config.adapters, **given)
        return nnx.Linear(inputs, outputs, **given)

    return make


def embedding(rows: int, width: int, deviation: float, rngs: nnx.Rngs, dtype: Any) -> nnx.Embed:
    """Return a table `[rows, width]` of normal numbers."""
    init = nnx.initializers.normal(deviation)
    return nnx.Embed(rows, width, embedding_init=init, param_dtype=dtype, rngs=rngs)


def look_up(table: nnx.Embed, tokens: Array, running: Running) -> Array:
    """Return the rows `[..., D]` of a table, its columns gathered and not the tokens' rows."""
    held_VD = trees.constrain(table.embedding[...], running.mesh, "tensor", None)
    return trees.spread_rows(jnp.take(held_VD, tokens, axis=0), running.mesh)


class Sight(NamedTuple):
    """What a kind of layer (local, global) makes of the tokens' places.

    turns: rotary cos and sin `[B, T, R]`, or None without rotary positions.
    allowed: `[B, T, S]` which keys each query may see.
    """

    turns: tuple[Array, Array] | None
    allowed: Array


class Reading(NamedTuple):
    """What a layer needs to know about the tokens it reads.

    turns, allowed: of its Sight.
    start: column of the cache where the new keys go, or None without a cache.
    """

    turns: tuple[Array, Array] | None
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
    sights: Sequence[Sight],
    kinds: Sequence[int] | None,
    cache: Cache | None,
    running: Running,
) -> tuple[Array, Cache | None]:
    """Run stacked layers in turn, writing the cache in place along the way.

    Args:
      layers: a module whose leaves carry a leading layer axis.
      x_BTD: what enters the first layer.
      sights: one per kind of layer.
      kinds: per layer the index of its Sight; None where there is one.
      cache: keys and values read so far, mask and length as after these tokens; or None.
      running: what is kept of a layer for the backward pass, and the mesh.
    """
    graphdef, state = nnx.split(layers)
    start = None if cache is None else cache.length - x_BTD.shape[1]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *sights)

    def body(carry, layer):
        x_BTD, keys, values = carry
        layer_state, index, kind = layer
        module = nnx.merge(graphdef, layer_state)
        sight = sights[0] if kind is None else jax.tree.map(lambda leaf: leaf[kind], together)
        reading = Reading(*sight, start)

        def remember(new_keys: Array, new_values: Array) -> tuple[Array, Array]:
            nonlocal keys, values
            new_keys, new_values = (jnp.swapaxes(new, 1, 2) for new in (new_keys, new_values))
            if keys is None:
                return new_keys, new_values
            at = (index, 0, 0, start, 0)
            keys = jax.lax.dynamic_update_slice(keys, new_keys[None].astype(keys.dtype), at)
            values = jax.lax.dynamic_update_slice(values, new_values[None].astype(values.dtype), at)
            return keys[index].astype(x_BTD.dtype), values[index].astype(x_BTD.dtype)

        x_BTD = trees.spread_rows(module(x_BTD, reading, remember), running.mesh)
        return (x_BTD, keys, values), None

    count = jax.tree.leaves(state)[0].shape[0]
    if running.remat != "none":
        # all but the products is cheaper to make again than to write out and read
        policies = jax.checkpoint_policies
        products = running.remat == "products"
        kept = policies.dots_with_no_batch_dims_saveable if products else policies.nothing_saveable
        body = jax.checkpoint(body, policy=kept, prevent_cse=False)
    held = (None, None) if cache is None else (cache.keys, cache.values)
    per_layer = (state, jnp.arange(count), None if kinds is None else jnp.asarray(kinds))
    (x_BTD, keys, values), _ = jax.lax.scan(body, (x_BTD, *held), per_layer)
    if cache is None:
        return x_BTD, None
    return x_BTD, cache.replace(keys=keys, values=values)


class Places(NamedTuple):
    """Where the tokens that are read stand.

    positions: `[B, T]`, counted over real tokens, of each segment by itself.
    allowed: `[B, T, S]` real keys no later than each query, of its segment.
    distance: `[T, S]` columns from key to query.
    """

    positions: Array
    allowed: Array
    distance: Array

    def within(self, window: int | None) -> Array:
        """Return `allowed` for queries that see their last `window` tokens, themselves included."""
        return self.allowed if window is None else self.allowed & (self.distance < window)[None]


def places(mask_BT: Array, cache: Cache | None) -> tuple[Places, Cache | None]:
    """Return the places of newly read tokens, and the cache with their mask written.

    Args:
      mask_BT: bool, or segment numbers (see types.Policy).
      cache: what was read before, or None.

    Raises:
      ValueError: segment numbers where there is a cache.
    """
    packed = mask_BT.dtype != bool
    if cache is None:
        before_B1, mask_BS, first = 0, mask_BT, 0
    elif packed:
        raise ValueError(
            f"decode continues one sequence per row and takes a bool mask, not {mask_BT.dtype}; "
            "rows of several sequences are read by features alone."
        )
    else:
        before_B1 = jnp.sum(cache.mask, axis=1, keepdims=True)
        mask_BS = jax.lax.dynamic_update_slice(cache.mask, mask_BT, (0, cache.length))
        first = cache.length
        cache = cache.replace(mask=mask_BS, length=cache.length + mask_BT.shape[1])
    columns_T, columns_S = first + jnp.arange(mask_BT.shape[1]), jnp.arange(mask_BS.shape[1])
    distance_TS = columns_T[:, None] - columns_S[None, :]
    allowed_BTS = (distance_TS >= 0)[None] & mask_BS.astype(bool)[:, None, :]
    if packed:
        allowed_BTS &= mask_BT[:, :, None] == mask_BS[:, None, :]
        counted_BT = jnp.sum(allowed_BTS, axis=2)
    else:
        counted_BT = before_B1 + jnp.cumsum(mask_BT, axis=1)
    return Places(jnp.maximum(counted_BT - 1, 0), allowed_BTS, distance_TS), cache
