"""Policies of known architectures: built with new params, described by shapes, and changed."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ntkrl import trees
from ntkrl.models.decoder import Config
from ntkrl.models.families import family_of
from ntkrl.models.family import Family
from ntkrl.models.layers import REMAT, Execution
from ntkrl.models.lora import Lora
from ntkrl.numerics import at_least_float32, check_dtype, einsum
from ntkrl.types import Array, Cache, Params, Policy

HEAD_WEIGHT = "head/weight"
EMBEDDING = "embed/embedding"
full_precision = functools.partial(jax.default_matmul_precision, "highest")
"""Context for products of float32: accelerators default to fewer bits, and log-probs of two
programs for the same text would then differ by more than importance ratios tolerate."""


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Choices at loading that no checkpoint stores.

    compute_dtype: dtype the network runs in; None for that of the params.
    remat: rematerialisation in the backward pass: "none"; "products", all of a layer but its
      products with weights; "all", the whole layer.
    untie: give a tied model an output head of its own, a copy of the embedding.
    lora: new adapters; their params are named `…/lora_a` and `…/lora_b`.
    """

    compute_dtype: Any = None
    remat: str = "products"
    untie: bool = False
    lora: Lora | None = None

    def __post_init__(self):
        if self.remat not in REMAT:
            raise ValueError(f"remat {self.remat!r} is not among {', '.join(REMAT)}.")
        if self.compute_dtype is not None:
            check_dtype(self.compute_dtype)


DEFAULTS = ModelOptions()


def build(
    architecture: str,
    config: dict[str, Any],
    key: Array,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    options: ModelOptions = DEFAULTS,
) -> tuple[Policy, Params]:
    """Build a new model of a known architecture with random parameters.

    Params are initialised sharded, never replicated; their values do not depend on the mesh.

    Args:
      architecture: Hugging Face's class name, for example `GPTNeoXForCausalLM`.
      config: config.json entries.
      key: PRNG key, consumed.
      dtype: of the params.
      mesh: shard the params over it by the family's patterns, or None for one device.
      options: with `untie`, the output head is drawn too.

    Raises:
      ValueError: unknown architecture or impossible config.
    """
    family, parsed = _parsed(architecture, config, options)
    policy, shapes = make_policy(family, parsed, dtype, options, mesh)
    by_name = family.shardings(trees.named_leaves(shapes), mesh)
    shardings = jax.tree.unflatten(jax.tree.structure(shapes), list(by_name.values()))
    init = functools.partial(init_params, family, parsed, dtype=dtype)
    return policy, jax.jit(init, out_shardings=shardings)(key)


def describe(
    architecture: str,
    config: dict[str, Any],
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    options: ModelOptions = DEFAULTS,
) -> tuple[Policy, Params]:
    """Return the policy of `build` or `load`, with shapes (jax.ShapeDtypeStruct) for arrays.

    Args:
      architecture, config, dtype, mesh, options: as in `build`.

    Raises:
      ValueError: unknown architecture or impossible config.
    """
    family, parsed = _parsed(architecture, config, options)
    return make_policy(family, parsed, dtype, options, mesh)


def _parsed(
    architecture: str, config: dict[str, Any], options: ModelOptions
) -> tuple[Family, Config]:
    raw = {**config, "architectures": [architecture]}
    family = family_of(raw, "config")
    parsed = family.parse(raw)
    if options.lora is not None:
        parsed = dataclasses.replace(parsed, adapters=options.lora.adapters(family))
    if options.untie:
        parsed = dataclasses.replace(parsed, tie_word_embeddings=False)
    return family, parsed


