"""Statistics of next-token distributions in tiles: memory and time against full logits.

    python -m tests.bench.token_statistics [--repeats 5]

The first table is the compiler's memory analysis of loss and gradient (log-prob and entropy) at
T = 2048, V = 151936, D = 1024, nothing run; the second the time at V = 50304, D = 512, 2048
positions, against full logits with jax.nn.log_softmax, and the products alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl.softmax import OutputHead, SoftmaxOptions, token_statistics
from tests.bench import measure

ROWS, LENGTH, WIDTH, VOCAB = 32, 64, 512, 50304


def plain(weight: Any, phi: Any, targets: Any) -> Any:
    """Return the loss with all logits at once."""
    log_pi = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", phi, weight))
    picked = jnp.take_along_axis(log_pi, targets[..., None], -1)
    return jnp.sum(picked) - 0.01 * jnp.sum(jnp.exp(log_pi) * log_pi)


def tiled(tokens: int, rows: int | None) -> Callable[..., Any]:
    """Return the same from tiles of `tokens` positions × `rows` vocabulary rows."""

    def loss(weight: Any, phi: Any, targets: Any) -> Any:
        statistics = token_statistics(
            OutputHead(weight), phi, targets, SoftmaxOptions(1.0, tokens, rows)
        )
        return jnp.sum(statistics.log_probs) + 0.01 * jnp.sum(statistics.entropy)

    return loss


def by_rows(tokens: int) -> Callable[..., Any]:
    """Return loss and gradient by chunks of completions whose logits are computed once."""
    from ntkrl.numerics import masked_total
    from ntkrl.types import UpdateBatch
    from ntkrl.update import Measures
    from ntkrl.update.train_step import chunked_loss

    def of_rows(read: Any, batch: UpdateBatch) -> Any:
        values = read.log_probs + 0.01 * read.entropy
        return masked_total(values, batch.completion_mask), Measures({}, {})

    def loss(weight: Any, phi: Any, targets: Any) -> Any:
        zeros, ones = jnp.zeros(targets.shape), jnp.ones(targets.shape, bool)
        batch = UpdateBatch(
            tokens=targets,
            mask=ones,
            completion_mask=ones,
            old_log_probs=zeros,
            ref_log_probs=zeros,
            advantages=zeros,
        )
        parts = -(-targets.size // tokens)
        return chunked_loss((of_rows, 1.0, parts), OutputHead(weight), phi, batch)[0].total

    return loss


def memory() -> list[dict[str, Any]]:
    """Compile at T = 2048, V = 151936 and half of each; report temporary memory."""
    rows = []
    for length, vocab in ((2048, 151936), (1024, 151936), (2048, 75968)):
        shapes = (
            jax.ShapeDtypeStruct((vocab, 1024), jnp.float32),
            jax.ShapeDtypeStruct((1, length, 1024), jnp.float32),
            jax.ShapeDtypeStruct((1, length), jnp.int32),
        )
        row: dict[str, Any] = {"positions": length, "vocabulary": vocab}
        for name, loss in (("plain", plain), ("tiles 512 × 8192", tiled(512, 8192))):
            compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile()
            analysis = compiled.memory_analysis()
            row[f"{name} MiB"] = analysis.temp_size_in_bytes / 2**20
        row["dW MiB"] = 4 * vocab * 1024 / 2**20
        rows.append(row)
    return rows


def times(repeats: int) -> list[dict[str, Any]]:
    """Time loss and gradient in turns."""
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(VOCAB, WIDTH)) / WIDTH**0.5, jnp.float32)
    phi = jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCAB, (ROWS, LENGTH)))
    part = jnp.ones((ROWS * LENGTH // 4, VOCAB))
    products = jax.jit(lambda w, p, dz: (p @ w.T, dz @ w, dz.T @ p))
    flat = phi.reshape(-1, WIDTH)[: len(part)]
    calls: dict[str, Callable[[], Any]] = {
        "three products alone": lambda: [products(weight, flat, part) for _ in range(4)]
    }
    losses = {
        "plain": plain,
        "tiles 512 × V": tiled(512, None),
        "tiles 512 × 8192": tiled(512, 8192),
        "rows of 512": by_rows(512),
        "rows of 1024": by_rows(1024),
    }
    temporary = {}
    for name, loss in losses.items():
        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        program = program.lower(weight, phi, targets).compile()
        temporary[name] = program.memory_analysis().temp_size_in_bytes / 2**20
        calls[name] = lambda program=program: program(weight, phi, targets)
    medians = measure.medians_in_turns(calls, repeats, jax.block_until_ready)
    return [
        {
            "form": name,
            "seconds": value,
            "of_plain": value / medians["plain"],
            "temporary MiB": temporary[name] if name in temporary else "",
        }
        for name, value in medians.items()
    ]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rows = memory()
    print(measure.table(rows, list(rows[0])))
    print()
    rows = times(options.repeats)
    print(measure.table(rows, list(rows[0])))


if __name__ == "__main__":
    main()
