"""A family's config as a Policy and the shapes of its params."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ntkrl import trees
from ntkrl.models.family import Family, Running
from ntkrl.numerics import at_least_float32, einsum
from ntkrl.types import Array, Cache, Params, Policy

HEAD_WEIGHT = "head/weight"
EMBEDDING = "embed/embedding"


def assemble(
    family: Family,
    config: Any,
    dtype: Any,
    compute_dtype: Any,
    running: Running,
    source: str | None,
) -> tuple[Policy, Params]:
    """Return the policy and the shapes of its params.

    Args:
      family, config: what to make.
      dtype: of params.
      compute_dtype: the network runs in; None for `dtype`.
      running: what the backward pass keeps, and the mesh.
      source: directory the weights came from, or None.
    """
    abstract = nnx.eval_shape(lambda: family.model(config, nnx.Rngs(0), dtype))
    graphdef, state = nnx.split(abstract)
    shapes, tied = nnx.to_pure_dict(state), config.tie_word_embeddings
    if not tied:
        shape = (config.vocab_size, config.hidden_size)
        shapes["head"] = {"weight": jax.ShapeDtypeStruct(shape, dtype)}

    def init_cache(batch_size: int, length: int, cache_dtype: Any = None) -> Cache:
        kept = dtype if compute_dtype is None else compute_dtype
        kept = kept if cache_dtype is None else cache_dtype
        return _empty_cache(config, batch_size, length, kept, running.mesh)

    features, decode = _trunk(graphdef, compute_dtype, running)
    policy = Policy(
        features=features,
        head=_head(config),
        init_cache=init_cache,
        decode=decode,
        head_weight=EMBEDDING if tied else HEAD_WEIGHT,
        head_soft_cap=config.final_logit_softcapping,
        tied=tied,
        vocab_size=config.vocab_size,
        feature_size=config.hidden_size,
        max_tokens=config.max_position_embeddings,
        sharding=family.sharding,
        config=config,
        source=source,
        stacked=family.stacked,
        rebuild=lambda other: assemble(family, other, dtype, compute_dtype, running, source)[0],
    )
    return policy, shapes


def _trunk(graphdef: Any, compute_dtype: Any, running: Running) -> tuple[Callable, Callable]:
    """Return `features` and `decode` of a Policy.

    What is computed in float32 is multiplied so: accelerators otherwise take fewer bits, and two
    programs that read one text then differ by more than importance ratios bear.
    """
    exact = functools.partial(jax.default_matmul_precision, "highest")

    def module(params: Params) -> nnx.Module:
        params = {name: leaves for name, leaves in params.items() if name != "head"}
        if compute_dtype is not None:
            params = jax.tree.map(lambda leaf: leaf.astype(compute_dtype), params)
        return nnx.merge(graphdef, params)

    def features(params: Params, tokens: Array, mask: Array | None = None) -> Array:
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        with exact():
            return module(params).features(tokens, mask, None, running)[0]

    def decode(params: Params, cache: Cache, tokens: Array, mask: Array) -> tuple[Array, Cache]:
        with exact():
            return module(params).features(tokens, mask, cache, running._replace(remat="none"))

    return features, decode


def _head(config: Any) -> Callable[[Params, Array], Array]:
    """Return `head` of a Policy: W φ, capped where the family caps it."""
    tied, cap = config.tie_word_embeddings, config.final_logit_softcapping

    def head(params: Params, features: Array) -> Array:
        weight_VD = params["embed"]["embedding"] if tied else params["head"]["weight"]
        logits = einsum("...d,vd->...v", features, weight_VD.astype(features.dtype))
        return logits if cap is None else cap * jnp.tanh(at_least_float32(logits) / cap)

    return head


def init_params(family: Family, config: Any, key: Array, dtype: Any) -> Params:
    """Draw fresh parameters: normal, `initializer_range`; biases zero."""
    params = nnx.to_pure_dict(nnx.split(family.model(config, nnx.Rngs(key), dtype))[1])
    if config.tie_word_embeddings:
        return params
    shape = (config.vocab_size, config.hidden_size)
    draw = jax.random.normal(jax.random.fold_in(key, 1), shape, dtype)
    return {**params, "head": {"weight": config.initializer_range * draw}}


def _empty_cache(config: Any, batch_size: int, length: int, dtype: Any, mesh: Mesh | None) -> Cache:
    sizes = (batch_size, config.num_key_value_heads, length, config.head_dim)
    empty = jnp.zeros((config.num_hidden_layers, *sizes), dtype)
    empty = trees.constrain(empty, mesh, None, trees.ROWS, "tensor")
    return Cache(
        keys=empty,
        values=empty,
        mask=trees.spread_rows(jnp.zeros((batch_size, length), bool), mesh),
        length=jnp.zeros((), jnp.int32),
    )
