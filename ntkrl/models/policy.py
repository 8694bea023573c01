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
from ntkrl.numerics import at_least_float32, einsum
from ntkrl.types import Array, Cache, Params, Policy

HEAD_WEIGHT = "head/weight"
EMBEDDING = "embed/embedding"
WHITENING = "whitening"
full_precision = functools.partial(jax.default_matmul_precision, "highest")
"""Context for products of float32: accelerators default to fewer bits, and log-probs of two
programs for the same text would then differ by more than importance ratios tolerate."""
RIDGE = 1e-3
"""ρ of `whitened`, added to the spectrum of S, in units of its mean."""


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
            params = _without(params, "head")
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
            trunk = nnx.merge(graphdef, _without(copy, "head", "layers"))
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


def whitened(
    policy: Policy, params: Params, moments: Array, mean: Array | None = None
) -> tuple[Policy, Params]:
    """Return the same function with features in whitened coordinates.

    φ' = C φ and W' = W C⁻¹ with C = s (S + ρ (tr S/D) I)^(−1/2), and s such that ‖φ'‖² has the mean
    of ‖φ‖². As W'φ' = Wφ, the function and the body's kernel are unchanged; inner products
    ⟨φ', φ''⟩ of the head's kernel become small between contexts and of either sign. A control for
    the effect of features with little variation.

    With a mean, C = s (I + (1/r − 1) m mᵀ) along its direction m alone: r² is mᵀ S m over the mean
    second moment of the directions at right angles, which keep their proportions.

    Args:
      policy, params: of an untied model.
      moments: S `[D, D]`, mean of φ φᵀ over the contexts to whiten on.
      mean: `[D]` mean of φ over them, or None to whiten all directions.

    Returns:
      The policy, and params with `whitening/matrix` (C, to be frozen); `export` multiplies it into
      the head.

    Raises:
      ValueError: a tied model, whose head cannot change without its embedding.
    """
    if policy.tied:
        raise ValueError("features are whitened with an untied head; set model.untie=True.")
    moments = moments.astype(jnp.float32)
    matrix_DD, inverse_DD = _whitening(moments) if mean is None else _shrinkage(moments, mean)
    weight_VD = params["head"]["weight"]
    dtype = weight_VD.dtype
    weight_VD = einsum("vd,de->ve", weight_VD, inverse_DD).astype(dtype)
    params = {
        **params,
        "head": {**params["head"], "weight": weight_VD},
        WHITENING: {"matrix": matrix_DD.astype(dtype)},
    }
    return _whitened_policy(policy), params


def _whitening(moments: Array) -> tuple[Array, Array]:
    """Return C of all directions, and its inverse."""
    values_D, vectors_DD = jnp.linalg.eigh(moments)
    roots_D = jnp.sqrt(jnp.maximum(values_D, 0) + RIDGE * jnp.mean(values_D))
    # mean ‖C φ‖² is Σ values / roots²
    scale = jnp.sqrt(jnp.sum(values_D) / jnp.sum(values_D / roots_D**2))
    matrix_DD = einsum("dk,ek->de", vectors_DD * (scale / roots_D)[None], vectors_DD)
    return matrix_DD, einsum("dk,ek->de", vectors_DD * (roots_D / scale)[None], vectors_DD)


def _shrinkage(moments: Array, mean: Array) -> tuple[Array, Array]:
    """Return C along the mean's direction alone, and its inverse."""
    size, total = moments.shape[0], jnp.trace(moments)
    direction_D = mean.astype(jnp.float32) / jnp.linalg.norm(mean.astype(jnp.float32))
    along = einsum("d,de,e->", direction_D, moments, direction_D)
    across = (total - along) / (size - 1)
    root = jnp.sqrt(along / across)
    # mean ‖C φ‖² is s² (D across)
    scale = jnp.sqrt(total / (size * across))
    outer_DD = jnp.outer(direction_D, direction_D)
    matrix_DD = scale * (jnp.eye(size) + (1 / root - 1) * outer_DD)
    return matrix_DD, (jnp.eye(size) + (root - 1) * outer_DD) / scale


def _whitened_policy(policy: Policy) -> Policy:
    """Return a policy whose features the params' whitening matrix transforms."""

    def transform(params: Params, phi: Array) -> Array:
        return einsum("...d,ed->...e", phi, params[WHITENING]["matrix"]).astype(phi.dtype)

    def features(params: Params, tokens: Array, mask: Array | None = None) -> Array:
        return transform(params, policy.features(_without(params, WHITENING), tokens, mask))

    def decode_params(params: Params) -> Params:
        copy = policy.decode_params(_without(params, WHITENING))
        return {**copy, WHITENING: params[WHITENING]}

    def decode(copy: Params, cache: Cache, tokens: Array, mask: Array) -> tuple[Array, Cache]:
        phi, cache = policy.decode(_without(copy, WHITENING), cache, tokens, mask)
        return transform(copy, phi), cache

    def on_mesh(mesh: Mesh | None) -> Policy:
        assert policy.on_mesh is not None  # as of every family's policy
        return _whitened_policy(policy.on_mesh(mesh))

    return dataclasses.replace(
        policy,
        features=features,
        decode_params=decode_params,
        decode=decode,
        rebuild=None,
        on_mesh=on_mesh,
    )


def unwhitened(params: Params) -> Params:
    """Return params with the whitening matrix, if any, multiplied into the head."""
    if WHITENING not in params:
        return params
    weight_VD, matrix_DD = params["head"]["weight"], params[WHITENING]["matrix"]
    weight_VD = einsum("vd,de->ve", weight_VD, matrix_DD).astype(weight_VD.dtype)
    return {**_without(params, WHITENING), "head": {**params["head"], "weight": weight_VD}}


def _without(params: Params, *names: str) -> Params:
    return {name: leaves for name, leaves in params.items() if name not in names}
