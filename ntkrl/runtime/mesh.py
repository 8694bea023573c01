"""Device mesh over (data, fsdp, tensor), and where batches go."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from ntkrl import trees
from ntkrl.runtime.processes import mark

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int, fsdp: int, tensor: int, devices: list | None = None) -> Mesh:
    """Arrange devices in a (data, fsdp, tensor) mesh.

    Args:
      data, fsdp, tensor: axis sizes ≥ 1; one of them may be −1 for "all that is left".
      devices: devices to use; None for all.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    given = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) == 1 and given > 0 and len(devices) % given == 0:
        sizes[sizes.index(-1)] = len(devices) // given
    if min(sizes) < 1 or int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} does not fit {len(devices)} devices; "
            "the sizes must multiply to that number, and one of them may be -1."
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def place_rows(tree: Any, mesh: Mesh) -> Any:
    """Put a batch on the mesh, rows spread over the data and fsdp axes together.

    Args:
      tree: arrays with one leading row axis, equally long; the same in every process.
      mesh: the device mesh.

    Returns:
      The arrays, placed by `row_sharding`; each process gives the rows of its devices.
    """
    sharding = row_sharding(jax.tree.leaves(tree)[0].shape[0], mesh)
    return place(tree, jax.tree.map(lambda leaf: sharding, tree))


def place(tree: Any, shardings: Any) -> Any:
    """Put arrays where shardings say.

    Args:
      tree: arrays, host ones the same in every process.
      shardings: one per array.

    Returns:
      The arrays, of which each process gives what its devices hold.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    mark()  # what follows may wait for the others, unlike what made the arrays
    return jax.tree.map(_place, tree, shardings)


def _place(leaf: Any, sharding: Sharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.jit(lambda key: key, out_shardings=sharding)(leaf)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)


def row_sharding(rows: int, mesh: Mesh) -> NamedSharding:
    """Return how so many rows lie: whole everywhere where data and fsdp do not divide them."""
    whole = rows % trees.row_parts(mesh)
    return NamedSharding(mesh, PartitionSpec() if whole else PartitionSpec(trees.ROWS))


def on_host(shardings: Any, tree: Any) -> Any:
    """Return shardings whose arrays wait in the host's memory; scalars stay on the devices."""

    def moved(sharding: NamedSharding, leaf: Any) -> NamedSharding:
        return sharding.with_memory_kind("pinned_host") if leaf.ndim else sharding

    return jax.tree.map(moved, shardings, tree)


def fetch(tree: Any) -> Any:
    """Bring arrays to this process as whole numpy arrays, wherever their shards are."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    mark()
    return jax.tree.map(trees.whole, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())
