"""The networks of a run, described by shapes and places alone: no array is made."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
from jax.sharding import Mesh

from ntkrl import data, models, trees
from ntkrl.numerics import DTYPES
from ntkrl.plan.shapes import SHAPES
from ntkrl.settings import RunSettings
from ntkrl.setup import is_code
from ntkrl.types import Params, Policy, Scorer


def read_entries(path: str) -> dict[str, Any]:
    """Return a model's config.json: of a directory, of the hub's cache here, or as published.

    Raises:
      ValueError: none of them; nothing is fetched.
    """
    directory = Path(path)
    if (directory / models.ADAPTER_CONFIG).is_file():
        raise ValueError(f"{path} holds adapters; plan with their base model and model.lora.rank.")
    if directory.is_dir():
        return models.read_config(directory)
    if models.HUB_NAME.fullmatch(path):
        held = huggingface_hub.try_to_load_from_cache(path, "config.json")
        if isinstance(held, str):
            return models.read_config(Path(held).parent)
    if path in SHAPES:
        return SHAPES[path]
    raise ValueError(
        f"{path!r} is no directory here, nor in the hub's cache, and its shape is not known; give "
        f"a directory with its config.json, or one of {', '.join(SHAPES)}."
    )


def describe_policy(settings: models.ModelSettings, mesh: Mesh) -> tuple[Policy, Params]:
    """Return the policy that a run would start from, and its params as placed shapes.

    The vocabulary has the rows that are stored, or model.vocab_size; those a template may add are
    not known without the tokenizer.

    Raises:
      ValueError: an unknown model, or impossible entries.
    """
    if settings.path is None:
        with tempfile.TemporaryDirectory() as directory:
            data.save_tokenizer(directory)
            rows = len(data.load_tokenizer(directory))
        raw = {**settings.new, "vocab_size": rows}
        raw["architectures"] = [settings.architecture]
    else:
        raw = read_entries(settings.path)
    rank = settings.lora["rank"]
    options = models.ModelOptions(
        compute_dtype=_dtype(settings.compute_dtype),
        remat=settings.remat,
        untie=settings.untie,
        lora=models.Lora(**settings.lora) if rank else None,
    )
    dtype = DTYPES[settings.dtype]
    policy, shapes = models.describe(raw["architectures"][0], raw, dtype, mesh, options)
    rows = settings.vocab_size
    if rows is not None and rows != policy.vocab_size:
        policy, shapes = _changed(lambda *given: models.resized(*given, rows), policy, shapes)
    return policy, placed(shapes, policy.sharding, mesh)


def describe_rewards(settings: RunSettings, mesh: Mesh) -> dict[str, tuple[Scorer, Params]]:
    """Return the reward models that a run scores with, by name; functions are no business here.

    Raises:
      ValueError: an unknown model, or impossible entries.
    """
    found = {}
    for spec, _ in settings.reward.functions:
        if not is_code(spec):
            dtype = DTYPES[settings.reward.dtype]
            scorer, shapes = models.describe_scorer(read_entries(spec), dtype, mesh, source=spec)
            found[Path(spec).name] = scorer, placed(shapes, scorer.sharding, mesh)
    return found


def placed(tree: Any, patterns: trees.Patterns, mesh: Mesh) -> Any:
    """Give every shape of a tree its place on the mesh."""
    where = trees.shardings(tree, patterns, mesh)
    return jax.tree.map(lambda leaf, place: leaf.update(sharding=place), tree, where)


def held_bytes(tree: Any) -> float:
    """Return the bytes of a tree of placed shapes that one device holds; keys and ints are none."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.ShapeDtypeStruct)]
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in arrays
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        and leaf.sharding.memory_kind != "pinned_host"
    )


def _changed(
    call: Callable[..., tuple[Policy, Params]], policy: Policy, shapes: Params
) -> tuple[Policy, Params]:
    """Apply what changes a policy and its params, to shapes."""
    made = []

    def params(held: Params) -> Params:
        other, found = call(policy, held)
        made.append(other)
        return found

    shapes = jax.eval_shape(params, shapes)
    return made[0], shapes


def _dtype(name: str | None) -> Any:
    return None if name is None else DTYPES[name]
