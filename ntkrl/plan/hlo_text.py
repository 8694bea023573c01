"""The text of an optimised HLO module, parsed: computations, instructions and arrays."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16, "token": 0}
COPIES = ("copy", "bitcast", "convert", "copy-done", "copy-start")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
HEADER = re.compile(r"(ENTRY )?%(\S+) \(.*\{$")
INSTRUCTION = re.compile(r"\s+(ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*)$")
CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%([\w.-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
NAME = re.compile(r"%([\w.-]+)")
CHANNEL = re.compile(r"channel_id=\d+")


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

    @property
    def called(self) -> list[str]:
        """Names of the computations it calls; a loop's body, but not its condition."""
        branches = BRANCHES.search(self.attributes)
        return CALLED.findall(self.attributes) + (NAME.findall(branches[1]) if branches else [])


class HloModule:
    """A parsed program.

    entry: name of the computation that the program runs.
    computations: lines by computation. instructions, arrays: by name of an instruction.
    fused: computations that run within one kernel.
    channels: the first instruction of each channel of a collective.
    devices: partitions of the program.
    """

    def __init__(self, text: str):
        """Parse `compiled.as_text()`."""
        self.entry = ""
        self.computations: dict[str, list[Instruction]] = {}
        self.instructions: dict[str, Instruction] = {}
        self.arrays: dict[str, tuple[HloArray, ...]] = {}
        self.channels: dict[str, str] = {}
        partitions = re.search(r"num_partitions=(\d+)", text)
        self.devices = int(partitions[1]) if partitions else 1
        computation: list[Instruction] = []
        for line in text.splitlines():
            if header := HEADER.match(line):
                computation = self.computations[header[2]] = []
                self.entry = header[2] if header[1] else self.entry
            elif match := INSTRUCTION.match(line):
                computation.append(self._parse(*match.groups()))
                self.instructions[computation[-1].name] = computation[-1]
        self.fused = {
            called
            for instruction in self.instructions.values()
            if instruction.op == "fusion"
            for called in CALLED.findall(instruction.attributes)
        }

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

    def group_size(self, attributes: str) -> int:
        """Return the devices per replica group, in each of XLA's notations."""
        if match := re.search(r"replica_groups=mesh\[([^]]*)\] \{([^}]*)\}", attributes):
            sizes = dict(re.findall(r"'([^']*)'=(\d+)", match[1]))
            return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']*)'", match[2]))
        if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
            return int(match[1])
        if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
            return match[1].count(",") + 1
        return self.devices

    def trip_count(self, line: Instruction, unknown: int) -> int:
        """Return a loop's trip count, from its counter's start, end and increment.

        Args:
          line: the loop.
          unknown: returned if the end depends on data.
        """
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line.attributes):
            return int(known[1])
        condition, body = (
            self.root(re.findall(rf"{part}=%([\w.-]+)", line.attributes)[0])
            for part in ("condition", "body")
        )
        if condition.op == "fusion":
            condition = self.root(condition.called[0])
        ends = self._integers(condition.operands)
        if condition.op != "compare" or len(ends) != 1:
            return unknown
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

    def root(self, computation: str) -> Instruction:
        """Return the line whose result is the computation's."""
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
