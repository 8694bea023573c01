"""Cost of a compiled program on one device, counted in the text of its optimised HLO.

XLA's own cost analysis counts the body of a loop once; here it is multiplied by the trip count.
Counted are FLOPs of matrix products, the bfloat16 passes they take on a matrix unit, bytes moved
between main memory (HBM) and the chip, and collectives by kind.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16, "token": 0}
PASSES = {"highest": 6, "high": 3}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
NO_TRAFFIC = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "partition-id"),
    *("while", "conditional", "call", "after-all", "opt-barrier", "replica-id", "domain"),
    *("async-start", "async-update", "async-done", "copy-done", "slice-done", "send-done"),
}
NO_TRAFFIC_CALLS = ("AllocateBuffer", "ConcatBitcast", "Sharding")
COPIES = ("copy", "bitcast", "convert", "copy-done", "copy-start")
SLICES = ("dynamic-slice", "slice", "gather")
SOFTMAX = "online-softmax"  # TPU kernel of fused attention: softmax of scores, times the values
CUBLAS = re.compile(r'custom_call_target="__cublas\$')
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
HEADER = re.compile(r"(ENTRY )?%(\S+) \(.*\{$")
INSTRUCTION = re.compile(r"\s+(ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*)$")
CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%([\w.-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
NAME = re.compile(r"%([\w.-]+)")
CHANNEL = re.compile(r"channel_id=\d+")
# as written in a dot, and in a call of cuBLAS
CONTRACTED = re.compile(r'lhs_contracting_(?:dims=|dimensions":)[{[]([\d,"]*)[]}]')
WINDOW = {"size": 1, "stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}


class HloArray(NamedTuple):
    """An array: dtype, shape, and whether it is placed in main memory (HBM)."""

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool

    @property
    def size(self) -> float:
        """Bytes."""
        dtype = re.sub(r"^f8.*", "f8", self.dtype)
        width = BYTES[dtype] if dtype in BYTES else int(re.sub(r"\D", "", dtype)) / 8
        return width * math.prod(self.shape)


class Instruction(NamedTuple):
    """A line of HLO: its results, operands by name, and the attributes that follow them."""

    root: bool
    name: str
    arrays: tuple[HloArray, ...]
    op: str
    operands: tuple[str, ...]
    attributes: str


class Collective(NamedTuple):
    """Collectives of one kind: number of runs, bytes of their results, bytes a device receives."""

    runs: float
    size: float
    received: float


@dataclasses.dataclass(frozen=True)
class HloCost:
    """Cost on one device.

    flops: of matrix products.
    passes: FLOPs times the passes of a bfloat16 matrix unit.
    traffic: bytes between main memory and the chip.
    collectives: by kind.
    """

    flops: float = 0.0
    passes: float = 0.0
    traffic: float = 0.0
    collectives: Mapping[str, Collective] = dataclasses.field(default_factory=dict)

    @property
    def received(self) -> float:
        """Bytes received from other devices."""
        return sum(collective.received for collective in self.collectives.values())

    def add(self, other: HloCost, times: float = 1.0) -> HloCost:
        """Return the sum of this cost and `times` the other."""
        collectives = dict(self.collectives)
        for kind, extra in other.collectives.items():
            before = collectives.get(kind, Collective(0.0, 0.0, 0.0))
            collectives[kind] = Collective(
                *(x + times * y for x, y in zip(before, extra, strict=True))
            )
        return HloCost(
            self.flops + times * other.flops,
            self.passes + times * other.passes,
            self.traffic + times * other.traffic,
            collectives,
        )


def count(text: str, trips: int = 1) -> HloCost:
    """Return the cost of one run of a program on one device.

    Args:
      text: `compiled.as_text()`.
      trips: trip count of loops whose end depends on data.
    """
    return _Module(text, trips).cost


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


class _Module:
    """A parsed program: its computations, instructions by name, and total cost."""

    def __init__(self, text: str, trips: int):
        self.trips = trips
        self.computations: dict[str, list[Instruction]] = {}
        self.instructions: dict[str, Instruction] = {}
        self.arrays: dict[str, tuple[HloArray, ...]] = {}
        self.channels: dict[str, str] = {}
        partitions = re.search(r"num_partitions=(\d+)", text)
        self.devices = int(partitions[1]) if partitions else 1
        entry, computation = "", []
        for line in text.splitlines():
            if header := HEADER.match(line):
                computation = self.computations[header[2]] = []
                entry = header[2] if header[1] else entry
            elif match := INSTRUCTION.match(line):
                computation.append(self._parse(*match.groups()))
                self.instructions[computation[-1].name] = computation[-1]
        self.fused = {
            called
            for instruction in self.instructions.values()
            if instruction.op == "fusion"
            for called in CALLED.findall(instruction.attributes)
        }
        self.cost = self._computation(entry)

    def _parse(self, root: str | None, name: str, result: str, op: str, text: str) -> Instruction:
        depth, end = 1, 0
        while depth and end < len(text):
            depth += (text[end] == "(") - (text[end] == ")")
            end += 1
        self.arrays[name] = tuple(
            HloArray(
                dtype,
                tuple(int(n) for n in sizes.split(",") if n),
                in_hbm=re.search(r"S\([1-9]", layout) is None,
            )
            for dtype, sizes, layout in ARRAY.findall(result)
        )
        operands = tuple(NAME.findall(text[:end]))
        # a collective spread over several fusions appears in each of them, with one channel
        if channel := CHANNEL.search(text[end:]):
            self.channels.setdefault(channel[0], name)
        value = text[: end - 1] if op in ("constant", "parameter") else ""
        return Instruction(
            root is not None, name, self.arrays[name], op, operands, value + text[end:]
        )

    @functools.cache  # noqa: B019
    def _computation(self, name: str) -> HloCost:
        total = HloCost()
        for line in self.computations[name]:
            total = total.add(self._instruction(line))
            if name not in self.fused:
                total = total.add(HloCost(traffic=self._traffic(line)))
            times = self._trip_count(line) if line.op == "while" else 1
            branches = BRANCHES.search(line.attributes)
            called = CALLED.findall(line.attributes)
            for inner in called + (NAME.findall(branches[1]) if branches else []):
                total = total.add(self._computation(inner), times)
        return total

    def _instruction(self, line: Instruction) -> HloCost:
        kind = line.op.removesuffix("-start")
        if line.op in ("dot", "convolution") or CUBLAS.search(line.attributes):
            left, right = (self.arrays[name][0] for name in line.operands[:2])
            flops = product_flops(left.shape, right.shape, line.arrays[0].shape, line.attributes)
            precision = re.search(r"operand_precision=\{(\w+)", line.attributes)
            passes = 1
            if precision is not None and "f32" in (left.dtype, right.dtype):
                passes = PASSES.get(precision[1], 1)
            return HloCost(flops, flops * passes)
        if line.name.startswith(SOFTMAX):
            flops = 2.0 * math.prod(line.arrays[0].shape)
            flops *= self.arrays[line.operands[0]][0].shape[-1]
            return HloCost(flops, flops)
        if kind not in COLLECTIVES:
            return HloCost()
        channel = CHANNEL.search(line.attributes)
        if channel and self.channels[channel[0]] != line.name:
            return HloCost()
        size = _bytes(line.arrays)
        if line.op in ("all-gather-start", "collective-permute-start"):
            # the result is a tuple that repeats the operands
            size = _bytes(array for array in line.arrays if array.shape)
            size -= sum(_bytes(self.arrays[name]) for name in line.operands)
        n = self._group_size(line.attributes)
        received = {  # per byte of the result, by the cheapest algorithm
            "all-gather": (n - 1) / n,
            "all-reduce": 2 * (n - 1) / n,
            "reduce-scatter": n - 1,
            "all-to-all": (n - 1) / n,
            "collective-permute": 1,
        }[kind]
        return HloCost(collectives={kind: Collective(1, size, size * received)})

    def _group_size(self, attributes: str) -> int:
        """Return the devices per replica group, in each of XLA's notations."""
        if match := re.search(r"replica_groups=mesh\[([^]]*)\] \{([^}]*)\}", attributes):
            sizes = dict(re.findall(r"'([^']*)'=(\d+)", match[1]))
            return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']*)'", match[2]))
        if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
            return int(match[1])
        if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
            return match[1].count(",") + 1
        return self.devices

    def _trip_count(self, line: Instruction) -> int:
        """Return a loop's trip count, from its counter's start, end and increment."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line.attributes):
            return int(known[1])
        condition, body = (
            self._root(re.findall(rf"{part}=%([\w.-]+)", line.attributes)[0])
            for part in ("condition", "body")
        )
        if condition.op == "fusion":
            condition = self._root(_called(condition))
        ends = self._integers(condition.operands)
        if condition.op != "compare" or len(ends) != 1:
            return self.trips
        counters = (
            re.search(r"index=(\d+)", self.instructions[name].attributes)
            for name in condition.operands
        )
        index = next((int(match[1]) for match in counters if match), None)
        if index is None:
            return ends[0]
        increment = self._source(body.operands[index])
        steps = self._integers(increment.operands)
        starts = self._integers([self.instructions[line.operands[0]].operands[index]])
        step = steps[0] if increment.op == "add" and steps else 1
        return -(-(ends[0] - (starts[0] if starts else 0)) // step)

    def _root(self, computation: str) -> Instruction:
        return next(line for line in self.computations[computation] if line.root)

    def _source(self, name: str) -> Instruction:
        """Return the instruction that computed a value, through copies of it."""
        line = self.instructions[name]
        while line.op in COPIES:
            line = self.instructions[line.operands[0]]
        return line

    def _integers(self, names: Iterable[str]) -> list[int]:
        """Return those of some values that are integer constants."""
        constants = [line for line in map(self._source, names) if line.op == "constant"]
        matches = (re.match(r"-?\d+", line.attributes) for line in constants)
        return [int(match[0]) for match in matches if match]

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
            called = _called(line)
            read = sum(self._fusion_reads(called, i, name) for i, name in enumerate(line.operands))
            return read + self._fusion_writes(called, line.arrays)
        if line.op in SLICES:
            in_hbm = any(array.in_hbm for array in self.arrays[line.operands[0]][:1])
            return in_hbm * _bytes(line.arrays) + _hbm_bytes(line.arrays)
        if line.op == "dynamic-update-slice":
            in_hbm = any(array.in_hbm for array in line.arrays)
            return 2 * in_hbm * _bytes(self.arrays[line.operands[1]])
        operands = {name: self.arrays[name] for name in line.operands}
        return _hbm_bytes(line.arrays) + sum(map(_hbm_bytes, operands.values()))

    def _fusion_reads(self, computation: str, index: int, operand: str) -> float:
        """Return the bytes a fusion reads of an operand: its slices where only they are used."""
        size = _hbm_bytes(self.arrays[operand])
        return min(size, self._used(computation, index, self.arrays[operand])) if size else 0.0

    def _used(self, computation: str, index: int, arrays: tuple[HloArray, ...]) -> float:
        lines, number = self.computations[computation], re.compile(rf"{index}\b")
        names = {
            line.name for line in lines if line.op == "parameter" and number.match(line.attributes)
        }
        total = 0.0
        for line in lines:
            if not names & set(line.operands):
                continue
            if line.op == "bitcast":
                names.add(line.name)
            elif line.op in SLICES and line.operands[0] in names:
                total += _bytes(line.arrays)
            elif line.op == "fusion":
                inner = _called(line)
                indices = [i for i, name in enumerate(line.operands) if name in names]
                total += sum(self._used(inner, i, arrays) for i in indices)
            elif not (line.op == "dynamic-update-slice" and line.operands[0] in names):
                return _bytes(arrays)
        return total

    def _fusion_writes(self, computation: str, arrays: tuple[HloArray, ...]) -> float:
        """Return the bytes a fusion writes; of a result updated in place, the slice."""
        lines = {line.name: line for line in self.computations[computation]}
        root = self._root(computation)
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


def _called(line: Instruction) -> str:
    """Return the name of the first computation that an instruction calls."""
    return CALLED.findall(line.attributes)[0]


def _bytes(arrays: Iterable[HloArray]) -> float:
    return sum(array.size for array in arrays)


def _hbm_bytes(arrays: Iterable[HloArray]) -> float:
    return _bytes(array for array in arrays if array.in_hbm)
