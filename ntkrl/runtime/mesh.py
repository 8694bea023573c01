"""Device mesh over (data, fsdp, tensor), and where batches go."""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ntkrl import trees

AXES = ("data", "fsdp", "tensor")


def start_processes() -> None:
    """Join the other processes of a multi-host run, where the environment describes one.

    JAX finds Cloud TPU slices, SLURM and Open MPI by itself; elsewhere the three variables
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID describe the run. Nothing is
    done for a single process.
    """
    explicit = "JAX_COORDINATOR_ADDRESS" in os.environ
    slurm = "SLURM_NTASKS" in os.environ and int(os.environ["SLURM_NTASKS"]) > 1
    pod = "," in os.environ["TPU_WORKER_HOSTNAMES"] if "TPU_WORKER_HOSTNAMES" in os.environ else 0
    if not (explicit or slurm or pod) or jax.distributed.is_initialized():
        return
    if explicit:
        jax.distributed.initialize(
            os.environ["JAX_COORDINATOR_ADDRESS"],
            int(os.environ["JAX_NUM_PROCESSES"]),
            int(os.environ["JAX_PROCESS_ID"]),
        )
    else:
        jax.distributed.initialize()


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
      tree: arrays with one leading row axis, equally long.
      mesh: the device mesh.

    Returns:
      The arrays, placed by `row_sharding`.
    """
    return jax.device_put(tree, row_sharding(jax.tree.leaves(tree)[0].shape[0], mesh))


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
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())
