"""Kernels, bytes and time of a decoded token, beside one read of the weights and the live cache.

    python -m tests.bench.decode [--only=gpu,cpu,time] [--before=TREE]

`gpu` compiles the loop for an H200 that need not exist (the extra `gpu-plan`), `cpu` for this
machine: kernels (on a CPU, instructions outside fusions) and GB are read off the compiled loop. The
floor is one read of the copy's weights, the embedding's rows aside, and of the cache's columns in
use. Both are averages over a completion; the loop is compiled for the full cache, and the bytes of
columns that the cache does not have yet are subtracted. `time` measures this machine; with
`--before`, a directory with another version of the package, both alternate in one process and the
ratio is printed.
"""

import argparse
import functools
import importlib
import importlib.util
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl.plan import hlo
from ntkrl.plan.abstract_models import PUBLISHED_MODELS
from tests.bench import measure
from tests.decode_hlo import abstract_chunk, decode_loop

NEOX = "GPTNeoXForCausalLM"
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 256,
    "vocab_size": 512,
}
LARGE = {
    **SMALL,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "vocab_size": 50304,
}
PYTHIA_1B = PUBLISHED_MODELS["EleutherAI/pythia-1b"]
CASES = {
    "gpu": (("Pythia-1B, bfloat16", PYTHIA_1B, jnp.bfloat16, 64, 128, (16, 128)),),
    "cpu": (
        ("D = 256, 4 layers, V = 512", SMALL, None, 16, 64, (32,)),
        ("D = 512, 8 layers, V = 50304", LARGE, None, 16, 64, (32,)),
    ),
}
PACKAGE = "ntkrl"
REPEATS = 5


def package(tree: str | None = None) -> SimpleNamespace:
    """Return models, rollout and types of the package, or of its version in another directory."""
    names = ("models", "rollout", "types")
    if tree is None:
        return SimpleNamespace(**{n: importlib.import_module(f"{PACKAGE}.{n}") for n in names})
    ours = {n: module for n, module in sys.modules.items() if n.split(".")[0] == PACKAGE}
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, tree)
    try:
        return package()
    finally:
        sys.path.remove(tree)
        for name in [n for n in sys.modules if n.split(".")[0] == PACKAGE]:
            del sys.modules[name]
        sys.modules.update(ours)


def counts(target: str) -> Iterator[dict[str, Any]]:
    """Compile the decode loops of a target and count."""
    sharding = None
    if target == "gpu":
        from ntkrl.plan.hardware import machine

        sharding = jax.sharding.SingleDeviceSharding(machine("h200").devices[0])
    version = package()
    for label, config, dtype, prompt, completion, batches in CASES[target]:
        options = version.models.ModelOptions(dtype)
        policy, params = version.models.describe(NEOX, config, options=options)
        for rows in batches:
            settings = version.rollout.SamplerSettings(8, completion, 1.0, (0,), 0, chunk_steps=16)
            sampler = version.rollout.Sampler(policy, settings)
            arguments = abstract_chunk(sampler, params, rows // 8, prompt, sharding)
            start = time.perf_counter()
            text = sampler.programs.decode_chunk.lower(*arguments).compile().as_text()
            seconds, loop = time.perf_counter() - start, decode_loop(text)
            copy, active = arguments[:2]
            weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(copy))
            table = copy["embed"]["embedding"]
            keys = active.cache.keys
            column = 2 * sum(leaf[:, :, 0].size * leaf.dtype.itemsize for leaf in map(_empty, keys))
            used = prompt + (completion - 1) / 2
            ends = range(1 + sampler.chunk_length, completion + 1, sampler.chunk_length)
            lengths = [sampler.cache_columns(prompt, end) for end in (*ends, completion)]
            unused = keys[0].shape[2] - np.mean(lengths)  # of the full cache, on average
            traffic = hlo.count(text).traffic / loop.trips - unused * column
            yield {
                "decode": f"{label}, {rows} rows",
                "kernels": loop.kernels,
                "GB": traffic / 1e9,
                "floor": (weights - table.size * table.dtype.itemsize + used * column) / 1e9,
                "compile s": seconds,
            }


def _empty(shape: jax.ShapeDtypeStruct) -> np.ndarray:
    return np.broadcast_to(np.zeros((), shape.dtype), shape.shape)


def rollouts(version: SimpleNamespace, config: dict[str, Any], length: int) -> Any:
    """Return a function that samples 8 × 4 completions of a length, compiled."""
    policy, params = version.models.build(NEOX, config, jax.random.key(0))
    ids = np.random.default_rng(0).integers(2, config["vocab_size"], (8, 16))
    places = jnp.arange(8)
    batch = version.types.PromptBatch(
        tokens=jnp.asarray(ids), mask=jnp.ones(ids.shape, bool), rows=places, copies=0 * places
    )
    settings = version.rollout.SamplerSettings(4, length, 1.0, end_ids=(), pad_id=0)
    sampler = version.rollout.Sampler(policy, settings)
    sample = functools.partial(sampler, params, batch, jax.random.key(1))
    return lambda: jax.block_until_ready(sample()).tokens


def times(before: str | None) -> Iterator[dict[str, Any]]:
    """Time decoding on this machine, and by another version in turn."""
    versions = [package()] + ([package(before)] if before is not None else [])
    for label, config, _, _, length, _ in CASES["cpu"]:
        calls = [[rollouts(v, config, n) for n in (1, length)] for v in versions]
        tokens = [call() for _, call in calls]
        for short, _ in calls:
            short()
        seconds = np.full((len(calls), 2, REPEATS), np.inf)
        for repeat in range(REPEATS):
            for number, pair in enumerate(calls):
                for part, call in enumerate(pair):
                    start = time.perf_counter()
                    call()
                    seconds[number, part, repeat] = time.perf_counter() - start
        best = seconds.min(axis=2)
        each = (best[:, 1] - best[:, 0]) / (length - 1)
        row = {"decode": label, "ms/token": 1e3 * each[0]}
        if before is not None:
            row |= {"before": 1e3 * each[1], "ratio": each[0] / each[1]}
            row["same tokens"] = bool((tokens[0] == tokens[1]).all())
        yield row


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="gpu,cpu,time")
    parser.add_argument("--before", help="directory of another version of the package")
    options = parser.parse_args()
    for name in options.only.split(","):
        if name == "gpu" and importlib.util.find_spec("jax_cuda12_plugin") is None:
            print("gpu: no compiler for GPUs; pip install 'ntkrl[gpu-plan]'")
            continue
        rows = list(times(options.before) if name == "time" else counts(name))
        print(measure.table(rows, tuple(rows[0])), flush=True)


if __name__ == "__main__":
    main()
