"""Rows of several sequences, separated by segment numbers, against one row per sequence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntkrl
from ntkrl import data, numerics, update
from tests.models.families import EACH, tokens_and_mask, torch_model
from tests.toys import TINY

PROMPTS, COMPLETIONS = (5, 2, 7, 1, 3), (4, 9, 1, 3, 6)
LENGTH = 24  # 11 + 9 + 4 tokens fill a row of it, 9 + 8 a part of another


def examples(vocab):
    """Five prompts with completions; the local layers of the cases see 3 or 4 tokens of them."""
    rng = np.random.default_rng(0)
    draw = [[rng.integers(0, vocab, n).tolist() for n in sizes] for sizes in (PROMPTS, COMPLETIONS)]
    return (*draw, np.arange(len(PROMPTS)))


def loss_and_gradient(policy):
    """Return a program for the summed loss, its count, and the gradient of the mean."""
    objective = update.policy_loss_fn(policy, update.supervised_loss, chunk_tokens=8)

    def value(params, batch):
        total, _ = objective(params, batch)
        return numerics.mean(total), total

    return jax.jit(jax.grad(value, has_aux=True))


def widened(batch):
    """The batch with the shapes of a packed one, so that one program takes both."""
    columns = {
        field.name: jnp.pad(values, ((0, 0), (LENGTH - 1 - values.shape[1], 0)))
        for field in dataclasses.fields(batch)
        if (values := getattr(batch, field.name)) is not None and values.shape[1] < LENGTH
    }
    return dataclasses.replace(batch, mask=batch.mask.astype(np.int32), **columns)


@pytest.mark.parametrize("case", EACH)
def test_packed_equals_unpacked(tmp_path, x64, case):
    """law: the loss, its count and every gradient of packed rows are those of a row each.

    GPT-2 has fewer learned positions than a row has columns: positions begin anew.
    """
    few = {"n_positions": 11} if case == "gpt2" else {}
    torch_model(case, tmp_path, **few)
    policy, params = ntkrl.load(tmp_path, dtype=jnp.float64)
    sequences = examples(policy.vocab_size)
    apart = data.supervised_batch(*sequences, 0, 7, LENGTH - 7)
    (packed,) = data.packed_batches(*sequences[:2], [sequences[2]], 0, LENGTH, multiple=5)
    assert packed.mask.max(axis=1).tolist() == [3, 2, 0, 0, 0]
    program, apart = loss_and_gradient(policy), widened(apart)
    (gradient, total), (same, expected) = (program(params, batch) for batch in (packed, apart))
    assert program._cache_size() == 1
    assert total.count == expected.count == sum(COMPLETIONS)
    np.testing.assert_allclose(total.total, expected.total, rtol=1e-10)
    size = max(np.abs(leaf).max() for leaf in jax.tree.leaves(same))
    for actual, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(actual, other, rtol=0, atol=1e-10 * size)


@pytest.mark.parametrize("case", ["gpt-neox", "gpt2", "gemma 3"])
def test_ones_and_zeros_are_a_plain_mask(tmp_path, case):
    """law: one segment per row equals a bool mask, with padding on either side."""
    torch_model(case, tmp_path)
    policy, params = ntkrl.load(tmp_path)
    tokens, mask = tokens_and_mask(policy.vocab_size)
    plain, numbered = (policy.features(params, jnp.asarray(tokens), m) for m in (mask, mask * 3))
    np.testing.assert_array_equal(np.asarray(plain)[mask], np.asarray(numbered)[mask])


def test_a_cache_refuses_segments():
    """law: decoding continues one sequence per row."""
    policy, params = ntkrl.build("GPTNeoXForCausalLM", TINY, jax.random.key(0))
    tokens = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="takes a bool mask, not int32; rows of several sequences"):
        copy = policy.decode_params(params)
        policy.decode(copy, policy.init_cache(1, 8), tokens, jnp.asarray([[1, 1, 2, 2]]))
