"""Compile kernels of Pythia-2.8B for a described TPU slice, with no TPU: do they fit, at what cost?

    python -m tests.bench.ntk_tpu [--topology=v5e:4x4] [--length=64] [--layers=32] [--json=FILE]

The params are FSDP-sharded over all chips; observed and updated are the last positions of two
different sequences (O = U = 1). Compiled are `apply` and M of the body by two algorithms, float32
multiplied as such ("highest": 6 bfloat16 passes, where a TPU's default is 1) and bfloat16 compute.
Memory is the compiler's. FLOPs and collectives are counted in the compiled program of one chip,
loops multiplied out: `share` tells how much of the work a chip does, 1 / chips where it is spread
evenly. `roofline s` is at the published rates in ntkrl/plan/chips.py. Needs jax[tpu].
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ntkrl import models, ntk, runtime
from ntkrl.jaxpr import flops, trace
from ntkrl.numerics import GIB
from ntkrl.plan import hlo, kernel, networks, topology
from ntkrl.plan.measure import roofline
from ntkrl.plan.shapes import SHAPES
from ntkrl.plan.topology import Machine
from tests.bench.measure import OUT_OF_MEMORY, table, write_json

BODY = (("layerwise", 64), ("layerwise", 256), ("layerwise", 640), ("jvp_vjp", 4))
TOLD = ("program", "algorithm", "chunk", "dtype")
MEASURED = ("peak GiB per chip", "argument GiB", "temp GiB", "matmul FLOPs", "share")
COLUMNS = (*TOLD, *MEASURED, "received GiB", "roofline s", "compile s")


def setting(mesh: Mesh, layers: int, length: int, compute_dtype: Any) -> kernel.Setting:
    """Describe Pythia-2.8B, float32 params sharded over the mesh and all else on every chip."""
    config = {**SHAPES["EleutherAI/pythia-2.8b"], "num_hidden_layers": layers}
    policy, shapes = models.describe(
        "GPTNeoXForCausalLM", config, options=models.ModelOptions(compute_dtype)
    )
    placed = networks.placed(shapes, policy.sharding, mesh)
    return kernel.setting(policy, placed, mesh, length)


def gram_call(s: kernel.Setting, algorithm: str, chunk: int) -> tuple[Any, tuple[Any, ...]]:
    """Return `kernel.body()` as a jitted function and its arguments."""

    form = functools.partial(ntk.Kernel.body, chunk=chunk)
    program = ntk.kernel_program(s.policy, s.params, s.context, form, algorithm)
    return program, (s.params, s.context, s.context)


def measure(call: tuple[Any, tuple[Any, ...]], precision: str, machine: Machine) -> dict[str, Any]:
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
    memory, cost = compiled.memory_analysis(), hlo.count(compiled.as_text())
    return {
        "peak GiB per chip": memory.peak_memory_in_bytes / GIB,
        "argument GiB": memory.argument_size_in_bytes / GIB,
        "temp GiB": memory.temp_size_in_bytes / GIB,
        "matmul FLOPs": cost.flops * len(machine.devices),
        "share": cost.flops / flops(trace(function, *arguments)),
        "received GiB": cost.received / GIB,
        "roofline s": max(roofline(cost, machine.chip).values()),
        "compile s": seconds,
    }


def rows(machine: Machine, layers: int, length: int) -> Iterator[dict[str, Any]]:
    """Compile every program in turn, params spread over all chips."""
    mesh = runtime.make_mesh(1, -1, 1, machine.devices)
    for dtype, precision in (("float32", "highest"), ("bfloat16", "default")):
        s = setting(mesh, layers, length, jnp.dtype(dtype))
        calls = [(("apply", "", ""), kernel.apply_call(s))]
        calls += [(("body", *algorithm), gram_call(s, *algorithm)) for algorithm in BODY]
        for told, call in calls:
            row = dict(zip(TOLD, (*told, dtype), strict=True))
            yield row | measure(call, precision, machine)


def main(arguments: list[str]) -> None:
    """Print the table; write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--json")
    options = parser.parse_args(arguments)
    machine, found = topology.machine(options.topology), []
    for row in rows(machine, options.layers, options.length):
        found.append(row)
        print(*row.values(), file=sys.stderr, flush=True)
        if options.json:
            write_json(options.json, found)
    print(table(found, COLUMNS))


if __name__ == "__main__":
    main(sys.argv[1:])
