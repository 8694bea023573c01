"""Totals and token statistics against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl import numerics, scoring
from ntkrl.types import Total
from tests.oracles import log_softmax
from tests.toys import toy_params, toy_policy


def test_masked_total_and_mean():
    """by hand: sum 1 + 4 over two items; an empty mean is 0, not NaN."""
    total = numerics.masked_total(jnp.array([1.0, 2.0, 4.0]), jnp.array([True, False, True]))
    assert (float(total.total), int(total.count), float(numerics.mean(total))) == (5.0, 2, 2.5)
    assert float(numerics.mean(Total(jnp.float32(0), jnp.int32(0)))) == 0.0


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_statistics(x64, chunk, temperature):
    """oracle: numpy softmax, whatever the chunk."""
    rng = np.random.default_rng(0)
    features, weight = rng.normal(size=(2, 5, 3)), 3 * rng.normal(size=(6, 3))
    targets = rng.integers(0, 6, (2, 5))
    logits = np.einsum("btd,vd->btv", features, weight) / temperature
    log_probs = log_softmax(logits)
    probs = np.exp(log_probs)
    found = numerics.token_statistics(
        lambda phi: phi @ jnp.asarray(weight).T,
        jnp.asarray(features),
        jnp.asarray(targets),
        temperature,
        chunk,
    )
    picked = np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(found.log_probs, picked, rtol=1e-12)
    np.testing.assert_allclose(found.entropy, -(probs * log_probs).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(found.sum_squares, (probs**2).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(found.max_prob, probs.max(-1), rtol=1e-12)
    np.testing.assert_array_equal(found.argmax, probs.argmax(-1))


def test_statistics_are_differentiable(x64):
    """law: the entropy has a gradient, and chunking does not change it."""
    rng = np.random.default_rng(1)
    features, targets = jnp.asarray(rng.normal(size=(9, 3))), jnp.zeros(9, int)
    weight = jnp.asarray(rng.normal(size=(6, 3)))

    def total(w, chunk):
        found = numerics.token_statistics(lambda phi: phi @ w.T, features, targets, 1.0, chunk)
        return jnp.sum(found.entropy) + jnp.sum(found.log_probs)

    whole, parts = jax.grad(total)(weight, 100), jax.grad(total)(weight, 4)
    assert float(jnp.abs(whole).max()) > 0.1
    np.testing.assert_allclose(whole, parts, rtol=1e-10)


def test_half_precision_statistics_are_float32():
    """law: bfloat16 features give float32 statistics."""
    found = numerics.token_statistics(
        lambda phi: phi, jnp.ones((4, 3), jnp.bfloat16), jnp.zeros(4, int)
    )
    assert found.log_probs.dtype == found.entropy.dtype == jnp.float32


def test_score_reads_the_column_before():
    """by hand: completion token c is predicted by the features one column earlier."""
    policy = toy_policy()
    params = toy_params(policy)
    tokens = jnp.array([[1, 2, 3, 4, 5]])
    found = scoring.score(policy, params, tokens, jnp.ones((1, 5), bool), 2)
    logits = policy.head(params, policy.features(params, tokens))
    log_probs = log_softmax(np.asarray(logits, np.float64))
    # an off-by-one would read positions 3 and 4 and predict tokens that are there already
    expected = [log_probs[0, 2, 4], log_probs[0, 3, 5]]
    np.testing.assert_allclose(found.log_probs[0], expected, rtol=1e-5)
