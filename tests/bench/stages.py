"""Cost of a classifier-first stage: a stage-1 update against its floor and against stage 2.

    python -m tests.bench.stages [--steps 7]

Measured at D = 512, 8 layers, V = 50304, 32 completions of 64 tokens behind 16: the head alone from
stored features, the head alone with a forward pass of the body, and all parameters. The floor of
the first is 4·V·D FLOPs per completion token, logits and dW, at the rate of matrix products of that
shape measured in the same process. At Pythia-2.8B's shape nothing is run: the compiler's cost
analysis gives the FLOPs of stage 1 (compiled as one chunk, since it counts a loop's body once, and
therefore not those of stage 2's layers), and its memory analysis the memory of the programs.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import models, update
from ntkrl.types import UpdateBatch
from tests.bench import measure

ROWS, PROMPT, LENGTH = 32, 16, 64
MEASURED = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}
MEASURED |= {"intermediate_size": 2048, "vocab_size": 50304, "max_position_embeddings": 128}
PYTHIA = {"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32}
PYTHIA |= {"intermediate_size": 10240, "vocab_size": 50304, "max_position_embeddings": 2048}
HEAD, ALL = (("head/.*", 1e-6), (".*", None)), ((".*", 1e-6),)
RLOO = update.PRESETS["rloo"]


def program_of(
    policy: Any, params: Any, parameters: Any, length: int, chunk: int = 1024
) -> tuple[Any, Callable]:
    """Return the train step of a stage."""
    stage = update.Stage("stage", 1, parameters, max_grad_norm=1.0)
    bound = update.bind_stage(stage, policy, params)

    def loss(statistics: Any, batch: UpdateBatch) -> Any:
        return update.policy_loss(RLOO, length, statistics, batch)

    return bound, update.make_step(bound, update.policy_loss_fn(policy, loss, chunk_tokens=chunk))


def batch_shapes(rows: int, length: int, width: int | None) -> UpdateBatch:
    """Return the shapes of an update batch, with features of a width or without."""

    def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    return UpdateBatch(
        tokens=shape(rows, PROMPT + length, dtype=jnp.int32),
        mask=shape(rows, PROMPT + length, dtype=bool),
        completion_mask=shape(rows, length, dtype=bool),
        old_log_probs=shape(rows, length),
        ref_log_probs=shape(rows, length),
        advantages=shape(rows, length),
        features=None if width is None else shape(rows, length, width),
    )


def drawn(shapes: UpdateBatch, vocab: int) -> UpdateBatch:
    """Fill shapes with numbers; every token counts."""
    rng = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> Any:
        if leaf.dtype == bool:
            return jnp.ones(leaf.shape, bool)
        if leaf.dtype == jnp.int32:
            return jnp.asarray(rng.integers(0, vocab, leaf.shape), jnp.int32)
        return jnp.asarray(0.01 * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree.map(fill, shapes)


def measured(steps: int) -> list[dict[str, Any]]:
    """Run the three updates in turns, and the bare products of the floor."""
    config = {**MEASURED, "rotary_pct": 0.25, "initializer_range": 0.02}
    policy, params = models.build("GPTNeoXForCausalLM", config, jax.random.key(0))
    width, vocab = MEASURED["hidden_size"], MEASURED["vocab_size"]
    phi = jnp.ones((ROWS * LENGTH // 4, width))
    dz, head = jnp.ones((ROWS * LENGTH // 4, vocab)), jnp.ones((vocab, width))
    products = jax.jit(lambda phi, dz, head: (phi @ head.T, dz.T @ phi))
    calls: dict[str, Callable[[], Any]] = {
        "floor (4 V D per token)": lambda: [products(phi, dz, head) for _ in range(4)]
    }
    cases = (
        ("stage 1, stored features", HEAD, width),
        ("stage 1, body read again", HEAD, None),
        ("stage 2", ALL, None),
    )
    for name, parameters, stored in cases:
        bound, step = program_of(policy, params, parameters, LENGTH)
        state = update.init_state(bound, jax.tree.map(jnp.copy, params), jax.random.key(0))
        bench = {"state": state, "step": jax.jit(step, donate_argnums=0)}
        batch = drawn(batch_shapes(ROWS, LENGTH, stored), vocab)

        def call(bench: dict[str, Any] = bench, batch: UpdateBatch = batch) -> Any:
            bench["state"], metrics, _ = bench["step"](bench["state"], batch)
            return metrics

        calls[name] = call
    medians = measure.medians_in_turns(calls, steps, jax.block_until_ready)
    floor, stage_2 = medians["floor (4 V D per token)"], medians["stage 2"]
    return [
        {"update": name, "seconds": value, "of_floor": value / floor, "of_stage_2": value / stage_2}
        for name, value in medians.items()
    ]


def analysed(rows: int = 32, length: int = 512) -> list[dict[str, Any]]:
    """Compile both stages at Pythia-2.8B's shape; nothing of that size is allocated."""
    config = {**PYTHIA, "rotary_pct": 0.25, "initializer_range": 0.02}
    policy, params = models.describe("GPTNeoXForCausalLM", config)
    width, vocab = PYTHIA["hidden_size"], PYTHIA["vocab_size"]
    tokens = rows * length
    body, head = 12 * PYTHIA["num_hidden_layers"] * width**2, vocab * width
    # stage 2: forward and backward of body and head, the prompt's positions beside
    floors = {
        "stage 1": 4 * head * tokens,
        "stage 2": 6 * head * tokens + 6 * body * rows * (PROMPT + length),
    }
    table = []
    for name, parameters, stored in (("stage 1", HEAD, width), ("stage 2", ALL, None)):

        def compiled(chunk: int, parameters: Any = parameters, stored: Any = stored) -> Any:
            bound, step = program_of(policy, params, parameters, length, chunk)
            state = jax.eval_shape(lambda p: update.init_state(bound, p, jax.random.key(0)), params)
            shapes = batch_shapes(rows, length, stored)
            return state, jax.jit(step, donate_argnums=0).lower(state, shapes).compile()

        state, program = compiled(1024)
        moments = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.opt_state))
        row = {"update": name, "floor_tflops": floors[name] / 1e12}
        row["of_stage_2"] = floors[name] / floors["stage 2"]
        row["temporary_gib"] = program.memory_analysis().temp_size_in_bytes / 2**30
        row["optimizer_gib"] = moments / 2**30
        if stored is not None:
            _, unchunked = compiled(tokens)
            row["compiler_tflops"] = unchunked.cost_analysis()["flops"] / 1e12
        table.append(row)
    return table


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=7)
    options = parser.parse_args()
    print(measure.table(measured(options.steps), ("update", "seconds", "of_floor", "of_stage_2")))
    columns = ("update", "floor_tflops", "of_stage_2", "compiler_tflops", "temporary_gib")
    print("\nPythia-2.8B, 32 completions of 512 tokens, compiled for this CPU and not run")
    print(measure.table(analysed(), (*columns, "optimizer_gib")))


if __name__ == "__main__":
    main()
