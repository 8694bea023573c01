"""Networks: HF directory → (Policy, params) and back. The only room that imports flax.

One file per family holds its modules, its config and the table of tensor names; this file turns
them into pure functions. Outside, params are nested dicts of arrays.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ntkrl import trees
from ntkrl.models import files
from ntkrl.models import lora as lora_files
from ntkrl.models.assemble import assemble, init_params
from ntkrl.models.families import FAMILIES, family_of
from ntkrl.models.family import REMAT, Adapters, Family, Running
from ntkrl.models.hub import local_directory
from ntkrl.models.lora import Lora, is_adapter
from ntkrl.models.placing import placements, read_params
from ntkrl.models.scorers import (
    New,
    check_scorer,
    describe_scorer,
    export_scorer,
    load_scorer,
    write_new_scorer,
)
from ntkrl.models.settings import ModelSettings
from ntkrl.models.whitening import unwhitened, whitened
from ntkrl.types import Array, Params, Policy

__all__ = [
    "REMAT",
    "Lora",
    "ModelSettings",
    "New",
    "build",
    "check",
    "describe",
    "describe_scorer",
    "export",
    "export_adapter",
    "export_scorer",
    "load",
    "load_scorer",
    "local_directory",
    "resized",
    "tokenizer_directory",
    "untied",
    "whitened",
    "write_new_scorer",
]


def load(
    path: str | Path,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    compute_dtype: Any = None,
    untie: bool = False,
    remat: str = "products",
    lora: Lora | None = None,
    base: str | Path | None = None,
) -> tuple[Policy, Params]:
    """Load a Hugging Face model directory, or a PEFT adapter directory with its base model.

    Args:
      path: directory with config.json and safetensors (one file or shards with an index), in
        float32, bfloat16 or float16, or a hub name such as `EleutherAI/pythia-160m`. Pickle
        checkpoints are refused.
      dtype: dtype the params are kept in; float32 for training (masters).
      mesh: shard the params over it by the family's patterns, or None for one device.
      compute_dtype: dtype the network runs in; None for `dtype`.
      untie: give a tied model a head of its own, a copy of the embedding.
      remat: what the backward pass makes again: "none"; "products", all of a layer but its products
        with weights; "all", the whole layer.
      lora: put new adapters on the model; their parameters are called `…/lora_a`, `…/lora_b`.
      base: the model that an adapter directory belongs to; None for the one it names.

    Returns:
      `(policy, params)`: pure functions, and a nested dict of arrays.

    Raises:
      ValueError: anything missing, misshapen or unknown, all of it in one message.
    """
    place, adapted = _places(path, base)
    if adapted is not None and lora is not None:
        raise ValueError(f"{adapted} holds adapters already; export it merged before adding more.")
    raw = files.read_config(place)
    family = family_of(raw, place)
    config = family.parse(raw)
    if adapted is not None:
        adapters = lora_files.stored_adapters(adapted, lora_files.read_config(adapted)[0], family)
        config = dataclasses.replace(config, adapters=adapters)
    elif lora is not None:
        config = dataclasses.replace(config, adapters=lora.adapters(family))
    running = _running(remat, mesh)
    policy, shapes = assemble(family, config, dtype, compute_dtype, running, str(place))
    leaves = {n: leaf for n, leaf in trees.named_leaves(shapes).items() if not is_adapter(n)}
    found = read_params(place, family, leaves, mesh, policy.tied)
    if config.adapters is not None:
        found |= _adapters(family, config.adapters, shapes, adapted, lora, mesh)
    params = jax.tree.unflatten(jax.tree.structure(shapes), [found[n] for n in trees.names(shapes)])
    return untied(policy, params) if untie and policy.tied else (policy, params)


def _places(path: str | Path, base: str | Path | None) -> tuple[Path, Path | None]:
    """Return the model's directory and, where adapters were asked for, theirs."""
    directory = local_directory(path)
    if not (directory / lora_files.CONFIG_FILE).is_file():
        if base is not None:
            raise ValueError(f"base is for adapter directories; {path} has no adapter_config.json.")
        return directory, None
    _, named = lora_files.read_config(directory)
    if base is None and named is None:
        raise ValueError(f"{directory} names no base model; give it as base.")
    return local_directory(named if base is None else base), directory


