"""Building blocks of decoders: attention, rotary positions, norms, adapters, KV cache, layer scan.

Attention is written out instead of calling `jax.nn.dot_product_attention`: that one casts the
softmax to float32 (float64 kernels need float64 throughout) and its fused forms have no
forward-mode derivative, which the kernels need. From LONG tokens on it is computed for QUERIES
queries at a time, in memory that is linear in T.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from ntkrl import trees
from ntkrl.models.activations import softmax
from ntkrl.models.grouped import is_grouped
from ntkrl.models.positions import Visible
from ntkrl.numerics import at_least_float32, dense_product
from ntkrl.types import Array, Cache

REMAT = ("none", "products", "all")
"""Rematerialisation in the backward pass: nothing; all but products with weights; whole layers."""


QUERIES = 256
"""Queries of such a chunk."""
LONG_ATTENTION = "long_attention"
"""Name under which rematerialisation keeps its result."""


class Execution(NamedTuple):
    """Execution of a network.

    remat: one of REMAT.
    mesh: shards activations, rows over data and fsdp, heads over tensor; None leaves it to XLA.
    """

    remat: str = "products"
    mesh: Mesh | None = None


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Low-rank adapters (LoRA) on some matrix products of every layer.

    modules: our names within a layer, such as "attention/query".
    rank: r ≥ 1.
    scaling: factor α/r on their output.
    """

    modules: tuple[str, ...]
    rank: int
    scaling: float


