"""What one device does in a compiled program, counted in the text of its HLO.

XLA's own cost analysis counts the body of a loop once; here it counts as often as it runs. Products
are counted by their FLOPs, and once more by the passes a matrix unit takes for them; memory traffic
by what every operation reads and writes outside the chip's own scratch memory; collectives by kind.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from ntkrl.plan.products import product_flops

SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16, "token": 0}
PASSES = {"highest": 6, "high": 3}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "partition-id"),
    *("while", "conditional", "call", "after-all", "opt-barrier", "replica-id", "domain"),
    *("async-start", "async-update", "async-done", "copy-done", "slice-done", "send-done"),
}
NOT_COMPUTED = ("AllocateBuffer", "ConcatBitcast", "Sharding")
SLICED = ("dynamic-slice", "slice", "gather")
SOFTMAX = "online-softmax"  # the TPU compiler's own kernel: softmax of scores, times the values
CUBLAS = re.compile(r'custom_call_target="__cublas\$')
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
HEADER = re.compile(r"(ENTRY )?%(\S+) \(.*\{$")
LINE = re.compile(r"\s+(ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*)$")
CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%([\w.-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
NAMED = re.compile(r"%([\w.-]+)")


class Shaped(NamedTuple):
    """An array: dtype, shape, and whether it lies in the device's main memory."""

    dtype: str
    shape: tuple[int, ...]
    outside: bool

    @property
    def size(self) -> float:
        """Bytes."""
        bits = re.sub(r"^f8.*", "f8", self.dtype)
        each = SIZES[bits] if bits in SIZES else int(re.sub(r"\D", "", bits)) / 8
        return each * math.prod(self.shape)


class Line(NamedTuple):
    """An instruction: its operands by name, and what follows them."""

    root: bool
    name: str
    arrays: tuple[Shaped, ...]
    op: str
    operands: tuple[str, ...]
    rest: str


