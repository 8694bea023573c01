"""Stored tensors onto their devices: each host reads the blocks its devices hold, and no more."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from ntkrl import trees
from ntkrl.models import files
from ntkrl.models.family import Family
from ntkrl.types import Array


def read_params(
    directory: Path,
    family: Family,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    mesh: Mesh | None,
    tied: bool = False,
    stem: str = files.STEM,
) -> dict[str, Array]:
    """Read leaves of a model.

    Args:
      directory: the model directory.
      family: says how tensors are called, and how leaves are sharded.
      shapes: by our name; leaves come in those dtypes.
      mesh: of the devices, or None for one.
      tied: whether a stored head is the embedding once more, and left out.
      stem: how the file of tensors is called, without its ending.

    Raises:
      ValueError: tensors that do not fit, all of them in one message.
    """
    sizes = {name: leaf.shape for name, leaf in shapes.items()}
    stored = files.check_tensors(directory, family, sizes, tied, stem)
    placed, leaves = placements(family, shapes, mesh), {}
    for name, leaf in shapes.items():

        def block(at: tuple[slice, ...], name=name, leaf=leaf) -> np.ndarray:
            pairs = zip(at, leaf.shape, strict=True)
            return stored.read(name, [part.indices(size)[:2] for part, size in pairs], leaf.dtype)

        # called once for devices that hold the same block
        leaves[name] = jax.make_array_from_callback(leaf.shape, placed[name], block)
    return leaves


def placements(
    family: Family, shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh | None
) -> dict[str, Any]:
    """Return the sharding of every leaf, by name."""
    if mesh is None:
        return dict.fromkeys(shapes, SingleDeviceSharding(jax.devices()[0]))
    return trees.shardings(dict(shapes), family.sharding, mesh)
