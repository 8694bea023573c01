"""Measures of a batch against per-sample gradients and pairs of tokens written out."""

import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl.probe.batch_measures import (
    entropy_share,
    group_measures,
    noise_from_squares,
    reward_signal,
)
from ntkrl.probe.features import ches
from ntkrl.softmax import OutputHead


def test_reward_signal_by_hand():
    """by hand: variances 1/3, 0 and 0; thirds of 0.1 have a mean that is not 0.1."""
    rewards = jnp.array([[1.0, 0.0, 0.0], [0.1, 0.1, 0.1], [2.0, 2.0, 2.0]])
    variances, scalars = reward_signal(rewards)
    np.testing.assert_allclose(variances, [1 / 3, 0.0, 0.0], atol=1e-9, rtol=1e-6)
    np.testing.assert_allclose(scalars["reward_variance"], 1 / 9, rtol=1e-6)
    np.testing.assert_allclose(scalars["frac_reward_zero_std"], 2 / 3, rtol=1e-6)
    near = reward_signal(jnp.array([[1.0, 1.001], [0.0, 1.0]]), 0.01)[1]
    assert float(near["frac_reward_zero_std"]) == 0.5


def gradient_noise(gradients):
    """The noise of `[B, …]` gradients."""
    return noise_from_squares(
        *map(jnp.asarray, (np.sum(gradients**2, 1), np.sum(gradients.mean(0) ** 2)))
    )


def test_gradient_noise_by_gradients(x64):
    """oracle: the mean and covariance of twelve gradients of five entries."""
    gradients = np.random.default_rng(0).normal(size=(12, 5)) + 0.5
    result = gradient_noise(gradients)
    mean = gradients.mean(axis=0)
    noise = np.trace(np.cov(gradients.T))
    np.testing.assert_allclose(result.mean_square, mean @ mean, rtol=1e-12)
    np.testing.assert_allclose(result.noise, noise, rtol=1e-12)
    np.testing.assert_allclose(result.signal_to_noise, mean @ mean / noise, rtol=1e-12)
    np.testing.assert_allclose(result.noise_scale, noise / (mean @ mean - noise / 12), rtol=1e-12)


def test_noise_scale_is_unbiased_in_its_parts(x64):
    """law: over many batches of two, the corrected mean square averages to that of the truth."""
    rng = np.random.default_rng(1)
    batches = rng.normal(size=(400, 2, 3)) + np.array([0.5, 0.0, 0.0])
    squares = []
    for batch in batches:
        result = gradient_noise(batch)
        squares.append(float(result.noise / result.noise_scale))
    # ‖E g‖² = 0.25; ‖ḡ‖² alone would give 0.25 + 3/2; 400 batches leave an error of 0.07
    assert abs(np.mean(squares) - 0.25) < 0.2


def test_entropy_share_by_hand():
    """by hand: of five tokens that count, the top 40 % have amounts 3 and −1 of 10 in all."""
    entropy = jnp.array([[0.1, 2.0, 0.5], [9.0, 1.0, 0.2]])
    amounts = jnp.array([[1.0, 3.0, 5.0], [100.0, -1.0, 2.0]])
    mask = jnp.array([[True, True, True], [False, True, True]])
    np.testing.assert_allclose(entropy_share(entropy, amounts, mask, 0.4), 0.2, rtol=1e-6)
    np.testing.assert_allclose(entropy_share(entropy, amounts, mask, 0.01), 0.3, rtol=1e-6)
    np.testing.assert_allclose(entropy_share(entropy, amounts, mask, 1.0), 1.0, rtol=1e-6)


def test_group_measures_by_pairs(x64):
    """oracle: two prompts of three completions; the second has equal advantages and no pair."""
    rng = np.random.default_rng(3)
    phi, y = rng.normal(size=(6, 2, 4)), rng.integers(0, 5, (6, 2))
    mask = np.array([[1, 1], [1, 0], [1, 1], [1, 1], [1, 1], [1, 0]], bool)
    each = np.array([1.0, -2.0, 0.5, 3.0, 3.0, 3.0])
    head = OutputHead(jnp.asarray(rng.normal(size=(5, 4))))
    advantages = jnp.asarray(np.repeat(each[:, None], 2, 1))
    pair = head, jnp.asarray(phi)
    result = group_measures(pair, jnp.asarray(y), advantages, jnp.asarray(mask), 3)
    plain, scaled = ches(phi[:1], mask[:1], phi[1:2], mask[1:2])
    assert float(result["probe/ches"]) == pytest.approx(float(plain[0]))
    assert float(result["probe/ches_normalised"]) == pytest.approx(float(scaled[0]))
    rows, columns = np.nonzero(mask)
    features, a = phi[rows, columns], each[rows]
    logits = features @ np.asarray(head.weight).T
    g = np.eye(5)[y[rows, columns]] - np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    influence = (features @ features.T) * (g @ g.T) * (rows[:, None] // 3 == rows // 3)
    for sign, weights in (("positive", np.maximum(a, 0)), ("negative", np.minimum(a, 0))):
        expected = np.mean((influence @ weights)[a > 0])
        assert float(result[f"probe/head_sum_{sign}"]) == pytest.approx(expected)
    spill = (influence @ (a > 0))[a < 0]
    assert float(result["probe/head_sum_wrong"]) == pytest.approx(np.mean(spill))