class Moved(NamedTuple):
    """Collectives of one kind: how many run, bytes of their results, bytes a device receives."""

    count: float
    size: float
    received: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one device does.

    flops: of matrix products.
    passes: the same, times the passes of a bfloat16 matrix unit.
    traffic: bytes between main memory and the chip.
    collectives: by kind.
    """

    flops: float = 0.0
    passes: float = 0.0
    traffic: float = 0.0
    collectives: Mapping[str, Moved] = dataclasses.field(default_factory=dict)

    @property
    def received(self) -> float:
        """Bytes that come in from other devices."""
        return sum(moved.received for moved in self.collectives.values())

    def __add__(self, other: Cost) -> Cost:
        return _combined(self, other, 1.0)

    def times(self, count: float) -> Cost:
        """Return the cost of so many runs."""
        return _combined(Cost(), self, count)


def _combined(a: Cost, b: Cost, times: float) -> Cost:
    moved = dict(a.collectives)
    for kind, one in b.collectives.items():
        held = moved[kind] if kind in moved else (0.0, 0.0, 0.0)
        moved[kind] = Moved(*(x + times * y for x, y in zip(held, one, strict=True)))
    return Cost(
        a.flops + times * b.flops,
        a.passes + times * b.passes,
        a.traffic + times * b.traffic,
        moved,
    )


def count(text: str, trips: int = 1) -> Cost:
    """Count what one device does in a run of a program.

    Args:
      text: `compiled.as_text()`.
      trips: how often a loop runs whose end is data and stands nowhere in the program.
    """
    return _Module(text, trips).cost


class _Module:
    """A parsed program."""

    def __init__(self, text: str, trips: int):
        self.trips = trips
        self.lines: dict[str, list[Line]] = {}
        self.named: dict[str, Line] = {}
        self.arrays: dict[str, tuple[Shaped, ...]] = {}
        self.channels: dict[str, str] = {}
        found = re.search(r"num_partitions=(\d+)", text)
        self.devices = int(found[1]) if found else 1
        entry, made = "", []
        for line in text.splitlines():
            if header := HEADER.match(line):
                made = self.lines[header[2]] = []
                entry = header[2] if header[1] else entry
            elif found := LINE.match(line):
                made.append(self._read(*found.groups()))
                self.named[made[-1].name] = made[-1]
        self.fused = {
            called
            for lines in self.lines.values()
            for line in lines
            if line.op == "fusion"
            for called in CALLED.findall(line.rest)
        }
        self.cost = self._computation(entry)

    def _read(self, root: str | None, name: str, result: str, op: str, after: str) -> Line:
        depth, end = 1, 0
        while depth and end < len(after):
            depth += (after[end] == "(") - (after[end] == ")")
            end += 1
        arrays = tuple(
            Shaped(
                dtype,
                tuple(int(n) for n in sizes.split(",") if n),
                re.search(r"S\([1-9]", layout) is None,
            )
            for dtype, sizes, layout in ARRAY.findall(result)
        )
        self.arrays[name] = arrays
        operands = tuple(NAMED.findall(after[:end]))
        # one that is spread over several fusions is written in each, with one channel
        if channel := re.search(r"channel_id=\d+", after[end:]):
            self.channels.setdefault(channel[0], name)
        inside = after[: end - 1] if op in ("constant", "parameter") else ""
        return Line(root is not None, name, arrays, op, operands, inside + after[end:])

    @functools.cache  # noqa: B019
    def _computation(self, name: str) -> Cost:
        total = Cost()
        for line in self.lines[name]:
            total += self._line(line)
            if name not in self.fused:
                total += Cost(traffic=self._traffic(line))
            times = self._loops(line) if line.op == "while" else 1
            branches = BRANCHES.search(line.rest)
            called = CALLED.findall(line.rest)
            for inner in called + (NAMED.findall(branches[1]) if branches else []):
                total += self._computation(inner).times(times)
        return total

    def _line(self, line: Line) -> Cost:
        kind = line.op.removesuffix("-start")
        if line.op in ("dot", "convolution") or CUBLAS.search(line.rest):
            operands = [self.arrays[name][0] for name in line.operands[:2]]
            shapes = [one.shape for one in (*operands, line.arrays[0])]
            flops = product_flops(*shapes, line.rest)
            precise = re.search(r"operand_precision=\{(\w+)", line.rest)
            wide = precise is not None and any(one.dtype == "f32" for one in operands)
            passes = PASSES[precise[1]] if wide and precise[1] in PASSES else 1
            return Cost(flops, flops * passes)
        if line.name.startswith(SOFTMAX):
            flops = 2.0 * math.prod(line.arrays[0].shape)
            flops *= self.arrays[line.operands[0]][0].shape[-1]
            return Cost(flops, flops)
        if kind not in COLLECTIVES:
            return Cost()
        channel = re.search(r"channel_id=\d+", line.rest)
        if channel and self.channels[channel[0]] != line.name:
            return Cost()
        size = sum(one.size for one in line.arrays)
        if line.op in ("all-gather-start", "collective-permute-start"):  # operands stand there too
            size = sum(one.size for one in line.arrays if one.shape)
            size -= sum(one.size for name in line.operands for one in self.arrays[name])
        return Cost(collectives={kind: Moved(1, size, size * self._share(kind, line.rest))})

    def _share(self, kind: str, rest: str) -> float:
        """Return bytes received per byte of the result, by the fewest there can be."""
        n = self._group(rest)
        return {
            "all-gather": (n - 1) / n,
            "all-reduce": 2 * (n - 1) / n,
            "reduce-scatter": n - 1,
            "all-to-all": (n - 1) / n,
            "collective-permute": 1,
        }[kind]

    def _group(self, rest: str) -> int:
        """Return how many devices take part, in any of the ways XLA writes their groups."""
        if found := re.search(r"replica_groups=mesh\[([^]]*)\] \{([^}]*)\}", rest):
            sizes = dict(re.findall(r"'([^']*)'=(\d+)", found[1]))
            return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']*)'", found[2]))
        if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
            return int(found[1])
        if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
            return found[1].count(",") + 1
        return self.devices

    def _loops(self, line: Line) -> int:
        """Return how often a loop runs: from where its counter starts, to its end, by its step."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line.rest):
            return int(known[1])
        condition, body = (
            self.lines[re.search(rf"{part}=%([\w.-]+)", line.rest)[1]]
            for part in ("condition", "body")
        )
        root = next(one for one in condition if one.root)
        if root.op == "fusion":
            root = next(one for one in self.lines[CALLED.search(root.rest)[1]] if one.root)
        ends = [end for name in root.operands if (end := self._number(name)) is not None]
        if root.op != "compare" or len(ends) != 1:
            return self.trips
        index = [
            int(found[1])
            for name in root.operands
            if (found := re.search(r"index=(\d+)", self.named[name].rest))
        ]
        if not index:
            return ends[0]
        moved = self._moved(next(one for one in body if one.root).operands[index[0]])
        steps = [by for name in moved.operands if (by := self._number(name)) is not None]
        start = self._number(self.named[line.operands[0]].operands[index[0]])
        step = steps[0] if moved.op == "add" and steps else 1
        return -(-(ends[0] - (0 if start is None else start)) // step)

    def _moved(self, name: str) -> Line:
        """Return what made a value, copies aside."""
        line = self.named[name]
        while line.op in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
            line = self.named[line.operands[0]]
        return line

    def _number(self, name: str) -> int | None:
        """Return a value that is an integer in the program, or None."""
        line = self._moved(name)
        found = re.match(r"-?\d+", line.rest) if line.op == "constant" else None
        return None if found is None else int(found[0])

    def _traffic(self, line: Line) -> float:
        """Return the bytes an instruction reads from main memory and writes to it."""
        if line.op in FREE or line.op.endswith("-done"):
            return 0.0
        if line.op == "custom-call" and any(word in line.rest for word in NOT_COMPUTED):
            return 0.0
        if line.op == "copy-start":
            return _outside(line.arrays[:2])
        if line.op == "slice-start":
            source, piece = line.arrays[:2]
            return piece.size * (source.outside + piece.outside)
        if line.op == "fusion":
            called = CALLED.search(line.rest)[1]
            read = sum(self._reads(called, i, name) for i, name in enumerate(line.operands))
            return read + self._writes(called, line.arrays)
        if line.op in SLICED:
            return _outside(self.arrays[line.operands[0]][:1], line.arrays) + _outside(line.arrays)
        if line.op == "dynamic-update-slice":
            return 2 * _outside(line.arrays, self.arrays[line.operands[1]])
        operands = {name: self.arrays[name] for name in line.operands}
        return _outside(line.arrays) + sum(map(_outside, operands.values()))

    def _reads(self, computation: str, index: int, operand: str) -> float:
        """Return the bytes a fusion reads of an operand: slices of it where it needs no more."""
        held = _outside(self.arrays[operand])
        return min(held, self._used(computation, index, self.arrays[operand])) if held else 0.0

    def _used(self, computation: str, index: int, arrays: tuple[Shaped, ...]) -> float:
        lines = self.lines[computation]
        start = re.compile(rf"{index}\b")
        names = {one.name for one in lines if one.op == "parameter" and start.match(one.rest)}
        total = 0.0
        for line in lines:
            if not names & set(line.operands):
                continue
            if line.op == "bitcast":
                names.add(line.name)
            elif line.op in SLICED and line.operands[0] in names:
                total += sum(one.size for one in line.arrays)
            elif line.op == "fusion":
                inner = CALLED.search(line.rest)[1]
                places = [i for i, name in enumerate(line.operands) if name in names]
                total += sum(self._used(inner, place, arrays) for place in places)
            elif not (line.op == "dynamic-update-slice" and line.operands[0] in names):
                return sum(one.size for one in arrays)
        return total

    def _writes(self, computation: str, arrays: tuple[Shaped, ...]) -> float:
        """Return the bytes a fusion writes: the part of a result that it updates in place."""
        lines = {line.name: line for line in self.lines[computation]}
        root = next(line for line in lines.values() if line.root)
        made = [lines[name] for name in root.operands] if root.op == "tuple" else [root]
        total = 0.0
        for last, one in zip(made, arrays, strict=False):
            line = last
            while line.op == "bitcast" and line.operands[0] in lines:
                line = lines[line.operands[0]]
            piece = (one,)
            if line.op == "dynamic-update-slice":
                piece = self.arrays[line.operands[1]]
            total += _outside((one,), piece)
        return total


def _outside(where: tuple[Shaped, ...], arrays: tuple[Shaped, ...] | None = None) -> float:
    """Return the bytes of arrays in main memory; of `arrays`, where those given first lie there."""
    if arrays is None:
        return sum(one.size for one in where if one.outside)
    return sum(one.size for one in arrays) if any(one.outside for one in where) else 0.0
