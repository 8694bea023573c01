"""All figures of one accelerator, in one run of at most 12 minutes.

    python -m tests.bench.device [--model=EleutherAI/pythia-1b] [--only=tests,decode,update]
    python -m tests.bench.device --compile-only [--lengths=1024,8192]

Parts, each of which may fail without the others: `tests` (the suite `-m gpu`), `start` (seconds to
the first step of a new process, without and with a compilation cache), `decode` at 1, 16 and 128
rows, `score` and `update` at each of `--lengths`, `kernel`. A part that would begin after
`--minutes` is left out. `--compile-only` counts scoring and updates as compiled for an H200 that
need not exist (the extra `gpu-plan`), with the seconds that a plan predicts, or for the processor
without that extra.

The model has random weights, float32 masters and bfloat16 compute. The chip's limits are measured
in the same run: bytes/s of adding one to a large array (read and written), FLOP/s of a bfloat16
product. `floor` is the time of a row at its binding limit: decoding reads the weights and half of
the full cache for every token, the update does 6 N T FLOPs and attention, a kernel the FLOPs of its
estimate. `of floor` is floor / seconds, at best 1.
"""

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # shared with child processes

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import models, ntk, rollout, scoring, update
from ntkrl.plan import hlo
from ntkrl.plan.abstract_models import PUBLISHED_MODELS
from ntkrl.plan.chips import Chip
from ntkrl.plan.hardware import Machine, machine
from ntkrl.plan.measure import predict
from ntkrl.types import Params, Policy, PromptBatch, UpdateBatch
from tests.bench import measure

TINY = {
    **PUBLISHED_MODELS["EleutherAI/pythia-1b"],
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "vocab_size": 512,
}
NEOX = "GPTNeoXForCausalLM"
PROMPT, COMPLETION, GROUP = 64, 128, 8
TOKENS = 32768  # of a batch that is scored or learned from
CHUNK_TOKENS = 8192
REPEATS = 3
PARTS = ("tests", "start", "decode", "score", "update", "kernel")
PASSES = {"score": 1, "update": 3}
"""Forward passes that a reading takes, in FLOPs."""
COLUMNS = (
    *("what", "seconds", "predicted", "floor", "limit", "of floor", "tokens/s"),
    *("launches", "GB", "GiB"),
)


class Bench(NamedTuple):
    """A model on a device and the limits of its chip.

    body, head: parameters of the layers and of W.
    bytes_rate, flops_rate: bytes/s, bfloat16 FLOP/s; NaN if nothing is run.
    """

    policy: Policy
    params: Params
    body: int
    head: int
    bytes_rate: float = float("nan")
    flops_rate: float = float("nan")


def config_of(model: str) -> dict[str, Any]:
    """Return the config of a published model, or of `tiny`, for sequences of any length."""
    config = TINY if model == "tiny" else PUBLISHED_MODELS[model]
    return {**config, "max_position_embeddings": 1 << 16}


def timed(call: Callable[[], Any], repeats: int = REPEATS, calls: int = 1) -> float:
    """Return the median wall time of a call, compiled before, with `calls` dispatched together."""

    def together() -> None:
        jax.block_until_ready([call() for _ in range(calls)])

    together()
    return measure.median_seconds(together, repeats) / calls


