"""Names of machines, and devices to compile for where there are none.

A TPU is described to its own compiler (libtpu, extra `tpu-plan`); `cpu:8` are virtual devices, and
`gpu` are those of this machine.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax

from ntkrl.numerics import GIB
from ntkrl.plan.chips import CHIPS, Chip

# v4 and v5p are sold by cores, of which a chip has two; the others by chips
FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
SOLID = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8"}
SOLID |= {512: "4x8x8", 1024: "8x8x8"}
# what this machine is counts nothing: libtpu asks nobody, and does not complain
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it is locked for a chip's sake
}
SOLD = {"v4": SOLID, "v5e": FLAT, "v5p": SOLID, "v6e": FLAT}


@dataclasses.dataclass(frozen=True, eq=False)
class Machine:
    """Devices to compile for.

    name: as given. chip: what is known of each. devices: jax devices, maybe of no real machine.
    """

    name: str
    chip: Chip
    devices: list[Any]


def shape_of(name: str) -> tuple[str, str]:
    """Return kind and shape of a TPU: `v5e-16` and `v5e:4x4` are both `("v5e", "4x4")`.

    Raises:
      ValueError: a name that is not known; says which are.
    """
    found = re.fullmatch(r"(\w+)-(\d+)", name)
    if found and found[1] in SOLD and int(found[2]) in SOLD[found[1]]:
        return found[1], SOLD[found[1]][int(found[2])]
    found = re.fullmatch(r"(\w+):(\d+x\d+(x\d+)?)", name)
    if found and found[1] in SOLD and (found[3] is None) == (SOLD[found[1]] is FLAT):
        return found[1], found[2]
    known = "; ".join(
        f"{kind}:{next(iter(sold.values()))} and the like, or {kind}-"
        + "|".join(str(size) for size in sold)
        for kind, sold in SOLD.items()
    )
    raise ValueError(
        f"--topology={name} is not known; there are {known} (v4 and v5p count cores, two a chip); "
        "cpu:N for N virtual devices; gpu for those of this machine."
    )


def machine(name: str) -> Machine:
    """Describe a machine by name.

    Args:
      name: see `shape_of`; or `cpu:8`, or `gpu`.

    Raises:
      ValueError: an unknown name, a shape the compiler refuses, no compiler, or no such devices.
    """
    if name == "gpu":
        return _gpus()
    if cpus := re.fullmatch(r"cpu:([1-9]\d*)", name):
        return Machine(name, Chip(), _cpus(int(cpus[1])))
    kind, shape = shape_of(name)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"--topology={name} needs the TPU compiler, which is not installed: "
            "pip install 'ntkrl[tpu-plan]'. No TPU is needed; cpu:8 works without."
        )
    jax.config.update("jax_platforms", "cpu")  # nothing runs on a TPU, even where there is one
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    # a v4 chip's two cores work as one device, as they do by default on the machine
    given = {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        topology = f"{kind}:{shape}"
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **given)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--topology={name} cannot be described: {reason}") from error
    return Machine(name, CHIPS[kind], list(found.devices))


def _cpus(count: int) -> list[Any]:
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass  # the devices are made already, and may do
    found = jax.local_devices(backend="cpu")
    if len(found) < count:
        raise ValueError(f"--topology=cpu:{count}: there are {len(found)} CPU devices by now.")
    return found[:count]


def _gpus() -> Machine:
    try:
        found = jax.local_devices(backend="gpu")
    except RuntimeError as error:
        raise ValueError("--topology=gpu: there is no GPU here that JAX can use.") from error
    stats = found[0].memory_stats()
    limit = stats["bytes_limit"] / GIB if stats else None
    return Machine(f"{len(found)} × {found[0].device_kind}", Chip(memory_gib=limit), found)
