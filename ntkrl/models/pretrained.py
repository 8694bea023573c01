"""Pretrained models: Hugging Face directories → (Policy, params), and back.

Each process reads the blocks of its own devices from the files, and no more.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ntkrl import trees
from ntkrl.models import hf_export, hf_files
from ntkrl.models import lora as lora_files
from ntkrl.models.families import FAMILIES, family_of
from ntkrl.models.family import Family
from ntkrl.models.layers import Adapters
from ntkrl.models.model_card import Training, write_card
from ntkrl.models.policy import DEFAULTS, ModelOptions, make_policy, untied
from ntkrl.models.whitening import unwhitened
from ntkrl.types import Array, Params, Policy


def load(
    path: str | Path,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    options: ModelOptions = DEFAULTS,
    base: str | Path | None = None,
) -> tuple[Policy, Params]:
    """Load a Hugging Face model directory, or a PEFT adapter directory with its base model.

    Args:
      path: directory with config.json and safetensors (one file or shards with an index), in
        float32, bfloat16 or float16; a hub name such as `EleutherAI/pythia-160m`; or a GGUF file,
        dequantised to float32. Pickle checkpoints are refused.
      dtype: of the params; float32 for training (masters).
      mesh: shard the params over it by the family's patterns, or None for one device.
      options: compute_dtype, remat, an untied head, new adapters.
      base: base model of an adapter directory; None for the one named in it.

    Returns:
      `(policy, params)`: pure functions, and a nested dict of arrays.

    Raises:
      ValueError: anything missing, misshapen or unknown, all of it in one message.
    """
    name, directory, adapter_directory = _locate(path, base)
    raw = hf_files.read_config(directory)
    family = family_of(raw, directory)
    raw = hf_files.resolve_tied_head(directory, family, raw)
    adapters: Adapters | None = None
    if adapter_directory is not None:
        if options.lora is not None:
            raise ValueError(
                f"{adapter_directory} holds adapters already; export it merged before adding more."
            )
        adapters = lora_files.stored_adapters(adapter_directory, family)
    elif options.lora is not None:
        adapters = options.lora.adapters(family)
    config = dataclasses.replace(family.read(raw, directory), adapters=adapters, name=str(name))
    policy, shapes = make_policy(family, config, dtype, options, mesh, str(directory))
    leaves = trees.named_leaves(shapes)
    added = {name: leaf for name, leaf in leaves.items() if lora_files.is_adapter(name)}
    stored = {name: leaf for name, leaf in leaves.items() if name not in added}
    arrays = read_params(directory, family, stored, mesh, policy.tied)
    if adapter_directory is not None and adapters is not None:
        table = lora_files.adapter_family(family, adapters)
        arrays |= read_params(adapter_directory, table, added, mesh, stem=lora_files.STEM)
    elif options.lora is not None:
        arrays |= lora_files.init_adapters(added, options.lora.seed, family, mesh)
    params = jax.tree.unflatten(jax.tree.structure(shapes), [arrays[name] for name in leaves])
    return untied(policy, params) if options.untie and policy.tied else (policy, params)


def check(path: str | Path) -> int:
    """Return V of a model, and raise the errors of `load`, reading headers only.

    Args:
      path: as for `load`.

    Raises:
      ValueError: no directory, no or bad config.json, unknown architecture, tensors that are
        missing, misshapen or of other dtypes.
    """
    _, directory, adapter_directory = _locate(path)
    raw = hf_files.read_config(directory)
    family = family_of(raw, directory)
    policy, shapes = make_policy(family, family.read(raw, directory), jnp.float32)
    sizes = {name: leaf.shape for name, leaf in trees.named_leaves(shapes).items()}
    hf_files.check_tensors(directory, family, sizes, policy.tied)
    if adapter_directory is not None:
        lora_files.stored_adapters(adapter_directory, family)
    return policy.vocab_size


def tokenizer_directory(path: str | Path) -> str:
    """Return the directory of a model's tokenizer: the adapter's if it has one, or its base's.

    Raises:
      ValueError: a path that cannot be a model's.
    """
    _, directory, adapter_directory = _locate(path)
    hf_files.check_directory(directory)
    if adapter_directory is None or not (adapter_directory / "tokenizer_config.json").is_file():
        return str(directory)
    return str(adapter_directory)


def _locate(
    path: str | Path, base: str | Path | None = None
) -> tuple[str | Path, Path, Path | None]:
    """Return the model's name as given, its directory, and the adapter's directory or None."""
    directory = hf_files.local_directory(path)
    if not (directory / lora_files.CONFIG_FILE).is_file():
        if base is not None:
            raise ValueError(f"base is for adapter directories; {path} has no adapter_config.json.")
        return path, directory, None
    if base is None:
        base = lora_files.read_config(directory)[1]
    if base is None:
        raise ValueError(f"{directory} names no base model; give it as base.")
    return base, hf_files.local_directory(base), directory


def read_params(
    directory: Path,
    family: Family,
    shapes: dict[str, jax.ShapeDtypeStruct],
    mesh: Mesh | None,
    tied: bool = False,
    stem: str = hf_files.STEM,
) -> dict[str, Array]:
    """Read leaves of a model onto their devices.

    Args:
      directory: of the model.
      family: with the table of tensor names and the sharding.
      shapes: shape and dtype by our name.
      mesh: of the devices, or None for one.
      tied: ignore a stored head, as a copy of the embedding.
      stem: file name of tensors without its ending.

    Raises:
      ValueError: tensors that do not fit, or that hold NaN or infinity, all of them in one message.
    """
    sizes = {name: leaf.shape for name, leaf in shapes.items()}
    tensors = hf_files.check_tensors(directory, family, sizes, tied, stem)
    shardings = family.shardings(shapes, mesh)

    def read_leaf(name: str, leaf: jax.ShapeDtypeStruct) -> Array:
        def block(index: Any) -> np.ndarray:
            pairs = zip(index, leaf.shape, strict=True)
            ends = [part.indices(size)[:2] for part, size in pairs]
            return tensors.read(name, ends, leaf.dtype)

        # called once per distinct block, whatever the number of devices that hold it
        return jax.make_array_from_callback(leaf.shape, shardings[name], block)

    arrays = {name: read_leaf(name, leaf) for name, leaf in shapes.items()}
    tensors.check_finite()
    return arrays


def export(
    path: str | Path,
    policy: Policy,
    params: Params,
    source: str | None = None,
    training: Training | None = None,
) -> None:
    """Write a full Hugging Face directory that transformers loads; adapters are merged.

    Args:
      path: directory, written atomically.
      policy: as returned by `load` or `build`.
      params: the params tree, stored in its own dtype.
      source: directory of tokenizer files to copy; None for `policy.source`.
      training: facts for the model card.
    """
    tensors = stored_tensors(policy, params)
    raw = _family_of(policy).config_json(policy.config, jax.tree.leaves(params)[0].dtype)
    card = write_card(policy.config.name, policy.source, training)
    source = policy.source if source is None else source
    companions = hf_export.Companions(source, policy.source, card)
    hf_export.write_model(Path(path), raw, tensors, companions)


def stored_tensors(policy: Policy, params: Params) -> dict[str, np.ndarray]:
    """Return the tensors of `export` by their Hugging Face names, adapters merged."""
    family, params = _family_of(policy), unwhitened(params)
    adapters: Adapters | None = policy.config.adapters
    if adapters is not None:
        params = lora_files.merged(params, adapters)
    return hf_export.gather_tensors(family.weights, trees.named_leaves(params))


def export_adapter(
    path: str | Path,
    policy: Policy,
    params: Params,
    source: str | None = None,
    training: Training | None = None,
) -> None:
    """Write the adapters alone as a PEFT directory, which names the base as it was given to `load`.

    Args:
      path: directory, written atomically.
      policy, params: of a model loaded with new adapters or from an adapter directory.
      source: directory of tokenizer files to copy; None for none.
      training: facts for the model card.

    Raises:
      ValueError: a model without adapters.
    """
    family, config = _family_of(policy), policy.config
    if config.adapters is None:
        raise ValueError(
            "the model has no adapters; load it with models.ModelOptions(lora=models.Lora(…))."
        )
    tensors, raw = lora_files.adapter_files(family, config.adapters, params, config.name)
    files = (lora_files.CONFIG_FILE, lora_files.STEM)
    card = write_card(config.name, policy.source, training, library="peft")
    companions = hf_export.Companions(source, card=card)
    hf_export.write_model(Path(path), raw, tensors, companions, files=files)


def _family_of(policy: Policy) -> Family:
    if policy.config is None:
        raise ValueError("export needs a policy made by ntkrl.load or ntkrl.build.")
    return FAMILIES[policy.config.architecture]
