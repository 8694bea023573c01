"""Advantages by hand and by law."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl import advantage


def test_leave_one_out_by_hand():
    """by hand: group (1, 2, 6): 1 − 4 = −3, 2 − 3.5 = −1.5, 6 − 1.5 = 4.5."""
    result = advantage.leave_one_out(jnp.array([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]), 3)
    np.testing.assert_allclose(result, [-3.0, -1.5, 4.5, 0, 0, 0])


def test_group_normalised_by_hand():
    """by hand: group (0, 2): mean 1, unbiased std √2 (population std 1 would give ±1)."""
    result = advantage.group_normalised(jnp.array([0.0, 2.0]), 2)
    np.testing.assert_allclose(
        result, [-1 / (np.sqrt(2) + 1e-4), 1 / (np.sqrt(2) + 1e-4)], rtol=1e-6
    )


GROUPED = [
    advantage.leave_one_out,
    advantage.group_mean,
    advantage.group_normalised,
    advantage.batch_scaled,
]


def test_baselines_by_hand():
    """by hand: rewards (0, 1 | 2, 5): batch mean 2; group means 0.5, 3.5; batch std √(14/3)."""
    rewards = jnp.array([0.0, 1.0, 2.0, 5.0])
    np.testing.assert_array_equal(advantage.no_baseline(rewards, 2), rewards)
    np.testing.assert_allclose(advantage.batch_mean(rewards, 2), [-2, -1, 0, 3])
    np.testing.assert_allclose(advantage.group_mean(rewards, 2), [-0.5, 0.5, -1.5, 1.5])
    scaled = np.array([-0.5, 0.5, -1.5, 1.5]) / (np.sqrt(14 / 3) + 1e-4)
    np.testing.assert_allclose(advantage.batch_scaled(rewards, 2), scaled, rtol=1e-6)


def test_max_likelihood_by_hand():
    """by hand: one success of four: (1 − ¼)/¼ = 3 and −1; no success: 0, not NaN."""
    result = advantage.max_likelihood(jnp.array([1.0, 0, 0, 0, 0, 0, 0, 0]), 4)
    np.testing.assert_allclose(result, [3, -1, -1, -1, 0, 0, 0, 0])


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("solved", range(6))
def test_pass_at_k_by_enumeration(k, solved):
    """oracle: all subsets of k of five completions; S_i the share of those with i that succeed."""
    rewards = np.arange(5) < solved
    subsets = list(itertools.combinations(range(5), k))
    mean = np.mean([rewards[list(s)].any() for s in subsets])
    shares = [np.mean([rewards[list(s)].any() for s in subsets if i in s]) for i in range(5)]
    expected = (np.array(shares) - mean) / (np.sqrt(mean * (1 - mean)) + 1e-4)
    result = advantage.pass_at_k(jnp.asarray(rewards, jnp.float32), 5, k)
    np.testing.assert_allclose(result, expected, atol=1e-5)
    with pytest.raises(ValueError, match="1 ≤ k < completions per prompt = 5, not k = 5"):
        advantage.pass_at_k(jnp.ones(5), 5, 5)


def test_to_go_by_hand():
    """by hand: returns 1 − 0.3, 1 − 0.1 | 0: mean 1.6/3, unbiased variance; masked tokens 0."""
    penalties = jnp.array([[0.2, 0.1], [0.0, 7.0]])
    mask = jnp.array([[True, True], [True, False]])
    result = advantage.reward_to_go(jnp.array([1.0, 0.0]), penalties, mask)
    values = np.array([0.7, 0.9, 0.0])
    expected = (values - values.mean()) / values.std(ddof=1)
    np.testing.assert_allclose(result, [expected[:2], [expected[2], 0]], rtol=1e-5)


@pytest.mark.parametrize("estimator", GROUPED)
def test_laws(estimator):
    """law: advantages of a group add up to zero, ignore a shift, and are 0 for equal rewards."""
    rewards = jnp.asarray(np.random.default_rng(0).normal(size=12), jnp.float32)
    result = estimator(rewards, 4)
    np.testing.assert_allclose(result.reshape(3, 4).sum(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(estimator(rewards + 3, 4), result, atol=1e-4)
    np.testing.assert_array_equal(estimator(jnp.full(4, 0.5), 4), 0)


@pytest.mark.parametrize("estimator", [*GROUPED, advantage.max_likelihood])
def test_groups_that_cannot_be(estimator):
    """law: a group of one is an error, not silent zeros; so is a ragged batch."""
    with pytest.raises(ValueError, match="needs at least 2 of them, not 1; raise rollout.compl"):
        estimator(jnp.ones(4), 1)
    with pytest.raises(ValueError, match="a multiple of 3"):
        estimator(jnp.ones(4), 3)


ALL = {
    **advantage.ESTIMATORS,
    "pass_at_k": lambda rewards, group: advantage.pass_at_k(rewards, group, group - 1),
    "reward_to_go": lambda rewards, group: advantage.reward_to_go(
        rewards, jnp.zeros((rewards.size, 3), rewards.dtype), jnp.ones((rewards.size, 3), bool)
    ),
}
VALUES = (0.1, 0.35, 1 / 3, 0.7, 1.0, -1.0, 123.4, -0.3, 1e-3, 1e30, 1e-30)
OF_THE_BATCH = ("batch_mean", "reward_to_go")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", [name for name in ALL if name != "none"])
def test_equal_rewards_have_no_advantage(name, dtype, x64):
    """law: equal rewards give exactly 0 in any dtype: a mean's rounding error is not a signal.

    Without the exception, leave_one_out of eight times 0.1 is 1.5e-8 in float32.
    """
    values = [value for value in VALUES if abs(value) < 1e4 or dtype != "float16"]
    batches = [[value] for value in values[:3]] if name in OF_THE_BATCH else [values]
    for group in (2, 3, 7, 8):
        for batch in batches:
            rewards = jnp.repeat(jnp.asarray(batch, dtype), group * (3 - min(len(batch), 2)))
            result = jax.jit(ALL[name], static_argnums=1)(rewards, group)
            assert result.shape[0] == rewards.size
            np.testing.assert_array_equal(result, 0, f"{batch} × {group}")


@pytest.mark.parametrize("estimator", [*GROUPED, advantage.max_likelihood])
def test_equal_groups_among_others(estimator):
    """law: a group of equal rewards has no advantage beside one with a signal, which keeps its."""
    signal = np.array([0.0, 1.0, 0.25, 0.5], np.float32)
    rewards = jnp.asarray(np.concatenate([np.full(4, 0.7, np.float32), signal]))
    result = np.asarray(estimator(rewards, 4)).reshape(2, 4)
    np.testing.assert_array_equal(result[0], 0)
    assert np.all(result[1] != 0) or estimator is not advantage.leave_one_out
    if estimator is not advantage.batch_scaled:  # whose deviation is that of the batch
        np.testing.assert_array_equal(result[1], estimator(jnp.asarray(signal), 4))
    np.testing.assert_array_equal(advantage.equal_groups(rewards, 4), [True, False])