def make_policy(
    family: Family,
    config: Config,
    dtype: Any,
    options: ModelOptions = DEFAULTS,
    mesh: Mesh | None = None,
    source: str | None = None,
) -> tuple[Policy, Params]:
    """Return the policy and the shapes of its params.

    Args:
      family, config: of the model.
      dtype: of params.
      options: compute_dtype and remat.
      mesh: for activations, or None.
      source: directory of the checkpoint, or None.
    """
    check_dtype(dtype)
    abstract = nnx.eval_shape(lambda: family.model(config, nnx.Rngs(0), dtype))
    graphdef, state = nnx.split(abstract)
    shapes, tied = nnx.to_pure_dict(state), config.tie_word_embeddings
    if not tied:
        shape = (config.vocab_size, config.hidden_size)
        shapes["head"] = {"weight": jax.ShapeDtypeStruct(shape, dtype)}
    compute_dtype = dtype if options.compute_dtype is None else options.compute_dtype

    def init_cache(batch_size: int, length: int, cache_dtype: Any = None) -> Cache:
        cache_dtype = compute_dtype if cache_dtype is None else cache_dtype
        return _empty_cache(config, (batch_size, length), cache_dtype, mesh)

    def remade(config: Config, mesh: Mesh | None) -> Policy:
        return make_policy(family, config, dtype, options, mesh, source)[0]

    def on_mesh(other: Mesh | None) -> Policy:
        return policy if other == mesh else remade(config, other)

    features = _features(graphdef, options.compute_dtype, Execution(options.remat, mesh))
    policy = Policy(
        features=features,
        head=_head(config),
        init_cache=init_cache,
        decode=_decode(abstract, mesh),
        decode_params=functools.partial(rollout_copy, family.stacked, options.compute_dtype),
        decode_sharding=trees.unstacked_patterns(family.sharding, family.stacked),
        head_weight=EMBEDDING if tied else HEAD_WEIGHT,
        head_soft_cap=config.final_logit_softcapping,
        tied=tied,
        vocab_size=config.vocab_size,
        feature_size=config.hidden_size,
        max_tokens=config.max_position_embeddings,
        max_decoded_tokens=config.decode_limit,
        sharding=family.sharding,
        config=config,
        source=source,
        stacked=family.stacked,
        rebuild=lambda config: remade(config, mesh),
        on_mesh=on_mesh,
    )
    return policy, shapes


def _features(graphdef: Any, compute_dtype: Any, execution: Execution) -> Callable[..., Array]:
    """Return `features` of a Policy."""

    def features(params: Params, tokens: Array, mask: Array | None = None) -> Array:
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        with full_precision():
            params = without(params, "head")
            if compute_dtype is not None:
                params = jax.tree.map(lambda leaf: leaf.astype(compute_dtype), params)
            return nnx.merge(graphdef, params).features(tokens, mask, execution)

    return features


def _decode(abstract: Any, mesh: Mesh | None) -> Callable[..., tuple[Array, Cache]]:
    """Return `decode` of a Policy, from a module of shapes, whose layers it takes out."""
    layer_graphdef = nnx.split(abstract.layers)[0]
    abstract.layers = None
    graphdef = nnx.split(abstract)[0]

    def decode(copy: Params, cache: Cache, tokens: Array, mask: Array) -> tuple[Array, Cache]:
        with full_precision():
            layers = [nnx.merge(layer_graphdef, layer) for layer in copy["layers"]]
            trunk = nnx.merge(graphdef, without(copy, "head", "layers"))
            return trunk.decode(layers, tokens, mask, cache, mesh)

    return decode


def rollout_copy(stacked: Sequence[str], compute_dtype: Any, params: Params) -> Params:
    """Return `decode_params` of a Policy: cast, with the layers of each stack in a tuple.

    Args:
      stacked: keys of stacked subtrees.
      compute_dtype: of the copy; None for that of the params.
      params: of the policy.
    """
    if compute_dtype is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(compute_dtype), params)

    def layers(stack: Params) -> tuple[Params, ...]:
        count = jax.tree.leaves(stack)[0].shape[0]
        return tuple(jax.tree.map(lambda leaf: leaf[i], stack) for i in range(count))

    return {name: layers(part) if name in stacked else part for name, part in params.items()}