def tokenizer_directory(path: str | Path) -> str:
    """Return where a model's tokenizer lies: with an adapter, or else with its base."""
    place, adapted = _places(path, None)
    held = adapted is not None and (adapted / "tokenizer_config.json").is_file()
    return str(adapted if held else place)


def _adapters(
    family: Family,
    adapters: Adapters,
    shapes: Params,
    stored: Path | None,
    lora: Lora | None,
    mesh: Mesh | None,
) -> dict[str, Array]:
    """Read the parameters of adapters, or start them."""
    leaves = {n: leaf for n, leaf in trees.named_leaves(shapes).items() if is_adapter(n)}
    if stored is not None:
        held = lora_files.table(family, adapters)
        return read_params(stored, held, leaves, mesh, stem=lora_files.STEM)
    placed, key = placements(family, leaves, mesh), jax.random.key(lora.seed)
    return {
        name: jax.device_put(lora_files.start(leaf, name, jax.random.fold_in(key, i)), placed[name])
        for i, (name, leaf) in enumerate(leaves.items())
    }


def _running(remat: str, mesh: Mesh | None) -> Running:
    if remat not in REMAT:
        raise ValueError(f"remat {remat!r} is not among {', '.join(REMAT)}.")
    return Running(remat, mesh)


def untied(policy: Policy, params: Params) -> tuple[Policy, Params]:
    """Give a tied model a head of its own, a copy of the embedding."""
    config = dataclasses.replace(policy.config, tie_word_embeddings=False)
    free = policy.rebuild(config)
    return free, {**params, "head": {"weight": jnp.copy(params["embed"]["embedding"])}}


def resized(
    policy: Policy, params: Params, rows: int, mesh: Mesh | None = None
) -> tuple[Policy, Params]:
    """Change the number of vocabulary rows, as after tokens were added to the tokenizer.

    Fewer rows are cut off at the end: a vocabulary that was padded (Pythia's 50304 rows for 50277
    tokens) loses padding, and new ids below the old size keep rows that were never trained. More
    rows are added as the mean of those there are.

    Args:
      policy, params: as returned by `load` or `build`.
      rows: V wanted, ≥ 1.
      mesh: that params lie on, or None for one device.

    Returns:
      The policy and params of the other vocabulary.
    """
    if rows < 1:
        raise ValueError(f"a vocabulary needs at least one row, not {rows}.")

    def changed(table_VD: Array) -> Array:
        more = rows - table_VD.shape[0]
        if more <= 0:
            return table_VD[:rows]
        mean_D = jnp.mean(table_VD.astype(jnp.float32), axis=0).astype(table_VD.dtype)
        return jnp.concatenate([table_VD, jnp.broadcast_to(mean_D, (more, mean_D.shape[0]))])

    tables = {"embed": params["embed"]}
    if not policy.tied:
        tables["head"] = params["head"]
    leaves = jax.eval_shape(lambda: jax.tree.map(changed, tables))
    where = None if mesh is None else trees.shardings(leaves, policy.sharding, mesh)
    moved = jax.jit(lambda held: jax.tree.map(changed, held), out_shardings=where)(tables)
    whole = {**params, **moved}
    return policy.rebuild(dataclasses.replace(policy.config, vocab_size=rows)), whole


def build(
    architecture: str,
    config: dict[str, Any],
    key: Array,
    dtype: Any = jnp.float32,
    compute_dtype: Any = None,
    remat: str = "products",
    mesh: Mesh | None = None,
) -> tuple[Policy, Params]:
    """Make a new model of a known architecture with random parameters.

    Args:
      architecture: Hugging Face's class name, for example `GPTNeoXForCausalLM`.
      config: config.json entries.
      key: PRNG key, consumed.
      dtype, compute_dtype, remat, mesh: as in `load`. Every device draws its own blocks; what is
        drawn does not depend on the mesh.

    Raises:
      ValueError: unknown architecture or impossible config.
    """
    family, parsed = _new(architecture, config)
    running = _running(remat, mesh)
    policy, shapes = assemble(family, parsed, dtype, compute_dtype, running, None)
    leaves = trees.named_leaves(shapes)
    placed = placements(family, leaves, mesh)
    where = jax.tree.unflatten(jax.tree.structure(shapes), [placed[name] for name in leaves])
    draw = functools.partial(init_params, family, parsed, dtype=dtype)
    return policy, jax.jit(draw, out_shardings=where)(key)


