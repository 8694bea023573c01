"""Attention of many tokens: computed for some queries at a time, in memory linear in T."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl import models
from ntkrl.models import layers, positions
from tests.models.families import CASES

ROWS, LENGTH = 3, 11


def inputs(kind):
    """Tokens and their mask: left-padded, or two segments and padding in a row."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 31, (ROWS, LENGTH))
    if kind == "padded":
        return tokens, np.arange(LENGTH)[None] >= np.array([[0], [2], [5]])
    return tokens, np.where(np.arange(LENGTH)[None] < np.array([[4], [6], [9]]), 1, 2)


def moved(policy, params, tokens, mask):
    """Features of real tokens, their derivative along the params, and a gradient."""
    real = jnp.asarray(mask != 0)[:, :, None]

    def features(params):
        return jnp.where(real, policy.features(params, tokens, mask), 0)

    def both(params):
        value, along = jax.jvp(features, (params,), (jax.tree.map(jnp.ones_like, params),))
        return value, along, jax.grad(lambda p: jnp.sum(jnp.sin(features(p))))(params)

    return jax.tree.leaves(jax.jit(both)(params))


@pytest.mark.parametrize(
    ("case", "kind"),
    [("gemma 2", "padded"), ("gemma 2", "packed"), ("gpt-neox", "padded")],
)
def test_long_attention_equals_short(monkeypatch, x64, case, kind):
    """law: values, jvp and gradient by chunks of 4 of 11 queries, float64, ≤ 1e-11.

    Windows, soft caps, segments and padding; a chunk that saw its neighbour would differ by 1e-1.
    """
    _, architecture, config = CASES[case]
    policy, params = models.build(architecture, config, jax.random.key(0), dtype=jnp.float64)
    tokens, mask = map(jnp.asarray, inputs(kind))
    short = moved(policy, params, tokens, mask)
    monkeypatch.setattr(positions, "LONG", 8)
    monkeypatch.setattr(layers, "QUERIES", 4)
    for before, after in zip(short, moved(policy, params, tokens, mask), strict=True):
        assert jnp.abs(before - after).max() <= 1e-11 * max(1, jnp.abs(before).max())


def test_memory_of_a_gradient_is_linear():
    """law: temporary memory of 4096 tokens is at most 2.1 times that of 2048 (4 if quadratic)."""

    def bytes_of(length):
        columns = jnp.arange(length)
        visible = positions.Visible(jnp.ones((1, length), bool), (columns, columns), None, None)

        def loss(queries, keys, values):
            return jnp.sum(layers.attention(queries, keys, values, visible) ** 2)

        shapes = [(1, length, 2, 8), (1, 2, length, 8), (1, 2, length, 8)]
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert bytes_of(4096) <= 2.1 * bytes_of(2048)
