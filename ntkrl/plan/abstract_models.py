"""Networks as placed shapes: policies, reward models and a kernel, with no array allocated."""

import importlib.resources
import json
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ntkrl import data, models, ntk, runtime, trees
from ntkrl.numerics import DTYPES
from ntkrl.settings import RunSettings
from ntkrl.setup import is_python_function
from ntkrl.types import Params, Policy, Scorer

PUBLISHED_MODELS: dict[str, dict[str, Any]] = json.loads(
    importlib.resources.files("ntkrl.plan").joinpath("published_models.json").read_text("utf-8")
)
"""config.json entries of models on the Hugging Face hub, so that planning needs no download.

Entries that affect no shape are left out.
"""


def describe_policy(settings: models.ModelSettings, mesh: Mesh) -> tuple[Policy, Params]:
    """Return the policy that a run starts from, and its params as placed shapes.

    The vocabulary has the stored rows, or model.vocab_size; rows that a template may add are not
    known without the tokenizer.

    Raises:
      ValueError: an unknown model, or impossible config entries.
    """
    if settings.path is None:
        with tempfile.TemporaryDirectory() as directory:
            data.save_tokenizer(directory)
            size = len(data.load_tokenizer(directory))
        entries = {**settings.new, "vocab_size": size, "architectures": [settings.architecture]}
    else:
        entries = read_entries(settings.path)
    options = models.ModelOptions(
        compute_dtype=None if settings.compute_dtype is None else DTYPES[settings.compute_dtype],
        remat=settings.remat,
        untie=settings.untie,
        lora=models.Lora(**settings.lora) if settings.lora["rank"] else None,
    )
    dtype = DTYPES[settings.dtype]
    policy, shapes = models.describe(entries["architectures"][0], entries, dtype, mesh, options)
    rows = settings.vocab_size
    if rows is not None and rows != policy.vocab_size:
        policies = []  # a Policy is not an array, so eval_shape cannot return it

        def resized(params: Params) -> Params:
            other, params = models.resized(policy, params, rows)
            policies.append(other)
            return params

        shapes = jax.eval_shape(resized, shapes)
        (policy,) = policies
    return policy, placed(shapes, policy.sharding, mesh)


def describe_rewards(settings: RunSettings, mesh: Mesh) -> dict[str, tuple[Scorer, Params]]:
    """Return the reward models of a run by name; reward functions in Python are left out.

    Raises:
      ValueError: an unknown model, or impossible config entries.
    """
    scorers = {}
    for spec, _ in settings.reward.functions:
        if not is_python_function(spec):
            dtype = DTYPES[settings.reward.dtype]
            scorer, shapes = models.describe_scorer(read_entries(spec), dtype, mesh, source=spec)
            scorers[Path(spec).name] = scorer, placed(shapes, scorer.sharding, mesh)
    return scorers


def read_entries(path: str) -> dict[str, Any]:
    """Return a model's config.json: from a directory, the local hub cache, or PUBLISHED_MODELS.

    Raises:
      ValueError: found in none of them; nothing is downloaded.
    """
    directory = Path(path)
    if (directory / models.ADAPTER_CONFIG).is_file():
        raise ValueError(f"{path} holds adapters; plan with their base model and model.lora.rank.")
    if directory.exists():
        return models.read_config(models.local_directory(directory))
    if models.HUB_NAME.fullmatch(path):
        cached = huggingface_hub.try_to_load_from_cache(path, "config.json")
        if isinstance(cached, str):
            return models.read_config(Path(cached).parent)
    if path in PUBLISHED_MODELS:
        return PUBLISHED_MODELS[path]
    raise ValueError(
        f"{path!r} is not a directory here, nor in the hub's cache, and its shape is not known; "
        f"give a directory with its config.json, or one of {', '.join(PUBLISHED_MODELS)}."
    )


def kernel_apply(
    policy: Policy, params: Params, mesh: Mesh, length: int
) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
    """Return `K.apply` of the full kernel between last positions of two sequences of a length.

    Args:
      policy: the network's functions.
      params: placed shapes.
      mesh: of the params; other arrays are replicated on it.
      length: tokens of each sequence.

    Returns:
      The jitted function and its abstract arguments: params, two contexts and cotangents.
    """
    row = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=runtime.replicated(mesh))
    position = row.update(shape=(1,))
    context = ntk.Contexts(row, position, position, row.update(dtype=jnp.bool_))
    cotangents = row.update(shape=(1, policy.vocab_size), dtype=jnp.float32)
    apply = ntk.kernel_program(policy, params, context, lambda kernel, c: kernel.apply(c))
    return apply, (params, context, context, cotangents)


def placed(tree: Any, patterns: trees.Patterns, mesh: Mesh) -> Any:
    """Set the sharding of every shape of a tree."""
    shardings = trees.shardings(tree, patterns, mesh)
    return jax.tree.map(lambda leaf, spec: leaf.update(sharding=spec), tree, shardings)
