"""The compiled decode loop of a sampler: its kernels, and copies of weights and caches in it."""

import dataclasses
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ntkrl.types import PromptBatch

HEADER = re.compile(r"(?:ENTRY )?%(\S+) \(.*\{$")
LINE = re.compile(r"\s+(ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*)$")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
CALLED = re.compile(r"(?:calls|body|to_apply)=%([\w.-]+)")
TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call"}
NAME = re.compile(r"%([\w.-]+)")


class Line(NamedTuple):
    """An instruction: results as `(dtype, sizes above 1 in rising order)`, and the text after."""

    root: bool
    name: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    op: str
    text: str


def shape_of(sizes) -> tuple[int, ...]:
    """Return the sizes of an array by which its copies and transposes are recognised."""
    return tuple(sorted(int(size) for size in sizes if int(size) > 1))


@dataclasses.dataclass(frozen=True)
class DecodeLoop:
    """The loop over tokens: its computation's name, trip count (None if data), all computations."""

    body: str
    trips: int | None
    computations: dict[str, list[Line]]

    def launched(self, name: str | None = None, times: int = 1) -> Iterator[tuple[Line, int]]:
        """Yield the instructions outside fusions and their runs per token, of inner loops too."""
        for line in self.computations[self.body if name is None else name]:
            yield line, times
            if line.op in ("while", "call", "conditional"):
                known = TRIPS.search(line.text)
                inner = times * int(known[1]) if known else times
                for called in CALLED.findall(line.text):
                    yield from self.launched(called, inner)

    @property
    def kernels(self) -> int:
        """Kernels per token of a GPU."""
        return sum(times for line, times in self.launched() if line.op not in NO_KERNEL)

    def moved(self, shapes: dict[tuple[int, ...], str], dtype: str = "") -> list[str]:
        """Return the kernels whose result has the shape of a weight or cache: copies of it.

        Arrays that are updated in place do not count, nor do casts inside a product's kernel.

        Args:
          shapes: names by `shape_of` their arrays.
          dtype: of the results, as HLO writes it; any if empty.
        """
        return [
            f"{shapes[shape]}: {line.op} {line.name}"
            for line, _ in self.launched()
            if line.op not in NO_KERNEL and not self._in_place(line)
            for kind, shape in line.arrays
            if shape in shapes and kind.startswith(dtype)
        ]

    def _in_place(self, line: Line) -> bool:
        """Return whether an instruction updates a slice of each of its results."""
        if line.op != "fusion":
            return line.op == "dynamic-update-slice"
        lines = {inner.name: inner for inner in self.computations[CALLED.findall(line.text)[0]]}
        root = next(inner for inner in lines.values() if inner.root)
        results = [lines[name] for name in _operands(root)] if root.op == "tuple" else [root]
        while any(result.op == "bitcast" for result in results):
            results = [lines[_operands(r)[0]] if r.op == "bitcast" else r for r in results]
        return all(result.op == "dynamic-update-slice" for result in results)


def _operands(line: Line) -> list[str]:
    return NAME.findall(line.text.partition(")")[0])


def decode_loop(text: str) -> DecodeLoop:
    """Return the loop over tokens of a `decode_chunk`, the one that carries most arrays."""
    computations: dict[str, list[Line]] = {}
    for row in text.splitlines():
        if header := HEADER.match(row):
            computation = computations[header[1]] = []
        elif match := LINE.match(row):
            arrays = tuple(
                (d, shape_of(n.split(",") if n else ())) for d, n in ARRAY.findall(match[3])
            )
            computation.append(Line(match[1] is not None, match[2], arrays, match[4], match[5]))
    lines = [line for lines in computations.values() for line in lines]
    loop = max((line for line in lines if line.op == "while"), key=lambda line: len(line.arrays))
    known = TRIPS.search(loop.text)
    body = re.search(r"body=%([\w.-]+)", loop.text)[1]
    return DecodeLoop(body, int(known[1]) if known else None, computations)


def abstract_chunk(sampler, params, prompts, prompt_length, sharding=None):
    """Return shapes of the arguments of `decode_chunk` with a full-grown cache.

    Args:
      sampler: a rollout.Sampler.
      params: shapes of the policy's params.
      prompts, prompt_length: of the batch.
      sharding: of every array, or None.
    """

    def shapes(tree):
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
        )

    ids = jax.ShapeDtypeStruct((prompts, prompt_length), jnp.int32)
    rows = jax.ShapeDtypeStruct((prompts,), jnp.int32)
    batch = PromptBatch(tokens=ids, mask=ids.update(dtype=jnp.bool_), rows=rows, copies=rows)
    copy = jax.eval_shape(sampler.policy.decode_params, params)
    columns = sampler.cache_columns(prompt_length, sampler.settings.max_completion_tokens)
    key = jax.eval_shape(lambda: jax.random.key(0))
    active, output, _ = sampler.programs.prefill.eval_shape(columns, copy, batch, key)
    return shapes((copy, active, output, jax.ShapeDtypeStruct((), jnp.int32)))
