"""Seconds per optimizer step of RL, ours and TRL's, on equal weights, prompts and lengths.

    python -m tests.bench.rl [--sizes small,large] [--kind grpo|rloo] [--steps 5] [--ours-only]

8 prompts of 16 tokens, 4 completions of 64 tokens each, float32, AdamW with clipping, each side in
a separate process, one after the other. Ours uses 4 micro-batches, which change only memory
(`schedule.microbatches`). `floor` is the time of the arithmetic of generation, a reference forward
pass and the update at the fastest matrix-product rate measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import numpy as np

from tests.bench import measure

PROMPTS, GROUP, PROMPT, LENGTH = 8, 4, 16, 64
SIZES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 512},
    "large": {"hidden_size": 512, "num_hidden_layers": 8, "vocab_size": 50304},
}
HEADS, RATE, MICROBATCHES = 8, 1e-6, 4
BETA = {"grpo": 0.04, "rloo": 0.05}


def our_steps(
    kind: str, directory: str, prompts: list[list[int]], steps: int, warm_up: int = 2
) -> dict[str, Any]:
    """Train with this library for some steps; return medians of their parts."""
    import jax
    import jax.numpy as jnp

    import ntkrl
    from ntkrl import rollout, scoring, update
    from ntkrl.types import PromptBatch, UpdateBatch
    from ntkrl.update import RolloutArrays, token_weights

    policy, params = ntkrl.load(directory)
    reference = params
    batch = PromptBatch(
        tokens=jnp.asarray(prompts),
        mask=jnp.ones((PROMPTS, PROMPT), bool),
        rows=jnp.arange(PROMPTS),
        copies=jnp.zeros(PROMPTS, int),
    )
    objective = update.PRESETS[kind]
    # no token ends a completion: all have the full length, as on the other side
    settings = rollout.SamplerSettings(GROUP, LENGTH, 1.0, end_ids=(), pad_id=0)
    sample = rollout.Sampler(policy, settings)
    stage = update.Stage("all", 1, ((".*", RATE),), optimizer="adamw", max_grad_norm=1.0)
    bound_stage = update.bind_stage(stage, policy, params)

    def loss(read: Any, part: UpdateBatch) -> Any:
        return update.policy_loss(objective, LENGTH, read, part)

    minimised = update.policy_loss_fn(policy, loss)
    step = jax.jit(update.make_step(bound_stage, minimised, MICROBATCHES), donate_argnums=0)
    score = jax.jit(
        lambda p, tokens, mask: scoring.score(policy, p, tokens, mask, LENGTH).log_probs
    )
    weigh = jax.jit(lambda arrays, key: token_weights(objective, GROUP, arrays, key))
    copied = jax.tree.map(jnp.copy, params)
    state = update.init_state(bound_stage, copied, jax.random.key(0))
    marks: list[tuple[float, ...]] = []
    for number in range(warm_up + steps):
        times = [time.perf_counter()]
        drawn = sample(state.params, batch, jax.random.key(number))
        ids = np.asarray(drawn.tokens)[:, -LENGTH:]
        times.append(time.perf_counter())
        rewards = jnp.asarray((ids % 2 == 0).mean(axis=1), jnp.float32)
        ref_log_probs = score(reference, drawn.tokens, drawn.mask)
        old, mask = drawn.sampler_log_probs, drawn.completion_mask
        arrays = RolloutArrays(
            rewards=rewards,
            old_log_probs=old,
            ref_log_probs=ref_log_probs,
            behaviour_log_probs=old,
            mask=mask,
            finished=drawn.finished,
        )
        weights = jax.block_until_ready(weigh(arrays, jax.random.key(0)))
        times.append(time.perf_counter())
        part = UpdateBatch(
            tokens=drawn.tokens,
            mask=drawn.mask,
            completion_mask=weights.mask,
            old_log_probs=old,
            ref_log_probs=ref_log_probs,
            advantages=weights.advantages,
        )
        state, metrics, _ = step(state, part)
        float(metrics["loss"])
        times.append(time.perf_counter())
        marks.append(tuple(np.diff(times)) + (times[-1] - times[0],))
    names = ("generation_seconds", "scoring_seconds", "update_seconds", "step_seconds")
    medians = [statistics.median(column) for column in zip(*marks[warm_up:], strict=True)]
    return dict(zip(names, map(float, medians), strict=True)) | {
        "peak_rss_mib": measure.status_mib("VmHWM")
    }


def product_rate(rows: int = 2048, inner: int = 512, columns: int = 8192) -> dict[str, float]:
    """Return FLOP/s of float32 matrix products as large as the update's."""
    import jax
    import jax.numpy as jnp

    left, right = jnp.ones((rows, inner)), jnp.ones((inner, columns))
    product = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(product(left, right))
    seconds = measure.median_seconds(lambda: jax.block_until_ready(product(left, right)), 15)
    return {"rate": 2 * rows * inner * columns / seconds}


