"""Decoding, the update and the kernel on one accelerator, against the limits of its chip.

    python -m tests.bench.device [--model=EleutherAI/pythia-1b] [--only=decode,update,kernel]

The model has random weights, float32 masters and bfloat16 compute. The chip's limits are measured
in the same run: bytes/s of adding one to a large array (read and written), FLOP/s of a bfloat16
product. `floor` is the time of a row at its binding limit: decoding reads the weights and half of
the full cache for every token, the update does 6 N T FLOPs and attention, a kernel the FLOPs of its
estimate. `of floor` is floor / seconds, at best 1.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import models, ntk, rollout, scoring, update
from ntkrl.plan.abstract_models import PUBLISHED_MODELS
from ntkrl.types import Params, Policy, PromptBatch, UpdateBatch
from tests.bench import measure

TINY = {
    **PUBLISHED_MODELS["EleutherAI/pythia-1b"],
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "vocab_size": 512,
}
PROMPT, COMPLETION, GROUP = 64, 128, 8
REPEATS = 3


class Bench(NamedTuple):
    """A model on a device and the limits of its chip.

    body, head: parameters of the layers and of W.
    bytes_rate, flops_rate: bytes/s, bfloat16 FLOP/s.
    """

    policy: Policy
    params: Params
    body: int
    head: int
    bytes_rate: float
    flops_rate: float


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


def make(config: dict[str, Any], side: int) -> Bench:
    """Draw the model's weights and measure the chip."""
    rates = limits(side)
    policy, params = models.build(
        "GPTNeoXForCausalLM", config, jax.random.key(0), options=models.ModelOptions(jnp.bfloat16)
    )
    head = config["vocab_size"] * config["hidden_size"]
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Bench(policy, params, total - 2 * head, head, *rates)


def decoding(bench: Bench, prompts: int) -> Iterator[dict[str, Any]]:
    """Time a rollout less its prefill, per token step."""
    policy, config, rows = bench.policy, bench.policy.config, prompts * GROUP
    ids = np.random.default_rng(0).integers(2, policy.vocab_size, (prompts, PROMPT))
    batch = PromptBatch(
        tokens=jnp.asarray(ids),
        mask=jnp.ones(ids.shape, bool),
        rows=jnp.arange(prompts),
        copies=jnp.zeros(prompts, int),
    )
    seconds = []
    for length in (1, COMPLETION):
        # no token ends a completion: all have the full length
        settings = rollout.SamplerSettings(GROUP, length, 1.0, end_ids=(), pad_id=0)
        sample = rollout.Sampler(policy, settings)
        seconds.append(timed(functools.partial(sample, bench.params, batch, jax.random.key(1))))
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


def updating(bench: Bench, rows: int, microbatches: int) -> Iterator[dict[str, Any]]:
    """Time scoring and one optimizer step on full-length completions."""
    policy, total = bench.policy, PROMPT + COMPLETION
    ids = np.random.default_rng(0).integers(2, policy.vocab_size, (rows, total))
    tokens, mask = jnp.asarray(ids), jnp.ones((rows, total), bool)
    score = jax.jit(lambda p: scoring.score(policy, p, tokens, mask, COMPLETION).log_probs)
    attention = 4 * policy.feature_size * policy.config.num_hidden_layers * total**2 / 2 * rows
    forward = 2 * rows * (bench.body * total + bench.head * COMPLETION) + attention
    each = timed(lambda: score(bench.params))
    yield {
        "what": f"score, {rows} rows",
        "seconds": each,
        "floor": forward / bench.flops_rate,
        "limit": "compute",
        "tokens/s": rows * total / each,
    }
    old = score(bench.params)
    part = UpdateBatch(
        tokens=tokens,
        mask=mask,
        completion_mask=jnp.ones((rows, COMPLETION), bool),
        old_log_probs=old,
        ref_log_probs=old,
        advantages=jax.random.normal(jax.random.key(1), (rows, COMPLETION)),
    )
    objective = update.PRESETS["grpo"]
    stage = update.Stage("all", 1, ((".*", 1e-6),), optimizer="adamw", max_grad_norm=1.0)
    bound_stage = update.bind_stage(stage, policy, bench.params)
    minimised = update.policy_loss_fn(
        policy, lambda read, batch: update.policy_loss(objective, COMPLETION, read, batch)
    )
    step = jax.jit(update.make_step(bound_stage, minimised, microbatches), donate_argnums=0)
    state = [
        update.init_state(bound_stage, jax.tree.map(jnp.copy, bench.params), jax.random.key(0))
    ]

    def once() -> Any:
        state[0], metrics, _ = step(state[0], part)
        return metrics["loss"]

    each = timed(once)
    yield {
        "what": f"update, {rows} rows, {microbatches} micro-batches",
        "seconds": each,
        "floor": 3 * forward / bench.flops_rate,
        "limit": "compute",
        "tokens/s": rows * total / each,
    }


def kernels(bench: Bench, contexts: int, length: int) -> Iterator[dict[str, Any]]:
    """Time the exact kernel of last positions at full vocabulary, factored: R, W and M."""
    ids = np.random.default_rng(0).integers(2, bench.policy.vocab_size, (contexts, length))
    where = ntk.last_positions(jnp.asarray(ids))
    kernel = ntk.kernel(bench.policy, bench.params, where)
    estimate = kernel.estimate()
    name = estimate.algorithm

    def call() -> Any:
        return ntk.factored(ntk.kernel(bench.policy, bench.params, where))

    each = timed(call, 1)
    yield {
        "what": f"kernel, {contexts} contexts of {length}: {name}, chunk {estimate.chunk}",
        "seconds": each,
        "floor": estimate.flops / bench.flops_rate,
        "limit": "compute",
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="EleutherAI/pythia-1b", help="or tiny")
    parser.add_argument("--only", default="decode,update,kernel")
    options = parser.parse_args()
    tiny, rows = options.model == "tiny", []
    bench = make(TINY if tiny else PUBLISHED_MODELS[options.model], 512 if tiny else 8192)
    layers, head = f"{bench.body / 1e6:.0f} M", f"{bench.head / 1e6:.0f} M"
    sizes = f"{options.model}: layers {layers}, head {head} parameters"
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}; {sizes}")
    print(f"{bench.bytes_rate / 1e12:.3g} TB/s, {bench.flops_rate / 1e12:.4g} TFLOP/s", flush=True)
    benches = {
        "decode": lambda: (row for prompts in (16, 2, 64) for row in decoding(bench, prompts)),
        "update": lambda: updating(bench, 4 if tiny else 32, 2 if tiny else 4),
        "kernel": lambda: kernels(bench, 2, 32),
    }
    for name in options.only.split(","):
        for row in benches[name]():
            rows.append({**row, "of floor": row["floor"] / row["seconds"]})
            print(row, flush=True)
    print(measure.table(rows, ("what", "seconds", "floor", "limit", "of floor", "tokens/s")))


if __name__ == "__main__":
    main()
