"""Device mesh over (data, fsdp, tensor); transfers of arrays to and from it."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from ntkrl import trees
from ntkrl.runtime.distributed import allgather_object, heartbeat

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int, fsdp: int, tensor: int, devices: list | None = None) -> Mesh:
    """Arrange devices in a (data, fsdp, tensor) mesh.

    Args:
      data, fsdp, tensor: axis sizes ≥ 1; one may be −1 for all remaining devices.
      devices: devices to use; None for all.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    known = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) == 1 and known > 0 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if min(sizes) < 1 or int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} does not fit {len(devices)} devices; "
            "the sizes must multiply to that number, one of them may be -1."
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def on_device(leaf: jax.Array) -> jax.Array:
    """Return an array in device memory, also where it is offloaded to the host's."""
    return jax.device_put(leaf, leaf.sharding.with_memory_kind("device"))


def place_rows(tree: Any, mesh: Mesh) -> Any:
    """Shard the rows of a batch over the data and fsdp axes, see `row_sharding`.

    Args:
      tree: arrays with a leading row axis of one length; the same in every process, which
        transfers its addressable rows.
      mesh: the device mesh.
    """
    sharding = row_sharding(jax.tree.leaves(tree)[0].shape[0], mesh)
    return place(tree, jax.tree.map(lambda leaf: sharding, tree))


def place(tree: Any, shardings: Any) -> Any:
    """Transfer arrays to devices by their shardings.

    Args:
      tree: arrays; host arrays must be the same in every process, which transfers its
        addressable shards.
      shardings: one per array.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    heartbeat()  # from here on this process may wait for others
    return jax.tree.map(_place, tree, shardings)


def _place(leaf: Any, sharding: Sharding) -> jax.Array:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return _identity(sharding)(leaf)  # device_put moves no keys between processes
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)


@functools.cache
def _identity(sharding: Sharding) -> jax.stages.Wrapped:
    """Return the program that moves an array to a sharding, compiled once."""
    return jax.jit(lambda leaf: leaf, out_shardings=sharding)


def row_sharding(rows: int, mesh: Mesh) -> NamedSharding:
    """Return the sharding of a row axis: replicated if data × fsdp does not divide it."""
    divisible = rows % trees.row_parts(mesh) == 0
    return NamedSharding(mesh, PartitionSpec(trees.ROWS) if divisible else PartitionSpec())


def offload_to_host(shardings: Any, tree: Any) -> Any:
    """Return shardings with memory kind "pinned_host", but for scalars."""
    return jax.tree.map(
        lambda sharding, leaf: sharding.with_memory_kind("pinned_host") if leaf.ndim else sharding,
        shardings,
        tree,
    )


def fetch(tree: Any) -> Any:
    """Gather sharded arrays as full numpy arrays in this process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    heartbeat()
    return jax.tree.map(trees.gather_to_host, tree)


def device_memory(mesh: Mesh) -> float | None:
    """Return the bytes that a program may use on each device; None where none reports a limit.

    All processes must call it: each knows its own devices' limits, and the least holds for all.
    """
    stats = [device.memory_stats() for device in mesh.local_devices]
    limits = [values["bytes_limit"] for values in stats if values and "bytes_limit" in values]
    gathered = allgather_object("the devices' memory", min(limits, default=None))
    return min((limit for limit in gathered if limit is not None), default=None)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the fully replicated sharding."""
    return NamedSharding(mesh, PartitionSpec())