def describe(
    architecture: str,
    config: dict[str, Any],
    dtype: Any = jnp.float32,
    compute_dtype: Any = None,
    remat: str = "products",
    mesh: Mesh | None = None,
    lora: Lora | None = None,
) -> tuple[Policy, Params]:
    """Return what `build` would, with shapes (jax.ShapeDtypeStruct) in place of arrays.

    Args:
      architecture, config, dtype, compute_dtype, remat, mesh: as in `build`.
      lora: as in `load`.

    Raises:
      ValueError: unknown architecture or impossible config.
    """
    family, parsed = _new(architecture, config)
    if lora is not None:
        parsed = dataclasses.replace(parsed, adapters=lora.adapters(family))
    return assemble(family, parsed, dtype, compute_dtype, _running(remat, mesh), None)


def _new(architecture: str, config: dict[str, Any]) -> tuple[Family, Any]:
    raw = {**config, "architectures": [architecture]}
    family = family_of(raw, Path("config"))
    return family, family.parse(raw)


def export(path: str | Path, policy: Policy, params: Params, source: str | None = None) -> None:
    """Write a full Hugging Face directory that transformers loads; adapters are merged.

    Args:
      path: directory; written beside and renamed when whole.
      policy: as returned by `load` or `build`.
      params: the params tree, stored in its own dtype.
      source: directory whose tokenizer files travel along; None for `policy.source`.
    """
    tensors = stored(policy, params)
    raw = _family_of_policy(policy).unparse(policy.config)
    raw["dtype"] = str(jax.tree.leaves(params)[0].dtype)
    raw.pop("torch_dtype", None)  # the older spelling would contradict it
    files.write_model(Path(path), raw, tensors, policy.source if source is None else source)


def stored(policy: Policy, params: Params) -> dict[str, np.ndarray]:
    """Return the tensors of a full Hugging Face directory by name, merged and unwhitened."""
    family, params = _family_of_policy(policy), unwhitened(params)
    if policy.config.adapters is not None:
        params = lora_files.merged(params, policy.config.adapters)
    return files.stored_tensors(family.weights, trees.named_leaves(params))


def export_adapter(
    path: str | Path,
    policy: Policy,
    params: Params,
    base: str | None = None,
    source: str | None = None,
) -> None:
    """Write the adapters alone as a PEFT directory.

    Args:
      path: directory; written beside and renamed when whole.
      policy, params: of a model loaded with `lora` or from an adapter directory.
      base: directory or hub name of the base model to be written down; None for `policy.source`.
      source: directory whose tokenizer files travel along; None for none.

    Raises:
      ValueError: a model without adapters.
    """
    family, adapters = _family_of_policy(policy), policy.config.adapters
    if adapters is None:
        raise ValueError("the model has no adapters; load it with lora=ntkrl.models.Lora(…).")
    named = policy.source if base is None else base
    lora_files.write_adapter(Path(path), family, adapters, params, named, source)


def check(path: str | Path, trunk: bool = False) -> int:
    """Return V of a model, and raise what `load` would raise, reading headers and no tensor.

    Args:
      path: as for `load`.
      trunk: check a reward model, or a language model to make one of, instead.

    Raises:
      ValueError: no directory, no or bad config.json, unknown architecture, tensors that are
        missing, misshapen or of other dtypes.
    """
    if trunk:
        return check_scorer(path)
    place, adapted = _places(path, None)
    raw = files.read_config(place)
    family = family_of(raw, place)
    policy, shapes = assemble(family, family.parse(raw), jnp.float32, None, Running(), None)
    sizes = {name: leaf.shape for name, leaf in trees.named_leaves(shapes).items()}
    files.check_tensors(place, family, sizes, policy.tied)
    if adapted is not None:
        lora_files.stored_adapters(adapted, lora_files.read_config(adapted)[0], family)
    return policy.vocab_size


def _family_of_policy(policy: Policy) -> Family:
    if policy.config is None:
        raise ValueError("export needs a policy made by ntkrl.load or ntkrl.build.")
    return FAMILIES[policy.config.architecture]
