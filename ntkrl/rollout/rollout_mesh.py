"""The mesh that completions are sampled on: (data, tensor) over the devices of training.

Each token of a completion reads every weight once. Tensor parts divide that reading, and pay for
it with sums over devices; data parts read the same weights for other rows.
"""

import dataclasses
import math
from collections.abc import Mapping

from jax.sharding import Mesh

from ntkrl import runtime

AXES = ("data", "tensor")
LATENCY_BYTES = 16e6
"""Bytes that a device's memory delivers while it waits for a sum over devices: 20 µs at 0.8 TB/s
(TPU v5e), 5 at 3 (H100)."""


@dataclasses.dataclass(frozen=True)
class DecodingWork:
    """The work that a rollout mesh divides.

    heads: number that tensor parts must divide, of query heads and of key-value heads.
    layers: with two sums over tensor parts each. weight_bytes: of the params in the compute dtype.
    rows: completions sampled together, which data parts divide.
    """

    heads: int
    layers: int
    weight_bytes: float
    rows: int

    def divides(self, devices: int, tensor: int) -> bool:
        """Return whether tensor parts divide the heads, and the other devices the rows."""
        return self.heads % tensor == 0 and self.rows % (devices // tensor) == 0

    def more_parts(self, devices: int, tensor: int) -> int | None:
        """Return the next larger number of tensor parts that divides the work, if there is one."""
        larger = (parts for parts in _divisors(devices) if parts > tensor)
        return next((parts for parts in larger if self.divides(devices, parts)), None)

    def bytes_per_token(self, tensor: int) -> float:
        """Return the bytes that a device reads for a token, waits for sums included."""
        waits = 2 * self.layers + 2 if tensor > 1 else 0
        return self.weight_bytes / tensor + waits * LATENCY_BYTES


def make_rollout_mesh(sizes: Mapping[str, int | None], training: Mesh, work: DecodingWork) -> Mesh:
    """Return the mesh of a rollout, in the order of the devices of the mesh of training.

    Args:
      sizes: parts by axis, data and tensor; −1 or None for all that the other leaves. If both are
        None, the parts with the least `bytes_per_token` among those that divide heads and rows, or
        heads alone if none does both.
      training: mesh of the params.
      work: what is divided.

    Raises:
      ValueError: sizes that do not divide the devices, the heads or the rows; all in one message.
    """
    devices = list(training.devices.flat)
    asked = {axis: size for axis in AXES if (size := sizes[axis]) not in (None, -1)}
    if asked:
        problems = _problems(len(devices), asked, work)
        if problems:
            raise ValueError(_refusal(len(devices), asked, problems, work))
    if "tensor" in asked:
        tensor = asked["tensor"]
    else:
        tensor = len(devices) // asked["data"] if asked else _chosen(len(devices), work)
    return runtime.make_mesh(-1, 1, tensor, devices)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _chosen(devices: int, work: DecodingWork) -> int:
    """Return the tensor parts that are chosen by default."""
    parts = [tensor for tensor in _divisors(devices) if work.heads % tensor == 0]
    dividing = [tensor for tensor in parts if work.divides(devices, tensor)]
    return min(dividing or parts, key=work.bytes_per_token)


def _problems(devices: int, asked: Mapping[str, int], work: DecodingWork) -> list[str]:
    """List what given sizes do not divide."""
    product, problems = math.prod(asked.values()), []
    parts = dict(asked)
    if len(asked) == len(AXES):
        if product != devices:
            problems.append(f"data × tensor = {product} is not the {devices} devices")
    elif devices % product:
        problems.append(f"{next(iter(asked))} = {product} does not divide the {devices} devices")
    else:
        parts = dict.fromkeys(AXES, devices // product) | parts
    for axis, total, what in (
        ("tensor", work.heads, "heads"),
        ("data", work.rows, "rows of a rollout"),
    ):
        if axis in parts and total % parts[axis]:
            problems.append(f"{axis} = {parts[axis]} does not divide the {total} {what}")
    return problems


def _refusal(
    devices: int, asked: Mapping[str, int], problems: list[str], work: DecodingWork
) -> str:
    """Return the message for sizes that do not fit, with the nearest that do."""
    settings = " ".join(f"rollout.mesh.{axis}={size}" for axis, size in asked.items())
    fitting = [tensor for tensor in _divisors(devices) if work.divides(devices, tensor)]
    advice = "no other sizes fit either, so leave both None"
    if fitting:
        wanted = asked["tensor"] if "tensor" in asked else devices / asked["data"]
        nearest = min(fitting, key=lambda size: abs(math.log(size / wanted)))
        advice = f"the nearest that fits is data={devices // nearest} tensor={nearest}"
    return f"{settings}: {'; '.join(problems)}; {advice}."
