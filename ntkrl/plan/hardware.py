"""Devices to compile for, by name, and the published figures of their chips.

A TPU that is not attached is described to its own compiler (libtpu, extra `tpu-plan`); `cpu:8` are
virtual devices, and `gpu` are those of this machine.
"""

import dataclasses
import importlib.util
import os
import re

import jax

from ntkrl.numerics import GIB


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip; None where unknown.

    flops: bfloat16 FLOP/s of its matrix units.
    memory_gib: main memory a program may use (GiB).
    memory_rate: bytes/s of main memory.
    link_rate: bytes/s received over all its links together.
    """

    flops: float | None = None
    memory_gib: float | None = None
    memory_rate: float | None = None
    link_rate: float | None = None


# Source: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; links of v4 from Jouppi et al.
# 2304.01433 (six of 50 GB/s each way). Memory is the limit that the compiler enforces (libtpu
# 0.0.42), slightly below the published 32, 16, 95 and 32 GB.
CHIPS = {
    "v4": Chip(275e12, 30.75, 1200e9, 300e9),
    "v5e": Chip(197e12, 15.75, 819e9, 200e9),
    "v5p": Chip(459e12, 95.74, 2765e9, 600e9),
    "v6e": Chip(918e12, 31.25, 1638e9, 400e9),
}

# topology by product size; v4 and v5p are sold by cores, two to a chip, the others by chips
TORUS_2D = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
TORUS_3D = {
    **{8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8"},
    **{512: "4x8x8", 1024: "8x8x8"},
}
TOPOLOGIES = {"v4": TORUS_3D, "v5e": TORUS_2D, "v5p": TORUS_3D, "v6e": TORUS_2D}

# let libtpu load without a TPU: skip metadata-server queries and the lock on the chip
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Machine:
    """Devices to compile for.

    name: as on the command line.
    chip: figures of each device.
    devices: jax devices, possibly of an abstract topology.
    """

    name: str
    chip: Chip
    devices: list[jax.Device]


def machine(name: str) -> Machine:
    """Return the devices of a machine by name.

    Args:
      name: `v5e-16` or `v5e:4x4` (see `tpu_topology`), `cpu:8`, or `gpu`.

    Raises:
      ValueError: an unknown name, a shape the compiler refuses, no compiler, or no such devices.
    """
    if name == "gpu":
        return _gpus()
    if cpus := re.fullmatch(r"cpu:([1-9]\d*)", name):
        return Machine(name, Chip(), _cpus(int(cpus[1])))
    kind, shape = tpu_topology(name)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"--topology={name} needs the TPU compiler, which is not installed: "
            "pip install 'ntkrl[tpu-plan]'. No TPU is needed; cpu:8 works without."
        )
    jax.config.update("jax_platforms", "cpu")  # nothing runs on a TPU, even if one is attached
    for variable, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    # the two cores of a v4 chip form one device (megacore), the default on real machines
    options = {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind}:{shape}", **options
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--topology={name} cannot be described: {reason}") from error
    return Machine(name, CHIPS[kind], list(topology.devices))


def tpu_topology(name: str) -> tuple[str, str]:
    """Return kind and shape of a TPU: `v5e-16` and `v5e:4x4` are both `("v5e", "4x4")`.

    Raises:
      ValueError: an unknown name; the message lists the known ones.
    """
    if match := re.fullmatch(r"(\w+)-(\d+)", name):
        kind, size = match[1], int(match[2])
        if kind in TOPOLOGIES and size in TOPOLOGIES[kind]:
            return kind, TOPOLOGIES[kind][size]
    if match := re.fullmatch(r"(\w+):(\d+x\d+(x\d+)?)", name):
        if match[1] in TOPOLOGIES and (match[3] is None) == (TOPOLOGIES[match[1]] is TORUS_2D):
            return match[1], match[2]
    known = "; ".join(
        f"{kind}:{next(iter(sizes.values()))} and the like, or {kind}-" + "|".join(map(str, sizes))
        for kind, sizes in TOPOLOGIES.items()
    )
    raise ValueError(
        f"--topology={name} is not known; there are {known} (v4 and v5p count cores, two a chip); "
        "cpu:N for N virtual devices; gpu for those of this machine."
    )


def _cpus(count: int) -> list[jax.Device]:
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass  # the backend is initialised already, perhaps with enough devices
    devices = jax.local_devices(backend="cpu")
    if len(devices) < count:
        raise ValueError(
            f"--topology=cpu:{count}: there are {len(devices)} CPU devices, since JAX has started."
        )
    return devices[:count]


def _gpus() -> Machine:
    try:
        devices = jax.local_devices(backend="gpu")
    except RuntimeError as error:
        raise ValueError("--topology=gpu: JAX finds no GPU on this machine.") from error
    stats = devices[0].memory_stats()
    limit = stats["bytes_limit"] / GIB if stats else None
    return Machine(f"{len(devices)} × {devices[0].device_kind}", Chip(memory_gib=limit), devices)
