"""Compile kernels of Pythia-2.8B for a described TPU slice, with no TPU: do they fit, at what cost?

    python -m tests.bench.ntk_tpu [--topology=v5e:4x4] [--length=64] [--layers=32] [--json=FILE]

The params are FSDP-sharded over all chips; observed and updated are the last positions of two
different sequences (O = U = 1). Compiled are `apply` and M of the body by two roads, float32
multiplied as such ("highest": 6 bfloat16 passes, where a TPU's default is 1) and bfloat16 compute.
Memory is the compiler's. FLOPs and collectives are counted in the compiled program of one chip,
loops multiplied out: `share` tells how much of the work a chip does, 1 / chips where it is spread
evenly. `roofline s` is bfloat16 passes at an assumed 197 TFLOP/s per v5e chip. Needs jax[tpu].
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported: nothing runs on a TPU

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ntkrl import models, trees
from ntkrl.ntk import forms, heads, parts, roads
from ntkrl.ntk.body import Body, make_body
from ntkrl.ntk.contexts import Contexts
from ntkrl.ntk.directions import Directions
from ntkrl.ntk.network import Network, as_network
from ntkrl.ntk.program import flops, trace
from ntkrl.types import Array, Params
from tests.bench.measure import OUT_OF_MEMORY, table, write_json

GIB = 2.0**30
PEAK_FLOPS = 197e12
PYTHIA = {
    "vocab_size": 50304,
    "hidden_size": 2560,
    "num_attention_heads": 32,
    "intermediate_size": 10240,
    "max_position_embeddings": 2048,
    "rotary_pct": 0.25,
}
BODY = (("layers", 64), ("layers", 256), ("layers", 640), ("products", 4))
TOLD = ("program", "road", "chunk", "dtype")
MEASURED = ("peak GiB per chip", "argument GiB", "temp GiB", "matmul FLOPs", "share")
COLUMNS = (*TOLD, *MEASURED, "collective GiB", "roofline s", "compile s")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f32": 4, "s32": 4, "u32": 4}
WINDOW = {"size": 1, "stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}
PASSES = {"highest": 6, "high": 3}
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
LINE = re.compile(r"\s+(?:ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*)$")
CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%([\w.-]+)")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Setting(NamedTuple):
    """A sharded model and one context, described by shapes alone."""

    network: Network
    params: Params
    body: Body
    context: Contexts


def setting(mesh: Mesh, layers: int, length: int, compute_dtype: Any) -> Setting:
    """Describe Pythia-2.8B, float32 params sharded over the mesh and all else on every chip."""
    config = {**PYTHIA, "num_hidden_layers": layers}
    policy, shapes = models.describe("GPTNeoXForCausalLM", config, compute_dtype=compute_dtype)
    placed = trees.shardings(shapes, policy.sharding, mesh)

    whole = NamedSharding(mesh, PartitionSpec())
    row, place = (
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=whole) for shape in ((1, length), (1,))
    )
    context = Contexts(row, place, place, row.update(dtype=jnp.bool_))
    network = as_network(policy)
    body = make_body(network, shapes, context.tokens, context.mask)
    body = dataclasses.replace(body, shardings=tuple(body.leaves(placed)))
    params = jax.tree.map(lambda leaf, where: leaf.update(sharding=where), shapes, placed)
    return Setting(network, params, body, context)


def gram_call(s: Setting, road: str, chunk: int) -> tuple[Any, tuple[Any, ...]]:
    """Return `kernel.body()` as a jitted function and its arguments."""

    def gram(params: Params, *contexts: Contexts) -> Array:
        width = PYTHIA["hidden_size"]
        sides = [Directions(c.tokens, c.mask, c.positions[:, None], None, width) for c in contexts]
        return roads.gram(s.body, params, *sides, None, road, chunk, True)

    return jax.jit(gram), (s.params, s.context, s.context)


def apply_call(s: Setting) -> tuple[Any, tuple[Any, ...]]:
    """Return `kernel.apply()` of the full kernel as a jitted function and its arguments."""

    def apply(params: Params, cotangents_UV: Array, *contexts: Contexts) -> Array:
        left, right = (heads.reading(s.network, params, c) for c in contexts)
        head, roles = heads.HeadWeights(None, None), parts.Roles(output=True, body=True)
        operands = forms.Operands(params, *contexts, left, right, None, head)
        changes_OV = heads.head_apply(left, right, head, roles, False, cotangents_UV)
        return changes_OV + forms.body_apply(s.body, operands, cotangents_UV, roles, True)

    shape, whole = (1, PYTHIA["vocab_size"]), s.context.positions.sharding
    cotangents_UV = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole)
    return jax.jit(apply), (s.params, cotangents_UV, s.context, s.context)


def measure(call: tuple[Any, tuple[Any, ...]], precision: str, chips: int) -> dict[str, Any]:
    """Compile a call and read memory and cost off the result."""
    function, arguments = call
    start = time.perf_counter()
    try:
        with jax.default_matmul_precision(precision):
            compiled = function.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if not OUT_OF_MEMORY.search(str(error)):
            raise
        return {"peak GiB per chip": "above a chip's memory"}
    seconds = time.perf_counter() - start
    memory, cost = compiled.memory_analysis(), hlo_cost(compiled.as_text())
    return {
        "peak GiB per chip": memory.peak_memory_in_bytes / GIB,
        "argument GiB": memory.argument_size_in_bytes / GIB,
        "temp GiB": memory.temp_size_in_bytes / GIB,
        "matmul FLOPs": cost["flops"] * chips,
        "share": cost["flops"] / flops(trace(function, *arguments)),
        "collective GiB": cost["moved"] / GIB,
        "roofline s": cost["passes"] / PEAK_FLOPS,
        "compile s": seconds,
    }


def hlo_cost(text: str) -> Counter[str]:
    """Add up what one chip does: matrix FLOPs, the same times passes, bytes moved."""
    computations, results, entry = {}, {}, ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%(\S+) \(.*\{$", line):
            made = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif found := LINE.match(line):
            arrays = ARRAY.findall(found[2])
            results[found[1]] = [
                (d, [int(n) for n in sizes.split(",") if n]) for d, sizes in arrays
            ]
            made.append(found.groups())
    total, channels = Counter(), set()

    def visit(computation: str, times: int) -> None:
        for name, _, op, rest in computations[computation]:
            if op in ("convolution", "dot"):
                operands = [results[operand][0] for operand in re.findall(r"%([\w.-]+)", rest)[:2]]
                count = times * _product_flops(operands, results[name][0], rest)
                precise = re.search(r"operand_precision=\{(\w+)", rest)
                wide = precise is not None and any(dtype == "f32" for dtype, _ in operands)
                total["flops"] += count
                total["passes"] += count * (PASSES.get(precise[1], 1) if wide else 1)
            elif op in COLLECTIVES:
                # one that is spread over several fusions is written in each, with one channel
                channel = (re.search(r"channel_id=\d+", rest) or [name])[0]
                size = sum(BYTES[dtype] * math.prod(shape) for dtype, shape in results[name])
                total["moved"] += times * size * (channel not in channels)
                channels.add(channel)
            inner = times
            if op == "while":
                condition = computations[re.search(r"condition=%([\w.-]+)", rest)[1]]
                inner *= next(int(r.split(")")[0]) for _, _, o, r in condition if o == "constant")
            for called in CALLED.findall(rest):
                visit(called, inner)

    visit(entry, 1)
    return total


def _product_flops(operands: list[Any], result: Any, rest: str) -> float:
    """Count a dot, or a convolution as TPUs write one: batch axes are windows, mostly dilated."""
    (_, left), (_, right), (_, out) = *operands, result
    if contracted := re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest):
        return 2.0 * math.prod([*out, *(left[int(n)] for n in contracted[1].split(",") if n)])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
    found = re.search(r"window=\{([^}]*)\}", rest)
    window = dict(entry.split("=") for entry in found[1].split()) if found else {}
    size = dict(zip(labels[3], out, strict=True))
    total = 2.0 * size["b"] * size["f"] * right[labels[2].index("i")]
    for axis in range(len(out) - 2):
        taps, stride, before, dilated, spread = (
            int(window[name].split("x")[axis].split("_")[0]) if name in window else default
            for name, default in WINDOW.items()
        )
        places = np.arange(size[str(axis)])[:, None] * stride + np.arange(taps) * spread - before
        last = (left[labels[1].index(str(axis))] - 1) * dilated
        total *= np.count_nonzero((places >= 0) & (places <= last) & (places % dilated == 0))
    return total


def described_mesh(topology: str) -> Mesh:
    """Return a mesh of described chips, all of them along "fsdp"."""
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except (RuntimeError, ValueError) as error:
        if importlib.util.find_spec("libtpu") is None:
            sys.exit("no TPU compiler here (libtpu is missing): pip install 'jax[tpu]'")
        sys.exit(f"topology {topology!r} cannot be described: {str(error).splitlines()[0]}")
    return Mesh(np.asarray(found.devices).reshape(1, -1, 1), ("data", "fsdp", "tensor"))


def rows(mesh: Mesh, layers: int, length: int) -> Iterator[dict[str, Any]]:
    """Compile every program in turn."""
    for dtype, precision in (("float32", "highest"), ("bfloat16", "default")):
        s = setting(mesh, layers, length, jnp.dtype(dtype))
        calls = [(("apply", "", ""), apply_call(s))]
        calls += [(("body", *road), gram_call(s, *road)) for road in BODY]
        for told, call in calls:
            row = dict(zip(TOLD, (*told, dtype), strict=True))
            yield row | measure(call, precision, mesh.size)


def main(arguments: list[str]) -> None:
    """Print the table; write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--json")
    options = parser.parse_args(arguments)
    mesh, found = described_mesh(options.topology), []
    for row in rows(mesh, options.layers, options.length):
        found.append(row)
        print(*row.values(), file=sys.stderr, flush=True)
        if options.json:
            write_json(options.json, found)
    print(table(found, COLUMNS))


if __name__ == "__main__":
    main(sys.argv[1:])
