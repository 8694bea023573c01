"""Networks: HF directory → (Policy, params) and back. The only room that imports flax.

One file per family holds its modules, its config and the table of tensor names; this file turns
them into pure functions. Outside, params are nested dicts of arrays.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ntkrl import trees
from ntkrl.models import files, gpt_neox
from ntkrl.types import Array, Cache, Params, Policy

FAMILIES: dict[str, ModuleType] = {gpt_neox.ARCHITECTURE: gpt_neox}
HEAD_WEIGHT = "head/weight"
EMBEDDING = "embed/embedding"


def load(
    path: str | Path,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    compute_dtype: Any = None,
    untie: bool = False,
    remat: bool = False,
) -> tuple[Policy, Params]:
    """Load a Hugging Face model directory.

    Args:
      path: directory with config.json and safetensors (one file or shards with an index), in
        float32, bfloat16 or float16. Pickle checkpoints are refused.
      dtype: dtype the params are kept in; float32 for training (masters).
      mesh: shard the params over it by the family's patterns, or None for one device.
      compute_dtype: dtype the network runs in; None for `dtype`.
      untie: give a tied model a head of its own, a copy of the embedding.
      remat: recompute activations layer by layer in the backward pass.

    Returns:
      `(policy, params)`: pure functions, and a nested dict of arrays.

    Raises:
      ValueError: anything missing, misshapen or unknown, all of it in one message.
    """
    directory = Path(path)
    raw = files.read_config(directory)
    family = family_of(raw, directory)
    stored_config = family.parse(raw)
    policy, shapes = _assemble(family, stored_config, dtype, compute_dtype, remat, str(directory))
    named_shapes = trees.named_leaves(shapes)
    placements: dict[str, Any] = dict.fromkeys(named_shapes)
    if mesh is not None:
        placements = trees.named_leaves(trees.shardings(shapes, family.SHARDING, mesh))

    def place(name: str, array: np.ndarray) -> Array:
        return jax.device_put(jnp.asarray(array.astype(dtype)), placements[name])

    sizes = {name: leaf.shape for name, leaf in named_shapes.items()}
    leaves = files.read_tensors(
        directory, family.WEIGHTS, sizes, _ignored(family, stored_config), place
    )
    params = jax.tree.unflatten(jax.tree.structure(shapes), [leaves[name] for name in named_shapes])
    if untie and policy.tied:
        config = dataclasses.replace(stored_config, tie_word_embeddings=False)
        policy, _ = _assemble(family, config, dtype, compute_dtype, remat, str(directory))
        params = {**params, "head": {"weight": jnp.copy(params["embed"]["embedding"])}}
    return policy, params


def build(
    architecture: str,
    config: dict[str, Any],
    key: Array,
    dtype: Any = jnp.float32,
    compute_dtype: Any = None,
    remat: bool = False,
) -> tuple[Policy, Params]:
    """Make a new model of a known architecture with random parameters.

    Args:
      architecture: Hugging Face's class name, for example `GPTNeoXForCausalLM`.
      config: config.json entries.
      key: PRNG key, consumed.
      dtype, compute_dtype, remat: as in `load`.

    Raises:
      ValueError: unknown architecture or impossible config.
    """
    raw = {**config, "architectures": [architecture]}
    family = family_of(raw, Path("config"))
    parsed = family.parse(raw)
    policy, _ = _assemble(family, parsed, dtype, compute_dtype, remat, None)
    return policy, family.init_params(parsed, key, dtype)


def export(path: str | Path, policy: Policy, params: Params, source: str | None = None) -> None:
    """Write a full Hugging Face directory that transformers loads.

    Args:
      path: directory; written beside and renamed when whole.
      policy: as returned by `load` or `build`.
      params: the params tree, stored in its own dtype.
      source: directory whose tokenizer files travel along; None for `policy.source`.
    """
    family = _family_of_policy(policy)
    config = policy.config
    leaves = trees.named_leaves(params)
    tensors: dict[str, np.ndarray] = {}
    for ours, stored, transpose in family.WEIGHTS:
        if ours not in leaves:
            continue
        array = np.asarray(jax.device_get(leaves[ours]))
        for i, layer in enumerate(array) if files.LAYER in stored else [(0, array)]:
            tensors[stored.replace(files.LAYER, str(i))] = layer.T if transpose else layer
    raw = family.unparse(config)
    raw["dtype"] = str(jax.tree.leaves(params)[0].dtype)
    raw.pop("torch_dtype", None)  # the older spelling would contradict it
    files.write_model(Path(path), raw, tensors, policy.source if source is None else source)


def check(path: str | Path) -> None:
    """Raise what `load` would raise about config.json and the files' presence, reading no tensor.

    Raises:
      ValueError: no directory, no or bad config.json, unknown architecture, missing files.
    """
    directory = Path(path)
    raw = files.read_config(directory)
    family_of(raw, directory).parse(raw)
    files.tensor_files(directory)


def family_of(raw: dict[str, Any], where: Path) -> ModuleType:
    """Return the family of a config.json, or say which architectures are known."""
    named = raw["architectures"] if "architectures" in raw else None
    if isinstance(named, list) and len(named) == 1 and named[0] in FAMILIES:
        return FAMILIES[named[0]]
    raise ValueError(
        f"{where}: architecture {named!r} is unknown; known are {', '.join(sorted(FAMILIES))}."
    )


def _family_of_policy(policy: Policy) -> ModuleType:
    for family in FAMILIES.values():
        if isinstance(policy.config, family.Config):
            return family
    raise ValueError("export needs a policy made by ntkrl.load or ntkrl.build.")


def _ignored(family: ModuleType, config: Any) -> tuple[str, ...]:
    # a tied model may store its one matrix twice
    if not config.tie_word_embeddings:
        return family.IGNORED
    return (*family.IGNORED, *(hf for ours, hf, _ in family.WEIGHTS if ours == HEAD_WEIGHT))


def _assemble(
    family: ModuleType,
    config: Any,
    dtype: Any,
    compute_dtype: Any,
    remat: bool,
    source: str | None,
) -> tuple[Policy, Params]:
    """Return the policy and the shapes of its params."""
    abstract = nnx.eval_shape(lambda: family.model(config, nnx.Rngs(0), dtype))
    graphdef, state = nnx.split(abstract)

    def module(params: Params) -> nnx.Module:
        if compute_dtype is not None:
            params = jax.tree.map(lambda leaf: leaf.astype(compute_dtype), params)
        return nnx.merge(graphdef, params)

    def features(params: Params, tokens: Array, mask: Array | None = None) -> Array:
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        return module(params).features(tokens, mask, None, remat)[0]

    def decode(params: Params, cache: Cache, tokens: Array, mask: Array) -> tuple[Array, Cache]:
        return module(params).features(tokens, mask, cache, False)

    def init_cache(batch_size: int, length: int, cache_dtype: Any = None) -> Cache:
        kept = compute_dtype if compute_dtype is not None else dtype
        kept = kept if cache_dtype is None else cache_dtype
        empty = jnp.zeros(family.cache_shape(config, batch_size, length), kept)
        return Cache(
            keys=empty,
            values=empty,
            mask=jnp.zeros((batch_size, length), bool),
            length=jnp.zeros((), jnp.int32),
        )

    policy = Policy(
        features=features,
        head=lambda params, features: module(params).logits(features),
        init_cache=init_cache,
        decode=decode,
        head_weight=EMBEDDING if config.tie_word_embeddings else HEAD_WEIGHT,
        tied=config.tie_word_embeddings,
        vocab_size=config.vocab_size,
        feature_size=config.hidden_size,
        max_tokens=config.max_position_embeddings,
        sharding=family.SHARDING,
        config=config,
        source=source,
        stacked=family.STACKED,
    )
    return policy, nnx.to_pure_dict(state)
