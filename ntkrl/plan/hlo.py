"""Cost of a compiled program on one device, counted in the text of its optimised HLO.

XLA's own cost analysis counts the body of a loop once; here it is multiplied by the trip count.
Counted are, for every kernel that the program launches, FLOPs of matrix products and the passes
that they take on a matrix unit, elementwise operations, and bytes moved between main memory (HBM)
and the chip; and every collective.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ntkrl.plan.hlo_text import CHANNEL, HloArray, HloModule, Instruction

TPU_PASSES = {"default": 1.0, "high": 3.0, "highest": 6.0}
"""bfloat16 passes of a TPU's matrix unit for one float32 product, by precision."""
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
NO_TRAFFIC = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "partition-id"),
    *("while", "conditional", "call", "after-all", "opt-barrier", "replica-id", "domain"),
    *("async-start", "async-update", "async-done", "copy-done", "slice-done", "send-done"),
}
NO_TRAFFIC_CALLS = ("AllocateBuffer", "ConcatBitcast", "Sharding")
IN_BACKGROUND = ("copy-start", "slice-start")
SLICES = ("dynamic-slice", "slice", "gather")
SOFTMAX = "online-softmax"  # TPU kernel of fused attention: softmax of scores, times the values
CUBLAS = re.compile(r'custom_call_target="__cublas\$')
# as written in a dot, and in a call of cuBLAS
CONTRACTED = re.compile(r'lhs_contracting_(?:dims=|dimensions":)[{[]([\d,"]*)[]}]')
WINDOW = {"size": 1, "stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}
MOVES = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "broadcast"),
    *("reshape", "transpose", "copy", "slice", "dynamic-slice", "dynamic-update-slice", "gather"),
    *("concatenate", "pad", "dot", "convolution", "fusion", "while", "call", "conditional"),
    *("custom-call", "reverse", "convert"),
}
"""Operations that compute no element; a conversion is part of a load or a store."""
# arithmetic instructions per element of XLA's expansions, as in its sources (polynomials of erf,
# tanh, exp and log: elemental IR emitter and MathFunctions); division and roots take several cycles
OPERATIONS = {
    **{"exponential": 12, "exponential-minus-one": 16, "log": 16, "log-plus-one": 20},
    **{"tanh": 20, "erf": 30, "logistic": 16, "power": 30, "sine": 30, "cosine": 30},
    **{"divide": 4, "sqrt": 4, "rsqrt": 4, "remainder": 8},
}


class Launch(NamedTuple):
    """One kernel, such as a fusion.

    name: of its instruction. runs: in the program.
    flops: of matrix products. passes: FLOPs times the passes of a matrix unit.
    operations: of elementwise functions.
    traffic: bytes between main memory and the chip.
    in_background: a copy or collective that overlaps with other kernels.
    """

    name: str
    runs: float
    flops: float
    passes: float
    operations: float
    traffic: float
    in_background: bool = False


class Transfer(NamedTuple):
    """One collective.

    kind: its name without -start. runs: in the program.
    size: bytes of the result. received: bytes that a device receives.
    devices: of a group.
    in_background: it overlaps with kernels.
    """

    kind: str
    runs: float
    size: float
    received: float
    devices: int
    in_background: bool


class Collective(NamedTuple):
    """Collectives of one kind: number of runs, bytes of their results, bytes a device receives."""

    runs: float
    size: float
    received: float


@dataclasses.dataclass(frozen=True)
class HloCost:
    """Cost on one device.

    kernels: in the order of the program.
    transfers: collectives.
    """

    kernels: tuple[Launch, ...] = ()
    transfers: tuple[Transfer, ...] = ()

    @property
    def flops(self) -> float:
        """FLOPs of matrix products."""
        return sum(kernel.runs * kernel.flops for kernel in self.kernels)

    @property
    def passes(self) -> float:
        """FLOPs times the passes of a matrix unit."""
        return sum(kernel.runs * kernel.passes for kernel in self.kernels)

    @property
    def traffic(self) -> float:
        """Bytes between main memory and the chip."""
        return sum(kernel.runs * kernel.traffic for kernel in self.kernels)

    @property
    def launches(self) -> float:
        """Kernels launched, those in the background not counted."""
        return sum(kernel.runs for kernel in self.kernels if not kernel.in_background)

    @property
    def received(self) -> float:
        """Bytes received from other devices."""
        return sum(transfer.runs * transfer.received for transfer in self.transfers)

    @property
    def collectives(self) -> dict[str, Collective]:
        """Collectives by kind."""
        totals: dict[str, Collective] = {}
        for kind, runs, size, received, *_ in self.transfers:
            before = totals.get(kind, Collective(0.0, 0.0, 0.0))
            values = (1.0, size, received)
            totals[kind] = Collective(*(x + runs * y for x, y in zip(before, values, strict=True)))
        return totals


