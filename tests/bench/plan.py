"""Times that `ntkrl plan` predicts, beside measured ones.

    python -m tests.bench.plan [--only=small,medium,h200] [--repeats=5]

`small` and `medium` compile every program of an RL step (the shapes of tests.bench.rl) for one CPU
device and run it there on random arrays. The rates that predictions use are measured in the same
process: float32 products, elementwise operations, bytes/s of main memory and of the cache, and the
overhead of a kernel. Both use one core and its CPU time, so that other work on the machine disturbs
them little. `h200` compiles the programs that tests.bench.device measured on a GPU (extra
`gpu-plan`) and compares with its figures in tests/bench/README.md. `ratio` is predicted ÷ measured.
"""

import argparse
import functools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import runtime
from ntkrl.plan import hardware
from ntkrl.plan.candidate import abstract_run, candidate_programs
from ntkrl.plan.chips import Chip
from ntkrl.plan.hardware import Machine
from ntkrl.plan.measure import ProgramCost
from ntkrl.plan.measure import measure as compile_program
from ntkrl.settings import read_settings
from ntkrl.training import GENERATION, SCORING, UPDATE, Program
from tests.bench import measure

MIB = 1 << 20
barrier = jax.lax.optimization_barrier
SIZES = {
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 512},
    "medium": {"hidden_size": 512, "num_hidden_layers": 8, "vocab_size": 50304},
}
STEP = {
    "data.prompts_per_step": 8,
    "data.max_prompt_tokens": 16,
    "rollout.completions_per_prompt": 4,
    "rollout.max_completion_tokens": 64,
    "schedule.microbatches": 4,
}
PYTHIA = {
    "model.path": "EleutherAI/pythia-1b",
    "model.compute_dtype": "bfloat16",
    "data.max_prompt_tokens": 64,
    "rollout.completions_per_prompt": 8,
    "rollout.max_completion_tokens": 128,
    "schedule.microbatches": 4,
}
H200_MILLISECONDS = {
    "decoding a token of 16 rows, weights cast once": 2.30,
    "decoding a token of 128 rows, weights cast once": 3.55,
    "scoring 32 rows": 24.9,
    "an update on 32 rows, 4 microbatches": 148.0,
}
"""Measured by tests.bench.device with the decode loop of that time; see tests/bench/README.md."""
COLUMNS = ("program", "runs", "predicted ms", "measured ms", "ratio", "of a step", "bound")


class Timed(NamedTuple):
    """A compiled program: its cost, a call on random arrays, and its shortest time."""

    cost: ProgramCost
    call: Callable[[], float]
    seconds: list[float]


def settings_of(changes: Mapping[str, object]) -> Any:
    """Return the settings of configs/rl.py with some changes."""
    words = [f"--config.{name}={value}" for name, value in changes.items()]
    fixed = ["--config=configs/rl.py", "--config.reward.function=exact_match"]
    return read_settings(runtime.read_config([*fixed, *words]))


def compiled(
    changes: Mapping[str, object], machine: Machine, parts: Sequence[str]
) -> Iterator[tuple[Program, ProgramCost]]:
    """Compile the programs of some parts of a run, with their costs."""
    run = abstract_run(settings_of(changes), machine)
    for program in candidate_programs(run, probe=False):
        if program.part in parts:
            yield program, compile_program(run, program, machine.chip)


def rate(step: Callable[[Any], Any], start: Any, count: int, repeats: int = 5) -> float:
    """Return the shortest seconds per iteration of a loop of `count` dependent steps."""
    loop = jax.jit(lambda x: jax.lax.fori_loop(0, count, lambda _, y: step(y), x))
    jax.block_until_ready(loop(start))
    return min(cpu_seconds(lambda: loop(start)) for _ in range(repeats)) / count


def cpu_seconds(call: Callable[[], Any]) -> float:
    """Return the CPU time of a call, in all threads."""
    begin = time.process_time()
    jax.block_until_ready(call())
    return time.process_time() - begin