def _head(config: Config) -> Callable[[Params, Array], Array]:
    """Return `head` of a Policy: W φ, with the config's soft cap."""
    tied, cap = config.tie_word_embeddings, config.final_logit_softcapping

    def head(params: Params, features: Array) -> Array:
        weight_VD = params["embed"]["embedding"] if tied else params["head"]["weight"]
        logits = einsum("...d,vd->...v", features, weight_VD.astype(features.dtype))
        return logits if cap is None else cap * jnp.tanh(at_least_float32(logits) / cap)

    return head


def init_params(family: Family, config: Config, key: Array, dtype: Any) -> Params:
    """Initialise params: normal with `initializer_range`; biases zero."""
    params = nnx.to_pure_dict(nnx.split(family.model(config, nnx.Rngs(key), dtype))[1])
    if config.tie_word_embeddings:
        return params
    shape = (config.vocab_size, config.hidden_size)
    draw = jax.random.normal(jax.random.fold_in(key, 1), shape, dtype)
    return {**params, "head": {"weight": config.initializer_range * draw}}


def _empty_cache(config: Config, sizes: tuple[int, int], dtype: Any, mesh: Mesh | None) -> Cache:
    batch, length = sizes
    shape = (batch, config.num_key_value_heads, length, config.head_dim)
    empty = trees.constrain(jnp.zeros(shape, dtype), mesh, trees.ROWS, "tensor")
    return Cache(
        keys=(empty,) * config.num_hidden_layers,
        values=(empty,) * config.num_hidden_layers,
        mask=trees.spread_rows(jnp.zeros(sizes, bool), mesh),
        length=jnp.zeros((), jnp.int32),
    )


def _rebuilt(policy: Policy, **changes: Any) -> Policy:
    """Return the policy with changes of its config."""
    if policy.rebuild is None:
        raise ValueError("whitened policies cannot change; untie or resize before.")
    return policy.rebuild(dataclasses.replace(policy.config, **changes))


def untied(policy: Policy, params: Params) -> tuple[Policy, Params]:
    """Give a tied model an output head of its own, a copy of the embedding."""
    policy = _rebuilt(policy, tie_word_embeddings=False)
    return policy, {**params, "head": {"weight": jnp.copy(params["embed"]["embedding"])}}


def resized(
    policy: Policy, params: Params, rows: int, mesh: Mesh | None = None
) -> tuple[Policy, Params]:
    """Change the number of vocabulary rows, as after adding tokens to the tokenizer.

    Fewer rows drop the last ones: a padded vocabulary (Pythia's 50304 rows for 50277 tokens) loses
    padding, and new ids below the old size use rows that were never trained. New rows are the mean
    of the existing ones.

    Args:
      policy, params: as returned by `load` or `build`.
      rows: new V, ≥ 1.
      mesh: of the params, or None for one device.
    """
    if rows < 1:
        raise ValueError(f"a vocabulary needs at least one row, not {rows}.")

    def resize(table_VD: Array) -> Array:
        more = rows - table_VD.shape[0]
        if more <= 0:
            return table_VD[:rows]
        mean_D = jnp.mean(table_VD.astype(jnp.float32), axis=0).astype(table_VD.dtype)
        return jnp.concatenate([table_VD, jnp.broadcast_to(mean_D, (more, mean_D.shape[0]))])

    def resize_all(tables: Params) -> Params:
        return jax.tree.map(resize, tables)

    tables = {name: params[name] for name in ("embed", *([] if policy.tied else ["head"]))}
    shardings = None
    if mesh is not None:
        shapes = jax.eval_shape(resize_all, tables)
        shardings = trees.shardings(shapes, policy.sharding, mesh)
    tables = jax.jit(resize_all, out_shardings=shardings)(tables)
    return _rebuilt(policy, vocab_size=rows), {**params, **tables}


def without(params: Params, *names: str) -> Params:
    """Return params less some subtrees of the top level."""
    return {name: leaves for name, leaves in params.items() if name not in names}