def attention(
    queries: Array,
    keys: Array,
    values: Array,
    allowed: Array | Visible,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Array:
    """Attend from each query to the allowed keys.

    Args:
      queries: `[B, T, H, E]`.
      keys, values: `[B, K, S, E]`, H a multiple of K.
      allowed: `[B, T, S]` bool; or a Visible, for memory that is linear in T. A query with no
        allowed key (padding) gets the mean value: finite, and never read.
      scale: factor on the scores; None for the usual 1/√E.
      soft_cap: κ of κ tanh(score / κ), or None.

    Returns:
      `[B, T, H, E]`, in the dtype of `values`.
    """
    if isinstance(allowed, Visible):
        return _chunked_attention(queries, keys, values, allowed, (scale, soft_cap))
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
    probs_BKGTS = softmax(scores_BKGTS).astype(values.dtype)
    probs_BKRS = probs_BKGTS.reshape(batch, shared, group * length, columns)
    mixed_BKRE = jnp.einsum("bkrs,bkse->bkre", probs_BKRS, values)
    mixed_BKGTE = mixed_BKRE.reshape(batch, shared, group, length, width)
    return jnp.transpose(mixed_BKGTE, (0, 3, 1, 2, 4)).reshape(batch, length, heads, width)


def _chunked_attention(
    queries: Array,
    keys: Array,
    values: Array,
    visible: Visible,
    scaling: tuple[float | None, float | None],
) -> Array:
    """Return `attention` of QUERIES queries at a time; the backward pass computes scores again."""
    length, count = queries.shape[1], -(-queries.shape[1] // QUERIES)

    def split(per_query: Array, axis: int) -> Array:
        padding = [(0, 0)] * per_query.ndim
        padding[axis] = (0, count * QUERIES - length)
        shape = (*per_query.shape[:axis], count, QUERIES, *per_query.shape[axis + 1 :])
        return jnp.moveaxis(jnp.pad(per_query, padding).reshape(shape), axis, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def of_chunk(chunk: tuple[Array, Array, Array | None]) -> Array:
        queries, columns, segments = chunk
        selected = visible._replace(columns=(columns, visible.columns[1]))
        if segments is not None and visible.segments is not None:
            selected = selected._replace(segments=(segments, visible.segments[1]))
        return attention(queries, keys, values, selected.table(), *scaling)

    segments = None if visible.segments is None else split(visible.segments[0], 1)
    mixed = jax.lax.map(of_chunk, (split(queries, 1), split(visible.columns[0], 0), segments))
    mixed = jnp.moveaxis(mixed, 0, 1).reshape(queries.shape[0], -1, *queries.shape[2:])
    return checkpoint_name(mixed[:, :length], LONG_ATTENTION)


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


def layer_norm(width: int, epsilon: float, rngs: nnx.Rngs, dtype: Any) -> nnx.LayerNorm:
    """Return a LayerNorm with bias that agrees with torch's to rounding."""
    # the fast variance E[x²] − E[x]² loses digits that parity with the reference needs
    return nnx.LayerNorm(
        width, epsilon=epsilon, use_fast_variance=False, param_dtype=dtype, rngs=rngs
    )


class LoraLinear(nnx.Linear):
    """A Linear with a low-rank adapter: x W + (x A B) α/r + b; Hu et al. 2106.09685."""

    def __init__(
        self, inputs: int, outputs: int, adapters: Adapters, rngs: nnx.Rngs, **options: Any
    ):
        super().__init__(inputs, outputs, rngs=rngs, **options)
        self.scaling, dtype = adapters.scaling, options["param_dtype"]
        # initialised as in PEFT: A uniform in ±1/√inputs, B zero
        start = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.lora_a = nnx.Param(start(rngs.params(), (inputs, adapters.rank), dtype))
        self.lora_b = nnx.Param(jnp.zeros((adapters.rank, outputs), dtype))

    def __call__(self, x: Array) -> Array:
        update = (x @ self.lora_a[...].astype(x.dtype)) @ self.lora_b[...].astype(x.dtype)
        return super().__call__(x) + self.scaling * update


def linear(config: Any, rngs: nnx.Rngs, dtype: Any) -> Callable[..., nnx.Linear]:
    """Return `(name, inputs, outputs, use_bias) -> nnx.Linear` with normal weights.

    Args:
      config: with `initializer_range` and `adapters`.
      rngs, dtype: of the parameters.
    """
    init = nnx.initializers.normal(config.initializer_range)

    def make(name: str, inputs: int, outputs: int, use_bias: bool) -> nnx.Linear:
        options = {"use_bias": use_bias, "kernel_init": init, "param_dtype": dtype}
        options["dot_general"] = dense_product
        if config.adapters is not None and name in config.adapters.modules:
            return LoraLinear(inputs, outputs, config.adapters, rngs, **options)
        return nnx.Linear(inputs, outputs, rngs=rngs, **options)

    return make


def embedding(rows: int, width: int, deviation: float, rngs: nnx.Rngs, dtype: Any) -> nnx.Embed:
    """Return a table `[rows, width]` of normal numbers."""
    init = nnx.initializers.normal(deviation)
    return nnx.Embed(rows, width, embedding_init=init, param_dtype=dtype, rngs=rngs)


def embed_tokens(table: nnx.Embed, tokens: Array, mesh: Mesh | None) -> Array:
    """Return the rows `[..., D]` of a table, gathered over fsdp; tokens stay sharded by rows."""
    table_VD = trees.constrain(table.embedding[...], mesh, "tensor", None)
    return trees.spread_rows(jnp.take(table_VD, tokens, axis=0), mesh)


class AttentionInputs(NamedTuple):
    """Positions and visibility of the tokens, for one kind of layer (local or global).

    rotary: cos and sin `[B, T, R]`, or None without rotary positions.
    allowed: keys visible to each query, see `attention`.
    """

    rotary: tuple[Array, Array] | None
    allowed: Array | Visible


UpdateCache = Callable[[Array, Array], tuple[Array, Array]]
"""New keys and values `[B, T, K, E]` → all of the layer so far `[B, K, S, E]`."""


def stack_layers(make_layer: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs):
    """Return one module whose leaves are those of `count` layers, stacked on a leading axis."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make_layer(nnx.Rngs(0))))
    keys = jax.random.split(rngs.params(), count)
    state = jax.vmap(lambda key: nnx.split(make_layer(nnx.Rngs(key)))[1])(keys)
    return nnx.merge(graphdef, state)


def scan_layers(
    layers: nnx.Module,
    x_BTD: Array,
    inputs: Sequence[AttentionInputs],
    kinds: Sequence[int],
    execution: Execution,
) -> Array:
    """Run stacked layers in order.

    Args:
      layers: a module of `stack_layers`, called as `layer(x, inputs, update_cache, mesh)`.
      x_BTD: input of the first layer.
      inputs: one AttentionInputs per kind of layer.
      kinds: index into `inputs` per layer.
      execution: rematerialisation and mesh.
    """
    graphdef, state = nnx.split(layers)
    by_kind = jax.tree.map(lambda *leaves: jnp.stack(leaves), *inputs)

    def without_cache(keys: Array, values: Array) -> tuple[Array, Array]:
        return jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)

    def body(x_BTD, layer):
        layer_state, kind = layer
        module = nnx.merge(graphdef, layer_state)
        selected = inputs[0] if kind is None else jax.tree.map(lambda leaf: leaf[kind], by_kind)
        x_BTD = module(x_BTD, selected, without_cache, execution.mesh)
        return trees.spread_rows(x_BTD, execution.mesh), None

    if execution.remat != "none":
        # recomputing all but the products costs less than writing and reading it
        policies = jax.checkpoint_policies
        products = execution.remat == "products"
        save = policies.nothing_saveable
        if products:
            dots = policies.dots_with_no_batch_dims_saveable
            # of long attention the result is kept: its scores are computed again for each chunk
            kept = policies.save_only_these_names(LONG_ATTENTION)
            save = policies.save_from_both_policies(
                policies.save_from_both_policies(dots, is_grouped), kept
            )
        body = jax.checkpoint(body, policy=save, prevent_cse=False)
    per_layer = (state, jnp.asarray(kinds) if len(inputs) > 1 else None)
    return jax.lax.scan(body, x_BTD, per_layer)[0]


def decode_layers(
    layers: Sequence[nnx.Module],
    x_BTD: Array,
    inputs: Sequence[AttentionInputs],
    kinds: Sequence[int],
    cache: Cache,
    mesh: Mesh | None,
) -> tuple[Array, Cache]:
    """Run separate layers in order, writing keys and values into the cache in place.

    Args:
      layers: modules with the signature of `scan_layers`.
      x_BTD, inputs, kinds, mesh: as there.
      cache: keys and values so far, with the mask and length after these tokens.
    """
    start = cache.length - x_BTD.shape[1]
    keys, values = [], []

    def write(table_BKSE: Array, new_BTKE: Array) -> Array:
        new_BKTE = jnp.swapaxes(new_BTKE, 1, 2).astype(table_BKSE.dtype)
        return jax.lax.dynamic_update_slice(table_BKSE, new_BKTE, (0, 0, start, 0))

    for number, (layer, kind) in enumerate(zip(layers, kinds, strict=True)):

        def update_cache(
            new_keys: Array, new_values: Array, number: int = number
        ) -> tuple[Array, Array]:
            keys.append(write(cache.keys[number], new_keys))
            values.append(write(cache.values[number], new_values))
            return keys[-1].astype(new_keys.dtype), values[-1].astype(new_values.dtype)

        x_BTD = trees.spread_rows(layer(x_BTD, inputs[kind], update_cache, mesh), mesh)
    return x_BTD, dataclasses.replace(cache, keys=tuple(keys), values=tuple(values))