def limits(side: int) -> tuple[float, float]:
    """Return bytes/s of memory and FLOP/s of bfloat16 products of `side`."""
    long = jnp.zeros(side * side * 16, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    moved = 2 * long.nbytes / timed(lambda: add(long), 5, 4)
    square = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    return moved, 2 * side**3 / timed(lambda: product(square), 5, 10)


def make(config: dict[str, Any], abstract: bool = False) -> Bench:
    """Draw the model's weights, or describe them by shapes."""
    options = models.ModelOptions(jnp.bfloat16)
    if abstract:
        policy, params = models.describe(NEOX, config, options=options)
    else:
        policy, params = models.build(NEOX, config, jax.random.key(0), options=options)
    head = config["vocab_size"] * config["hidden_size"]
    return Bench(
        policy, params, sum(leaf.size for leaf in jax.tree.leaves(params)) - 2 * head, head
    )


def run_tests() -> Iterator[dict[str, Any]]:
    """Run the tests of a GPU in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"]
    environment = {**os.environ}
    if environment.get("JAX_PLATFORMS") != "cpu":
        environment["JAX_PLATFORMS"] = "cuda,cpu"
    start = time.perf_counter()
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(result.stdout[-3000:])
    if result.returncode:
        raise RuntimeError(f"pytest ended with status {result.returncode}: {result.stderr[-500:]}")
    yield {"what": result.stdout.splitlines()[-1], "seconds": time.perf_counter() - start}


def starting(model: str) -> Iterator[dict[str, Any]]:
    """Time the first step of a new process, without and with compiled programs in a cache."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
        try:
            for state in ("cold", "warm"):
                result = measure.run_isolated(
                    "tests.bench.device:first_step", {"model": model}, 300
                )
                if "failed" in result:
                    raise RuntimeError(f"first step, {state}: {result['failed']}")
                yield {"what": f"first step, {state}", "seconds": result["seconds"]}
        finally:
            del os.environ["JAX_COMPILATION_CACHE_DIR"]


def first_step(model: str) -> dict[str, Any]:
    """Return the seconds that weights, a rollout, scoring and an update take in a new process."""
    start = time.perf_counter()
    bench = make(config_of(model))
    rows, total = 4 * GROUP, PROMPT + COMPLETION
    jax.block_until_ready(sampled(bench, 4, COMPLETION)().tokens)
    batch = update_batch(bench, rows, total)
    log_probs = scored(bench, COMPLETION)(bench.params, batch.tokens, batch.mask)
    jax.block_until_ready(log_probs)
    step, state = updated(bench, COMPLETION)
    jax.block_until_ready(step(state(bench.params), batch).metrics)
    return {"seconds": time.perf_counter() - start}


def sampled(bench: Bench, prompts: int, length: int, group: int = GROUP) -> Callable[[], Any]:
    """Return a function that samples completions, all of the full length."""
    ids = np.random.default_rng(0).integers(2, bench.policy.vocab_size, (prompts, PROMPT))
    batch = PromptBatch(
        tokens=jnp.asarray(ids),
        mask=jnp.ones(ids.shape, bool),
        rows=jnp.arange(prompts),
        copies=jnp.zeros(prompts, int),
    )
    settings = rollout.SamplerSettings(group, length, 1.0, end_ids=(), pad_id=0)
    sample = rollout.Sampler(bench.policy, settings)
    return functools.partial(sample, bench.params, batch, jax.random.key(1))


def decoding(bench: Bench) -> Iterator[dict[str, Any]]:
    """Time a rollout less its prefill, per token step."""
    config = bench.policy.config
    for prompts, group in ((2, GROUP), (16, GROUP), (1, 1)):
        rows = prompts * group
        seconds = [timed(sampled(bench, prompts, n, group)) for n in (1, COMPLETION)]
        cache = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        read = rows * (PROMPT + COMPLETION / 2) * cache + 2 * (bench.body + bench.head)
        each = (seconds[1] - seconds[0]) / (COMPLETION - 1)
        yield {
            "what": f"decode, {rows} rows",
            "seconds": each,
            "floor": read / bench.bytes_rate,
            "limit": "memory",
            "tokens/s": rows / each,
        }


def forward_flops(bench: Bench, rows: int, total: int) -> float:
    """Return the FLOPs of reading rows of `total` tokens and their completions' logits."""
    config = bench.policy.config
    attention = 4 * bench.policy.feature_size * config.num_hidden_layers * total**2 / 2 * rows
    return 2 * rows * (bench.body * total + bench.head * (total - PROMPT)) + attention


def update_batch(bench: Bench, rows: int, total: int) -> UpdateBatch:
    """Return a batch of full-length completions."""
    ids = np.random.default_rng(0).integers(2, bench.policy.vocab_size, (rows, total))
    shape = (rows, total - PROMPT)
    advantages = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    log_probs = np.full(shape, -np.log(bench.policy.vocab_size), np.float32)
    return UpdateBatch(
        tokens=jnp.asarray(ids),
        mask=jnp.ones((rows, total), bool),
        completion_mask=jnp.ones(shape, bool),
        old_log_probs=jnp.asarray(log_probs),
        ref_log_probs=jnp.asarray(log_probs),
        advantages=jnp.asarray(advantages),
    )


def scored(bench: Bench, length: int) -> jax.stages.Wrapped:
    """Return the jitted reading of `(params, tokens, mask)`."""
    score = functools.partial(scoring.score, bench.policy)
    return jax.jit(lambda params, tokens, mask: score(params, tokens, mask, length).log_probs)


def updated(bench: Bench, length: int) -> tuple[jax.stages.Wrapped, Callable[[Params], Any]]:
    """Return a jitted optimizer step, and the state that it starts from."""
    stage = update.Stage("all", 1, ((".*", 1e-6),), optimizer="adamw", max_grad_norm=1.0)
    bound_stage = update.bind_stage(stage, bench.policy, bench.params)
    loss = functools.partial(update.policy_loss, update.PRESETS["grpo"], length)
    loss_fn = update.policy_loss_fn(bench.policy, loss, chunk_tokens=CHUNK_TOKENS)
    step = jax.jit(update.make_step(bound_stage, loss_fn), donate_argnums=0)

    def state(params: Params) -> Any:
        return update.init_state(bound_stage, params, jax.random.key(0))

    return step, state


def reading(bench: Bench, part: str, total: int, tokens: int) -> Iterator[dict[str, Any]]:
    """Time scoring, or an optimizer step, on completions of all but PROMPT of `total` tokens."""
    rows, length = max(tokens // total, 1), total - PROMPT
    batch = update_batch(bench, rows, total)
    if part == "score":
        score = scored(bench, length)
        each = timed(lambda: score(bench.params, batch.tokens, batch.mask))
    else:
        step, start = updated(bench, length)
        state = [start(jax.tree.map(jnp.copy, bench.params))]

        def once() -> Any:
            state[0], metrics, _ = step(state[0], batch)
            return metrics["loss"]

        each = timed(once)
    yield {
        "what": f"{part}, {rows} × {total} tokens",
        "seconds": each,
        "floor": PASSES[part] * forward_flops(bench, rows, total) / bench.flops_rate,
        "limit": "compute",
        "tokens/s": rows * total / each,
    }


def compiled_reading(bench: Bench, part: str, total: int, tokens: int) -> Iterator[dict[str, Any]]:
    """Count the launches, traffic and temporary memory of scoring or a step, by the compiler."""
    rows, length = max(tokens // total, 1), total - PROMPT
    batch = jax.eval_shape(functools.partial(update_batch, bench, rows, total))
    function: Any
    if part == "score":
        function, arguments = scored(bench, length), (bench.params, batch.tokens, batch.mask)
    else:
        function, start = updated(bench, length)
        arguments = (jax.eval_shape(start, bench.params), batch)
    gpu = gpu_machine()
    if gpu is not None:
        place = jax.sharding.SingleDeviceSharding(gpu.devices[0])
        arguments = jax.tree.map(lambda leaf: leaf.update(sharding=place), arguments)
    begin = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    seconds, chip = time.perf_counter() - begin, Chip() if gpu is None else gpu.chip
    cost = hlo.count(compiled.as_text(), passes=chip.passes)
    row = {
        "what": f"{part}, {rows} × {total} tokens, compiled in {seconds:.0f} s",
        "launches": cost.launches,
        "GB": cost.traffic / 1e9,
        "GiB": compiled.memory_analysis().temp_size_in_bytes / 2**30,
    }
    if chip.flops is not None:
        flops = PASSES[part] * forward_flops(bench, rows, total)
        row["predicted"] = sum(predict(cost, chip).values())
        row["floor"] = flops / (chip.flops * chip.flops_reached)
        row["of floor"] = row["floor"] / row["predicted"]
    yield row


@functools.cache
def gpu_machine() -> Machine | None:
    """Return the H200 of the GPU compiler, or None where that is not installed."""
    try:
        return machine("h200")
    except ValueError as error:
        print(f"compiled for the processor: {error}")
        return None


def kernels(bench: Bench, contexts: int, length: int) -> Iterator[dict[str, Any]]:
    """Time the exact kernel of last positions at full vocabulary, factored: R, W and M."""
    ids = np.random.default_rng(0).integers(2, bench.policy.vocab_size, (contexts, length))
    where = ntk.last_positions(jnp.asarray(ids))
    estimate = ntk.kernel(bench.policy, bench.params, where).estimate()

    def call() -> Any:
        return ntk.factored(ntk.kernel(bench.policy, bench.params, where))

    each = timed(call, 1)
    name = f"{estimate.algorithm}, chunk {estimate.chunk}"
    yield {
        "what": f"kernel, {contexts} contexts of {length}: {name}",
        "seconds": each,
        "floor": estimate.flops / bench.flops_rate,
        "limit": "compute",
    }


def read_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="EleutherAI/pythia-1b", help="or tiny")
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--lengths", default="192,1024,2048", help="tokens of rows")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a batch")
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--compile-only", action="store_true")
    options = parser.parse_args()
    unknown = set(options.only.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--only knows {', '.join(PARTS)}, not {', '.join(unknown)}")
    return options


def parts(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the parts in order; those in processes of their own come before this one's model."""
    lengths, chosen = [int(n) for n in options.lengths.split(",")], options.only.split(",")
    read = [(part, n) for part in ("score", "update") for n in lengths if part in chosen]
    if options.compile_only:
        described = make(config_of(options.model), abstract=True)
        for part, total in read:
            arguments = (described, part, total, options.tokens)
            yield f"{part} {total}", functools.partial(compiled_reading, *arguments)
        return
    if "tests" in chosen:
        yield "tests", run_tests
    if "start" in chosen:
        yield "start", functools.partial(starting, options.model)
    if not set(chosen) - {"tests", "start"}:
        return
    rates = limits(512 if options.model == "tiny" else 8192)
    bench = make(config_of(options.model))._replace(bytes_rate=rates[0], flops_rate=rates[1])
    layers, head = f"{bench.body / 1e6:.0f} M", f"{bench.head / 1e6:.0f} M"
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}; layers {layers}, head {head}")
    print(f"{rates[0] / 1e12:.3g} TB/s, {rates[1] / 1e12:.4g} TFLOP/s", flush=True)
    if "decode" in chosen:
        yield "decode", functools.partial(decoding, bench)
    for part, total in read:
        yield f"{part} {total}", functools.partial(reading, bench, part, total, options.tokens)
    if "kernel" in chosen:
        yield "kernel", functools.partial(kernels, bench, 2, 32)


def main() -> int:
    """Print each row when it is measured, then the table, and what failed."""
    options, rows, failed, begin = read_options(), [], [], time.perf_counter()
    for name, part in parts(options):
        start = time.perf_counter()
        if start - begin > 60 * options.minutes:
            failed.append(f"{name} (no time left)")
            continue
        try:
            for row in part():
                if "floor" in row and "seconds" in row:
                    row["of floor"] = row["floor"] / row["seconds"]
                rows.append(row)
                print(row, flush=True)
        except Exception as error:
            traceback.print_exc(limit=-2)
            failed.append(f"{name} ({type(error).__name__})")
        print(f"-- {name}: {time.perf_counter() - start:.0f} s", flush=True)
    print(measure.table(rows, [c for c in COLUMNS if any(c in row for row in rows)]))
    print(f"{time.perf_counter() - begin:.0f} s in all; failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
