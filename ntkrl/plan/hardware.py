"""Devices to compile for, by name.

A TPU that is not attached is described to its own compiler (libtpu, extra `tpu-plan`), a GPU to
XLA's compiler for CUDA (extra `gpu-plan`); `cpu:8` are virtual devices, and `gpu` are those of this
machine.
"""

import dataclasses
import importlib.resources
import importlib.util
import os
import platform
import re

import jax

from ntkrl.numerics import GIB
from ntkrl.plan.chips import GPUS, TPUS, Chip

# topology by product size; v4 and v5p are sold by cores, two to a chip, the others by chips
TORUS_2D = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
TORUS_3D = {
    **{8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8"},
    **{512: "4x8x8", 1024: "8x8x8"},
}
TOPOLOGIES = {"v4": TORUS_3D, "v5e": TORUS_2D, "v5p": TORUS_3D, "v6e": TORUS_2D}

# axes of at least this many chips close to a ring; on a 3D torus, if all axes have them
RING_2D, RING_3D = 16, 4

GPU_COUNTS = (1, 2, 4, 8)
GPU_COMPILER = ("jax_cuda12_plugin", "jax_plugins.xla_cuda12", "nvidia.cuda_nvcc")
# JAX's default (docs.jax.dev/en/latest/gpu_memory_allocation.html)
MEMORY_RESERVED = 0.75

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
      name: `v5e-16` or `v5e:4x4` (see `tpu_topology`), `h200` or `h200-8` (see `gpu_topology`),
        `cpu:8`, or `gpu`.

    Raises:
      ValueError: an unknown name, a shape the compiler refuses, no compiler, or no such devices.
    """
    if name == "gpu":
        return _gpus()
    if cpus := re.fullmatch(r"cpu:([1-9]\d*)", name):
        return Machine(name, Chip(), _cpus(int(cpus[1])))
    if (gpus := gpu_topology(name)) is not None:
        return _abstract_gpus(name, *gpus)
    kind, shape = tpu_topology(name)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"--topology={name} needs the TPU compiler, which is not installed: "
            "pip install 'ntkrl[tpu-plan]'. No TPU is needed; cpu:8 works without."
        )
    for variable, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    # the two cores of a v4 chip form one device (megacore), the default on real machines
    options = {"chip_config_name": "megacore"} if kind == "v4" else {}
    devices = _described(name, "tpu", topology_name=f"{kind}:{shape}", **options)
    return Machine(name, _on_torus(kind, shape), devices)


def _described(name: str, compiler: str, **options: str) -> list[jax.Device]:
    """Return devices that need not exist, described to their compiler."""
    jax.config.update("jax_platforms", "cpu")  # nothing runs on a device that is attached
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(platform=compiler, **options)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--topology={name} cannot be described: {reason}") from error
    return list(topology.devices)


def _on_torus(kind: str, shape: str) -> Chip:
    """Return a TPU chip with its links in a slice of a shape."""
    chip, torus = TPUS[kind], tuple(map(int, shape.split("x")))
    assert chip.links is not None
    ring = RING_2D
    if TOPOLOGIES[kind] is TORUS_3D:
        ring = RING_3D if min(torus) >= RING_3D else max(torus) + 1
    return dataclasses.replace(chip, links=dataclasses.replace(chip.links, torus=torus, ring=ring))


def gpu_topology(name: str) -> tuple[str, int] | None:
    """Return kind and number of GPUs of one machine: `h200-8` is `("h200", 8)`, `h200` has one.

    Returns:
      None if the name is not of a GPU.

    Raises:
      ValueError: a number that one machine does not have.
    """
    match = re.fullmatch(r"([a-z]\d+(?:-\d+gb)?)(?:-(\d+))?", name)
    if match is None or match[1] not in GPUS:
        return None
    count = int(match[2]) if match[2] else 1
    if count not in GPU_COUNTS:
        known = ", ".join(f"{match[1]}-{n}" for n in GPU_COUNTS)
        raise ValueError(
            f"--topology={name}: the GPUs of one machine are planned, {known}, not {count}."
        )
    return match[1], count


def _abstract_gpus(name: str, kind: str, count: int) -> Machine:
    """Describe GPUs to XLA's compiler for CUDA, with its ptxas from the package nvidia-cuda-nvcc.

    Raises:
      ValueError: a platform without that compiler, or the extra is not installed.
    """
    system = platform.system()
    if system != "Linux":
        raise ValueError(
            f"--topology={name} needs the GPU compiler, which exists for Linux only, not {system}; "
            "cpu:8 works here."
        )
    missing = [module for module in GPU_COMPILER if not _installed(module)]
    if missing:
        raise ValueError(
            f"--topology={name} needs the GPU compiler, of which {' and '.join(missing)} cannot be "
            "imported: pip install 'ntkrl[gpu-plan]'. No GPU is needed; cpu:8 works without."
        )
    # read when the compiler is loaded, that is, when the devices are described
    nvcc, flags = importlib.import_module(GPU_COMPILER[-1]), os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_cuda_data_dir" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_cuda_data_dir={nvcc.__path__[0]}".strip()
    target = importlib.resources.files("ntkrl.plan").joinpath("gpus", f"{kind}.txtpb")
    text = target.read_text("utf-8")
    devices = _described(name, "cuda", target_config=text, topology=f"1x1x{count}")
    chip = GPUS[kind]
    assert chip.memory_gib is not None
    reserved = dataclasses.replace(chip, memory_gib=chip.memory_gib * _reserved())
    return Machine(name, reserved, devices)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def _reserved() -> float:
    """Return the fraction of a GPU's memory that JAX reserves for a program's arrays."""
    return float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_RESERVED))


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
        f"{', '.join(GPUS)}, alone or with a number of GPUs such as h200-8; cpu:N for N virtual "
        "devices; gpu for those of this machine."
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