def measured_chip() -> Chip:
    """Measure this machine's CPU."""
    square = jnp.ones((1024, 1024)) / 1024
    product = rate(lambda x: x @ square, square, 10)
    large, small = jnp.zeros(16 * MIB), jnp.zeros(MIB // 2)
    moved = 2 * large.nbytes / rate(lambda x: x + 1, large, 4)
    cached = 2 * small.nbytes / rate(lambda x: x + 1, small, 200)
    # 128 multiplications and additions an element, of arrays in the first cache
    chain, elements = 64, jnp.zeros(4096)
    powers = lambda x: functools.reduce(lambda y, _: y * x + 0.5, range(chain), x)  # noqa: E731
    arithmetic = rate(powers, elements, 500)
    # kernels that XLA cannot fuse
    count, few = 200, jnp.zeros(256)
    chained = jax.jit(lambda x: functools.reduce(lambda y, _: barrier(y + 1), range(count), x))
    launch = min(cpu_seconds(lambda: chained(few)) for _ in range(20)) / count
    return Chip(
        flops=2 * 1024**3 / product,
        memory_rate=moved,
        kernel_seconds=launch,
        operation_rate=2 * chain * elements.size / arithmetic,
        passes={"default": 1.0, "high": 1.0, "highest": 1.0},
        cache_bytes=8 * MIB,
        cache_rate=cached,
    )


def random_array(path: Any, leaf: jax.ShapeDtypeStruct, rng: np.random.Generator) -> jax.Array:
    """Return an array of a shape: small normal numbers, small integers, or true; no row is done."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), leaf.shape)
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        values = jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * 0.02, leaf.dtype)
    elif leaf.dtype == jnp.bool_:
        ended = jax.tree_util.keystr(path).endswith((".done", ".finished"))
        values = jnp.full(leaf.shape, not ended)
    else:
        values = jnp.asarray(rng.integers(0, 8, leaf.shape), leaf.dtype)
    return jax.device_put(values, leaf.sharding)


def caller(program: Program) -> Callable[[], float]:
    """Return a function that runs a program on new arrays and returns its seconds."""
    executable, rng = program.compiled, np.random.default_rng(0)
    assert executable is not None
    # arguments without shapes are static, and part of the program
    dynamic = [
        argument
        for argument in program.arguments
        if argument is None
        or any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(argument))
    ]

    def call() -> float:
        arrays = jax.tree_util.tree_map_with_path(
            lambda path, leaf: random_array(path, leaf, rng), dynamic
        )
        jax.block_until_ready(arrays)
        return cpu_seconds(lambda: executable(*arrays))

    return call


def cpu_rows(size: str, chip: Chip, repeats: int) -> list[dict[str, Any]]:
    """Compile and time the programs of a step."""
    config = {
        **SIZES[size],
        "architectures": ["GPTNeoXForCausalLM"],
        "intermediate_size": 4 * SIZES[size]["hidden_size"],
        "num_attention_heads": 8,
        "max_position_embeddings": 128,
        "rotary_pct": 0.25,
    }
    device = hardware.machine("cpu:1").devices
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        changes = {"model.path": directory, **STEP}
        pairs = list(compiled(changes, Machine("cpu", chip, device), (GENERATION, SCORING, UPDATE)))
    timed = [Timed(cost, caller(program), []) for program, cost in pairs]
    for number in range(repeats + 1):
        for row in timed:
            seconds = row.call()
            if number:  # the first call warms up
                row.seconds.append(seconds)
    total = sum(row.cost.runs * min(row.seconds) for row in timed)
    return [_row(row.cost, min(row.seconds), total) for row in timed]


def _row(cost: ProgramCost, seconds: float, total: float) -> dict[str, Any]:
    return {
        "program": cost.name,
        "runs": cost.runs,
        "predicted ms": 1e3 * cost.seconds,
        "measured ms": 1e3 * seconds,
        "ratio": cost.seconds / seconds,
        "of a step": cost.runs * seconds / total,
        "bound": max(cost.causes, key=lambda cause: cost.causes[cause]),
    }


def gpu_rows() -> Iterator[dict[str, Any]]:
    """Predict what was measured on an H200."""
    machine = hardware.machine("h200")

    def costs(prompts: int, parts: Sequence[str]) -> dict[str, ProgramCost]:
        changes = {**PYTHIA, "data.prompts_per_step": prompts}
        return {cost.name: cost for _, cost in compiled(changes, machine, parts)}

    def row(name: str, seconds: float, cost: ProgramCost) -> dict[str, Any]:
        return {
            **_row(cost, H200_MILLISECONDS[name] / 1e3, math.nan),
            "program": name,
            "runs": "",
            "predicted ms": 1e3 * seconds,
            "ratio": 1e3 * seconds / H200_MILLISECONDS[name],
        }

    for prompts in (2, 16):
        parts = costs(prompts, (GENERATION,))
        tokens = PYTHIA["rollout.max_completion_tokens"] - 1
        each = [cost for name, cost in parts.items() if name in ("decoding", "cache growth")]
        seconds = sum(cost.runs * cost.seconds for cost in each) / tokens
        name = f"decoding a token of {8 * prompts} rows, weights cast once"
        yield row(name, seconds, parts["decoding"])
    parts = costs(4, (SCORING, UPDATE))
    yield row("scoring 32 rows", parts["reference"].seconds, parts["reference"])
    update = parts["update all"]
    yield row("an update on 32 rows, 4 microbatches", update.seconds, update)


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return geometric mean and range of the ratios of programs above 5 % of a step."""
    ratios = [row["ratio"] for row in rows if not row["of a step"] <= 0.05]
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    within = sum(0.8 <= ratio <= 1.25 for ratio in ratios)
    return (
        f"programs above 5 %: geometric mean {mean:.2f}, {min(ratios):.2f} to {max(ratios):.2f}, "
        f"{within} of {len(ratios)} within 0.8 to 1.25"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="small,medium,h200")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    names = options.only.split(",")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    hardware.machine("cpu:1")  # before JAX starts its backends
    if set(names) & set(SIZES):
        chip = measured_chip()
        print(
            f"CPU: {chip.flops / 1e9:.0f} GFLOP/s in products, {chip.operation_rate / 1e9:.0f} "
            f"Gop/s elementwise, {chip.memory_rate / 1e9:.1f} GB/s ({chip.cache_rate / 1e9:.1f} "
            f"cached), {1e6 * chip.kernel_seconds:.1f} µs a kernel",
            flush=True,
        )
    for name in names:
        rows = list(gpu_rows()) if name == "h200" else cpu_rows(name, chip, options.repeats)
        print(f"\n{name}\n{measure.table(rows, COLUMNS)}\n{summary(rows)}", flush=True)


if __name__ == "__main__":
    main()