def count(text: str, trips: int = 1, passes: Mapping[str, float] = TPU_PASSES) -> HloCost:
    """Return the cost of one run of a program on one device.

    Args:
      text: `compiled.as_text()`.
      trips: trip count of loops whose end depends on data.
      passes: of a float32 product, by precision.
    """
    counter = _Counter(HloModule(text), trips, passes)
    lines = list(counter.walk(counter.module.entry, 1.0, False))
    return HloCost(
        tuple(line for line in lines if isinstance(line, Launch)),
        tuple(line for line in lines if isinstance(line, Transfer)),
    )


def product_flops(
    left: Sequence[int], right: Sequence[int], out: Sequence[int], attributes: str
) -> float:
    """Count the FLOPs of a dot or convolution: two for each pair of entries multiplied.

    TPUs write products as convolutions, with batch axes as (mostly dilated) windows.

    Args:
      left, right, out: shapes of operands and result.
      attributes: of the instruction.
    """
    if contracted := CONTRACTED.search(attributes):
        return 2.0 * math.prod([*out, *(left[int(n)] for n in re.findall(r"\d+", contracted[1]))])
    left_axes, right_axes, out_axes = re.findall(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)[0]
    match = re.search(r"window=\{([^}]*)\}", attributes)
    window = dict(entry.split("=") for entry in match[1].split()) if match else {}
    size = dict(zip(out_axes, out, strict=True))
    total = 2.0 * size["b"] * size["f"] * right[right_axes.index("i")]
    for axis in range(len(out) - 2):
        taps, stride, pad, dilation, spread = (
            int(window[name].split("x")[axis].split("_")[0]) if name in window else default
            for name, default in WINDOW.items()
        )
        index = np.arange(size[str(axis)])[:, None] * stride + np.arange(taps) * spread - pad
        last = (left[left_axes.index(str(axis))] - 1) * dilation
        total *= np.count_nonzero((index >= 0) & (index <= last) & (index % dilation == 0))
    return float(total)


