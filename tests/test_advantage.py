"""Advantages by hand and by law."""

import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl import advantage


def test_leave_one_out_by_hand():
    """by hand: group (1, 2, 6): 1 − 4 = −3, 2 − 3.5 = −1.5, 6 − 1.5 = 4.5."""
    found = advantage.leave_one_out(jnp.array([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]), 3)
    np.testing.assert_allclose(found, [-3.0, -1.5, 4.5, 0, 0, 0])


def test_group_normalised_by_hand():
    """by hand: group (0, 2): mean 1, unbiased std √2 (population std 1 would give ±1)."""
    found = advantage.group_normalised(jnp.array([0.0, 2.0]), 2)
    np.testing.assert_allclose(
        found, [-1 / (np.sqrt(2) + 1e-4), 1 / (np.sqrt(2) + 1e-4)], rtol=1e-6
    )


@pytest.mark.parametrize("estimator", [advantage.leave_one_out, advantage.group_normalised])
def test_laws(estimator):
    """law: advantages of a group add up to zero, ignore a shift, and are 0 for equal rewards."""
    rewards = jnp.asarray(np.random.default_rng(0).normal(size=12), jnp.float32)
    found = estimator(rewards, 4)
    np.testing.assert_allclose(found.reshape(3, 4).sum(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(estimator(rewards + 3, 4), found, atol=1e-4)
    np.testing.assert_array_equal(estimator(jnp.full(4, 0.5), 4), 0)


@pytest.mark.parametrize("estimator", [advantage.leave_one_out, advantage.group_normalised])
def test_groups_that_cannot_be(estimator):
    """law: a group of one is an error, not silent zeros; so is a ragged batch."""
    with pytest.raises(ValueError, match="needs at least 2 of them, not 1; raise rollout.compl"):
        estimator(jnp.ones(4), 1)
    with pytest.raises(ValueError, match="a multiple of 3"):
        estimator(jnp.ones(4), 3)
