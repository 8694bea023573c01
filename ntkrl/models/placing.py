"""Stored tensors onto their devices: each host reads the blocks its devices hold, and no more."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from ntkrl import trees
from ntkrl.models import files
from ntkrl.models.family import Family
from ntkrl.types import Params


def read_params(
    directory: Path, family: Family, shapes: Params, mesh: Mesh | None, tied: bool = False
) -> Params:
    """Read every leaf of a model.

    Args:
      directory: the model directory.
      family: says how tensors are called, and how leaves are sharded.
      shapes: tree of jax.ShapeDtypeStruct; leaves come in those dtypes.
      mesh: of the devices, or None for one.
      tied: whether a stored head is the embedding once more, and left out.

    Raises:
      ValueError: tensors that do not fit, all of them in one message.
    """
    named = trees.named_leaves(shapes)
    sizes = {name: leaf.shape for name, leaf in named.items()}
    stored = files.check_tensors(directory, family, sizes, tied)
    if mesh is None:
        placed = dict.fromkeys(named, SingleDeviceSharding(jax.devices()[0]))
    else:
        placed = trees.named_leaves(trees.shardings(shapes, family.sharding, mesh))
    leaves = []
    for name, leaf in named.items():
        read = functools.lru_cache(lambda *ends, n=name, d=leaf.dtype: stored.read(n, ends, d))

        def block(at: tuple[slice, ...], read=read, shape=leaf.shape) -> np.ndarray:
            # devices that hold the same block get what was read once
            return read(*(part.indices(size)[:2] for part, size in zip(at, shape, strict=True)))

        leaves.append(jax.make_array_from_callback(leaf.shape, placed[name], block))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)