class _Counter:
    """The costs of a module's lines."""

    def __init__(self, module: HloModule, trips: int, passes: Mapping[str, float]):
        self.module, self.trips, self.passes = module, trips, passes
        self.arrays = module.arrays

    def walk(self, name: str, runs: float, fused: bool) -> Iterator[Launch | Transfer]:
        """Yield the kernels and collectives of a computation.

        Args:
          name: the computation's.
          runs: how often it runs.
          fused: whether it is part of one kernel, which is yielded elsewhere.
        """
        for line in self.module.computations[name]:
            if (transfer := self._transfer(line, runs, fused)) is not None:
                yield transfer
            if not fused:
                flops, passes, operations = self._arithmetic(line)
                traffic = self._traffic(line)
                if flops or traffic:
                    background = line.op in IN_BACKGROUND or transfer is not None
                    yield Launch(line.name, runs, flops, passes, operations, traffic, background)
            times = self.module.trip_count(line, self.trips) if line.op == "while" else 1
            if line.op != "reduce":
                for inner in line.called:
                    yield from self.walk(inner, runs * times, fused or line.op == "fusion")

    def _arithmetic(self, line: Instruction) -> tuple[float, float, float]:
        """Return FLOPs, passes and elementwise operations of a line, a fusion's lines included."""
        if line.op == "fusion":
            return self._fused(line.called[0])
        flops, passes = self._product(line)
        sizes = [math.prod(array.shape) for array in line.arrays[:1]]
        if line.op in ("reduce", "reduce-window"):
            sizes = [math.prod(self.arrays[line.operands[0]][0].shape)]
        operations = 0 if line.op in MOVES else OPERATIONS.get(line.op, 1) * sum(sizes)
        return flops, passes, operations

    @functools.cache  # noqa: B019
    def _fused(self, computation: str) -> tuple[float, float, float]:
        parts = [self._arithmetic(line) for line in self.module.computations[computation]]
        flops, passes, operations = (sum(part) for part in zip(*parts, strict=True))
        return flops, passes, operations

    def _product(self, line: Instruction) -> tuple[float, float]:
        """Return FLOPs and passes of a matrix product."""
        if line.op in ("dot", "convolution") or CUBLAS.search(line.attributes):
            left, right = (self.arrays[name][0] for name in line.operands[:2])
            flops = product_flops(left.shape, right.shape, line.arrays[0].shape, line.attributes)
            if "f32" not in (left.dtype, right.dtype):
                return flops, flops
            precision = re.search(r'operand_precision(?:=\{|":\[")(\w+)', line.attributes)
            return flops, flops * self.passes[precision[1].lower() if precision else "default"]
        if line.name.startswith(SOFTMAX):
            flops = 2.0 * math.prod(line.arrays[0].shape)
            flops *= self.arrays[line.operands[0]][0].shape[-1]
            return flops, flops
        return 0.0, 0.0

    def _transfer(self, line: Instruction, runs: float, fused: bool) -> Transfer | None:
        kind = line.op.removesuffix("-start")
        if kind not in COLLECTIVES:
            return None
        channel = CHANNEL.search(line.attributes)
        if channel and self.module.channels[channel[0]] != line.name:
            return None
        size = _bytes(line.arrays)
        if line.op in ("all-gather-start", "collective-permute-start"):
            # the result is a tuple that repeats the operands
            size = _bytes(array for array in line.arrays if array.shape)
            size -= sum(_bytes(self.arrays[name]) for name in line.operands)
        n = self.module.group_size(line.attributes)
        received = {  # per byte of the result, by the cheapest algorithm
            "all-gather": (n - 1) / n,
            "all-reduce": 2 * (n - 1) / n,
            "reduce-scatter": n - 1,
            "all-to-all": (n - 1) / n,
            "collective-permute": 1,
        }[kind]
        started = line.op != kind and '"is_sync":true' not in line.attributes
        return Transfer(kind, runs, size, size * received, n, fused or started)

    def _traffic(self, line: Instruction) -> float:
        """Return the bytes an instruction reads from main memory and writes to it."""
        if line.op in NO_TRAFFIC or line.op.endswith("-done"):
            return 0.0
        if line.op == "custom-call" and any(name in line.attributes for name in NO_TRAFFIC_CALLS):
            return 0.0
        if line.op == "copy-start":
            return _hbm_bytes(line.arrays[:2])
        if line.op == "slice-start":
            source, piece = line.arrays[:2]
            return piece.size * (source.in_hbm + piece.in_hbm)
        if line.op == "fusion":
            called = line.called[0]
            read = sum(self._fusion_reads(called, i, name) for i, name in enumerate(line.operands))
            return read + self._fusion_writes(called, line.arrays)
        if line.op in SLICES:
            in_hbm = any(array.in_hbm for array in self.arrays[line.operands[0]][:1])
            return in_hbm * _bytes(line.arrays) + _hbm_bytes(line.arrays)
        if line.op == "dynamic-update-slice":
            in_hbm = any(array.in_hbm for array in line.arrays)
            return 2 * in_hbm * _bytes(self.arrays[line.operands[1]])
        operands = {name: self.arrays[name] for name in line.operands}
        results = line.arrays
        if CUBLAS.search(line.attributes):
            results = results[:1]  # beside the product stands scratch memory
        return _hbm_bytes(results) + sum(map(_hbm_bytes, operands.values()))

    def _fusion_reads(self, computation: str, index: int, operand: str) -> float:
        """Return the bytes a fusion reads of an operand: its slices where only they are used."""
        size = _hbm_bytes(self.arrays[operand])
        return min(size, self._used(computation, index, self.arrays[operand])) if size else 0.0

    def _used(self, computation: str, index: int, arrays: tuple[HloArray, ...]) -> float:
        """Return the bytes of a fusion's operand that its lines use, converted or not."""
        lines, number = self.module.computations[computation], re.compile(rf"{index}\b")
        names = {
            line.name for line in lines if line.op == "parameter" and number.match(line.attributes)
        }
        total, converted = 0.0, set[str]()
        for line in lines:
            if not (names | converted) & set(line.operands):
                continue
            if line.op == "bitcast":
                names.add(line.name)
            elif line.op == "convert" and not line.root:
                converted.add(line.name)
            elif line.op in SLICES and line.operands[0] in names | converted:
                total += arrays[0]._replace(shape=line.arrays[0].shape).size
            elif line.op == "fusion" and not converted & set(line.operands):
                inner = line.called[0]
                indices = [i for i, name in enumerate(line.operands) if name in names]
                total += sum(self._used(inner, i, arrays) for i in indices)
            elif not (line.op == "dynamic-update-slice" and line.operands[0] in names):
                return _bytes(arrays)
        return total

    def _fusion_writes(self, computation: str, arrays: tuple[HloArray, ...]) -> float:
        """Return the bytes a fusion writes; of a result updated in place, the slice."""
        lines = {line.name: line for line in self.module.computations[computation]}
        root = self.module.root(computation)
        results = [lines[name] for name in root.operands] if root.op == "tuple" else [root]
        total = 0.0
        for result, array in zip(results, arrays, strict=False):
            line = result
            while line.op == "bitcast" and line.operands[0] in lines:
                line = lines[line.operands[0]]
            update = line.op == "dynamic-update-slice"
            written = self.arrays[line.operands[1]] if update else (array,)
            total += array.in_hbm * _bytes(written)
        return total


def _bytes(arrays: Iterable[HloArray]) -> float:
    return sum(array.size for array in arrays)


def _hbm_bytes(arrays: Iterable[HloArray]) -> float:
    return _bytes(array for array in arrays if array.in_hbm)
