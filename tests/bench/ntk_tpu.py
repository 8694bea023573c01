"""Compile kernels of Pythia-2.8B for a TPU slice without a TPU; report memory and cost.

    python -m tests.bench.ntk_tpu [--topology=v5e:4x4] [--length=64] [--layers=32] [--json=FILE]

The params are FSDP-sharded over all chips; observed and updated are the last positions of two
different sequences (O = U = 1). Compiled are `apply` and M of the body by two algorithms, in full
float32 ("highest": 6 bfloat16 passes; a TPU's default is 1) and in bfloat16. Memory is the
compiler's. FLOPs and collectives are counted in the compiled program of one chip, loops multiplied
out: `share` is a chip's part of the work, 1 / chips if it is spread evenly. `predicted s` is by the
rates in ntkrl/plan/chips.py. Needs jax[tpu].
"""

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
from ntkrl.plan import abstract_models, hardware, hlo
from ntkrl.plan.abstract_models import PUBLISHED_MODELS
from ntkrl.plan.hardware import Machine
from ntkrl.plan.measure import predict
from tests.bench.measure import OUT_OF_MEMORY, table, write_json

BODY = (("layerwise", 64), ("layerwise", 256), ("layerwise", 640), ("jvp_vjp", 4))
LABELS = ("program", "algorithm", "chunk", "dtype")
MEASURED = ("peak GiB per chip", "argument GiB", "temp GiB", "matmul FLOPs", "share")
COLUMNS = (*LABELS, *MEASURED, "received GiB", "predicted s", "compile s")


Call = tuple[Any, tuple[Any, ...]]
"""A jitted function and its abstract arguments."""


def calls(mesh: Mesh, layers: int, length: int, compute_dtype: Any) -> Iterator[tuple[Any, Call]]:
    """Yield programs of Pythia-2.8B, float32 params sharded over the mesh, by name."""
    config = {**PUBLISHED_MODELS["EleutherAI/pythia-2.8b"], "num_hidden_layers": layers}
    policy, shapes = models.describe(
        "GPTNeoXForCausalLM", config, options=models.ModelOptions(compute_dtype)
    )
    params = abstract_models.placed(shapes, policy.sharding, mesh)
    apply, arguments = abstract_models.kernel_apply(policy, params, mesh, length)
    yield ("apply", "", ""), (apply, arguments)
    context = arguments[1]
    for algorithm, chunk in BODY:
        form = functools.partial(ntk.Kernel.body, chunk=chunk)
        program = ntk.kernel_program(policy, params, context, form, algorithm)
        yield ("body", algorithm, chunk), (program, (params, context, context))


def measure(call: Call, precision: str, machine: Machine) -> dict[str, Any]:
    """Compile a call and return its memory and cost."""
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
        "predicted s": sum(predict(cost, machine.chip).values()),
        "compile s": seconds,
    }


def rows(machine: Machine, layers: int, length: int) -> Iterator[dict[str, Any]]:
    """Compile every program in turn, params sharded over all chips."""
    mesh = runtime.make_mesh(1, -1, 1, machine.devices)
    for dtype, precision in (("float32", "highest"), ("bfloat16", "default")):
        for labels, call in calls(mesh, layers, length, jnp.dtype(dtype)):
            row = dict(zip(LABELS, (*labels, dtype), strict=True))
            yield row | measure(call, precision, machine)


def main(arguments: list[str]) -> None:
    """Print the table; write it as JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--json")
    options = parser.parse_args(arguments)
    machine, results = hardware.machine(options.topology), []
    for row in rows(machine, options.layers, options.length):
        results.append(row)
        print(*row.values(), file=sys.stderr, flush=True)
        if options.json:
            write_json(options.json, results)
    print(table(results, COLUMNS))


if __name__ == "__main__":
    main(sys.argv[1:])
