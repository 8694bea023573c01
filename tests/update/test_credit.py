"""Weights of tokens before the loss: KL penalties, corrections, masks and signs."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl import update
from ntkrl.update import credit


def test_kl_in_the_reward_by_hand():
    """by hand: β Σ (log π − log π_ref) = 0.05·(0.5 − 0.2) of the first completion's reward."""
    log_probs = [jnp.array([[-1.0, -1.0, -7.0]]), jnp.array([[-1.5, -0.8, 0.0]])]
    mask = jnp.array([[True, True, False]])
    result = credit.reward_penalties(update.PRESETS["rloo"], *log_probs, mask)
    np.testing.assert_allclose(result, [[0.025, -0.01, 0.0]], rtol=1e-5)
    np.testing.assert_array_equal(
        credit.reward_penalties(update.PRESETS["grpo"], *log_probs, mask), 0.0
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_corrections(level):
    """oracle: w = π_old/μ, truncated or masked; a sampler that truncates has the kept mass in μ."""
    rng = np.random.default_rng(0)
    old, mask = -rng.exponential(size=(8, 3)), np.arange(3) < rng.integers(1, 4, 8)[:, None]
    behaviour = old - 0.5 * rng.normal(size=(8, 3))
    weight = np.exp(np.where(mask, old - behaviour, 0.0))
    weight = weight.prod(axis=1, keepdims=True) if level == "sequence" else weight
    weight = np.broadcast_to(weight, mask.shape)
    arrays = [jnp.asarray(array) for array in (old, behaviour, mask)]
    for kind, expected in (
        ("truncate", np.minimum(weight, 1.1)),
        ("mask", np.where(weight <= 1.1, weight, 0.0)),
        ("off", np.ones_like(weight)),
    ):
        objective = update.Objective(correction=kind, correction_level=level, correction_cap=1.1)
        result = credit.correction_weights(objective, *arrays)
        np.testing.assert_allclose(result, expected, rtol=1e-5)
    assert (weight > 1.1).any() and (weight < 1).any()


def test_what_does_not_count():
    """by hand: cut completions and groups of equal rewards leave the loss and its denominator."""
    mask = jnp.ones((4, 2), bool)
    rewards, finished = jnp.array([1.0, 1.0, 0.0, 1.0]), jnp.array([True, True, True, False])
    plain = update.Objective()

    def rows(**axes):
        objective = dataclasses.replace(plain, **axes)
        result = credit.counted_tokens(objective, mask, finished, rewards, 2)
        return np.asarray(result.all(axis=1)).tolist()

    assert rows() == [True] * 4
    assert rows(overlong="mask") == [True, True, True, False]
    assert rows(group_filter="drop") == [False, False, True, True]
    assert rows(group_filter="resample", overlong="mask") == [False, False, True, False]


def test_one_sign_alone():
    """by hand: advantages of the other sign are 0."""
    advantages = jnp.array([[1.5, -0.5], [0.0, -2.0]])

    def kept(signs):
        return np.asarray(credit.filter_sign(update.Objective(signs=signs), advantages)).tolist()

    assert kept("both") == advantages.tolist()
    assert kept("positive") == [[1.5, 0.0], [0.0, 0.0]]
    assert kept("negative") == [[0.0, -0.5], [0.0, -2.0]]