def floor_flops(size: dict[str, int], scored: bool) -> dict[str, float]:
    """Return the products of generation, scoring (a reference forward) and update, in FLOPs."""
    width, layers, vocab = size["hidden_size"], size["num_hidden_layers"], size["vocab_size"]
    body, head, rows = 12 * layers * width**2, vocab * width, PROMPTS * GROUP
    # attention: scores and mixing, 4·D per pair of positions, half of them seen
    seen = PROMPT + LENGTH
    attention = 4 * width * layers * seen * seen / 2 * rows
    forward = 2 * body * rows * seen + 2 * head * rows * LENGTH + attention
    generation = 2 * body * (PROMPTS * PROMPT + rows * LENGTH) + 2 * head * rows * LENGTH
    return {
        "generation": generation + attention,
        "scoring": forward * scored,
        "update": 3 * forward,
    }


def compare(name: str, kind: str, steps: int, ours_only: bool) -> list[dict[str, Any]]:
    """Return one row per side, and the floor."""
    from tests.toys import torch_neox

    size = SIZES[name]
    prompts = np.random.default_rng(0).integers(2, size["vocab_size"], (PROMPTS, PROMPT)).tolist()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        shape = {"num_attention_heads": HEADS, "intermediate_size": 4 * size["hidden_size"]}
        more = {"max_position_embeddings": 128, "rotary_pct": 0.25, "initializer_range": 0.02}
        torch_neox(directory, **size, **shape, **more)
        rate = measure.run_isolated("tests.bench.rl:product_rate", {}, 300)["rate"]
        flops = floor_flops(size, scored=True)
        arguments = {"kind": kind, "directory": directory, "prompts": prompts, "steps": steps}
        medians = measure.run_isolated("tests.bench.rl:our_steps", arguments, 1800)
        rows.append({"side": "ours", **medians})
        if not ours_only:
            options = {"num_generations": GROUP, "max_completion_length": LENGTH}
            options |= {"beta": BETA[kind], "learning_rate": RATE}
            medians = measure.run_isolated(
                "tests.bench.trl_peer:timed_steps", arguments | {"options": options}, 1800
            )
            rows.append({"side": "TRL", **medians})
        again = measure.run_isolated("tests.bench.rl:product_rate", {}, 300)["rate"]
    rate = max(rate, again)
    floor = {f"{part}_seconds": count / rate for part, count in flops.items()}
    rows.append({"side": "floor", **floor, "step_seconds": sum(floor.values())})
    for row in rows:
        row["size"] = name
        row["tokens_per_second"] = PROMPTS * GROUP * LENGTH / row["step_seconds"]
        row["of_floor"] = rows[-1]["step_seconds"] / row["step_seconds"]
        row["gflops"] = rate / 1e9
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="small,large")
    parser.add_argument("--kind", default="grpo", choices=sorted(BETA))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--ours-only", action="store_true")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in options.sizes.split(","):
        rows += compare(name, options.kind, options.steps, options.ours_only)
    parts = ("generation_seconds", "scoring_seconds", "update_seconds", "step_seconds")
    columns = ("size", "side", *parts, "tokens_per_second", "peak_rss_mib", "of_floor", "gflops")
    print(measure.table(rows, columns))


if __name__ == "__main__":
    main()
