"""Networks: HF directory → (Policy, params) and back. The only room that imports flax.

One file per family holds its modules, its config and the table of tensor names; this file turns
them into pure functions. Outside, params are nested dicts of arrays.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ntkrl import trees
from ntkrl.models import files
from ntkrl.models.assemble import assemble, init_params
from ntkrl.models.families import FAMILIES, family_of
from ntkrl.models.family import Family
from ntkrl.models.hub import local_directory
from ntkrl.models.placing import read_params
from ntkrl.models.scorers import load_scorer
from ntkrl.types import Array, Params, Policy

__all__ = [
    "build",
    "check",
    "describe",
    "export",
    "load",
    "load_scorer",
    "local_directory",
]


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
    directory = local_directory(path)
    raw = files.read_config(directory)
    family = family_of(raw, directory)
    stored_config = family.parse(raw)
    policy, shapes = assemble(family, stored_config, dtype, compute_dtype, remat, str(directory))
    params = read_params(directory, family, shapes, mesh, policy.tied)
    if untie and policy.tied:
        config = dataclasses.replace(stored_config, tie_word_embeddings=False)
        policy, _ = assemble(family, config, dtype, compute_dtype, remat, str(directory))
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
    family, parsed = _new(architecture, config)
    policy, _ = assemble(family, parsed, dtype, compute_dtype, remat, None)
    return policy, init_params(family, parsed, key, dtype)


def describe(
    architecture: str,
    config: dict[str, Any],
    dtype: Any = jnp.float32,
    compute_dtype: Any = None,
    remat: bool = False,
) -> tuple[Policy, Params]:
    """Return what `build` would, with shapes (jax.ShapeDtypeStruct) in place of arrays.

    Args:
      architecture, config, dtype, compute_dtype, remat: as in `build`.

    Raises:
      ValueError: unknown architecture or impossible config.
    """
    family, parsed = _new(architecture, config)
    return assemble(family, parsed, dtype, compute_dtype, remat, None)


def _new(architecture: str, config: dict[str, Any]) -> tuple[Family, Any]:
    raw = {**config, "architectures": [architecture]}
    family = family_of(raw, Path("config"))
    return family, family.parse(raw)


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
    for ours, stored, transpose in family.weights:
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
    directory = local_directory(path)
    raw = files.read_config(directory)
    family_of(raw, directory).parse(raw)
    files.tensor_files(directory)


def _family_of_policy(policy: Policy) -> Family:
    if policy.config is None:
        raise ValueError("export needs a policy made by ntkrl.load or ntkrl.build.")
    return FAMILIES[policy.config.architecture]
