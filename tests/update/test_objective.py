"""Losses against their written formulas: by hand, and by slow loops in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl import advantage, numerics, update
from ntkrl.types import UpdateBatch
from ntkrl.vocabulary import TokenStatistics
from tests.oracles import grpo_loss, rloo_loss

RLOO, GRPO = update.PRESETS["rloo"], update.PRESETS["grpo"]


def batch_of(mask, old, ref, advantages):
    """An UpdateBatch whose tokens no loss looks at."""
    shape = np.shape(mask)
    return UpdateBatch(
        tokens=jnp.zeros(shape, int),
        mask=jnp.ones(shape, bool),
        completion_mask=jnp.asarray(mask, bool),
        old_log_probs=jnp.asarray(old),
        ref_log_probs=jnp.asarray(ref),
        advantages=jnp.asarray(advantages),
    )


def statistics_of(log_probs):
    """Statistics of which the losses use the log-probs."""
    log_probs = jnp.asarray(log_probs)
    return TokenStatistics(log_probs, -log_probs, log_probs * 0, jnp.exp(log_probs), None)


def draws(seed=0, rows=8, columns=5):
    """Random log-probs, rewards and a ragged mask with at least one token a row."""
    rng = np.random.default_rng(seed)
    old = -rng.exponential(size=(rows, columns))
    mask = np.arange(columns) < rng.integers(1, columns + 1, rows)[:, None]
    return {
        "rewards": rng.normal(size=rows),
        "old": old,
        "log_probs": old + 0.3 * rng.normal(size=old.shape),
        "ref": old + 0.3 * rng.normal(size=old.shape),
        "mask": mask,
    }


def whole_loss(objective, estimator, rewards, log_probs, old, ref, mask, group):
    """Rewards to the scalar that the step minimises, as the loop composes it."""
    penalised = update.penalised_rewards(
        objective, jnp.asarray(rewards), jnp.asarray(old), jnp.asarray(ref), jnp.asarray(mask)
    )
    batch = batch_of(mask, old, ref, estimator(penalised, group))
    total, _ = update.policy_loss(objective, statistics_of(log_probs), batch)
    return float(numerics.mean(total))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rloo_equals_its_formula(x64, seed):
    """oracle: k1 in the reward, leave-one-out, clipped sequence ratio, by loops."""
    held = draws(seed)
    found = whole_loss(RLOO, advantage.leave_one_out, group=4, **held)
    expected = rloo_loss(**held, group=4, beta=0.05, clip=0.2)
    assert abs(found - expected) < 1e-12


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_grpo_equals_its_formula(x64, seed):
    """oracle: normalised advantages, clipped token ratios, k3, mean of means, by loops."""
    held = draws(seed)
    found = whole_loss(GRPO, advantage.group_normalised, group=4, **held)
    expected = grpo_loss(**held, group=4, beta=0.04, clip=0.2)
    assert abs(found - expected) < 1e-12


def test_rloo_by_hand():
    """by hand: ratios exp(0.1 + 0.2) = 1.35 (clipped at 1.2, A = 2) and exp(−0.1), A = −2.

    A clip per token, the likely bug, would leave the first ratio at exp(0.1)·exp(0.2) unclipped.
    """
    mask = [[1, 1], [1, 0]]
    batch = batch_of(mask, [[-1.0, -1.0], [-1.0, 0.0]], np.zeros((2, 2)), [2.0, -2.0])
    total, metrics = update.policy_loss(RLOO, statistics_of([[-0.9, -0.8], [-1.1, 9.0]]), batch)
    np.testing.assert_allclose(total.total, -1.2 * 2 + 2 * np.exp(-0.1), rtol=1e-6)
    assert int(total.count) == 2
    assert float(numerics.mean(metrics["clip_ratio/region_mean"])) == 0.5


def test_grpo_by_hand():
    """by hand: one row of two tokens, one of one: rows weigh the same, not tokens."""
    mask = [[1, 1], [1, 0]]
    old = [[-1.0, -1.0], [-1.0, 0.0]]
    batch = batch_of(mask, old, old, [1.0, -1.0])
    total, _ = update.policy_loss(GRPO, statistics_of(old), batch)
    # ratios 1, KL 0: rows give −1 and 1, mean 0 (a token mean would give −1/3)
    np.testing.assert_allclose(numerics.mean(total), 0.0, atol=1e-7)
    token = dataclasses.replace(GRPO, aggregation="token_mean")
    total, _ = update.policy_loss(token, statistics_of(old), batch)
    np.testing.assert_allclose(numerics.mean(total), -1 / 3, rtol=1e-6)


def test_k1_by_hand():
    """by hand: r − β Σ (log π − log π_ref) = 1 − 0.05·(0.5 − 0.2); masked tokens do not count."""
    found = update.penalised_rewards(
        RLOO,
        jnp.array([1.0]),
        jnp.array([[-1.0, -1.0, -7.0]]),
        jnp.array([[-1.5, -0.8, 0.0]]),
        jnp.array([[True, True, False]]),
    )
    np.testing.assert_allclose(found, [1 - 0.05 * 0.3], rtol=1e-6)
    same = update.penalised_rewards(
        GRPO, jnp.array([1.0]), *[jnp.zeros((1, 2))] * 2, jnp.ones((1, 2))
    )
    assert float(same[0]) == 1.0


@pytest.mark.parametrize("objective", [RLOO, GRPO], ids=["rloo", "grpo"])
def test_on_policy_gradient_is_the_policy_gradient(x64, objective):
    """law: at ratio 1 the gradient is that of −A log π (no KL), per sequence or per token."""
    held = draws(3)
    plain = dataclasses.replace(objective, kl_coefficient=0.0)
    advantages = np.asarray(held["rewards"])
    batch = batch_of(held["mask"], held["old"], held["ref"], advantages)

    def loss(log_probs):
        total, _ = update.policy_loss(plain, statistics_of(log_probs), batch)
        return numerics.mean(total)

    mask = held["mask"].astype(float)
    lengths = mask.sum(axis=1, keepdims=True) if objective is GRPO else 1.0
    expected = -advantages[:, None] * mask / lengths / len(mask)
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(held["old"])), expected, atol=1e-12)


@pytest.mark.parametrize("objective", [RLOO, GRPO], ids=["rloo", "grpo"])
def test_padding_and_its_values_change_nothing(objective):
    """law: further masked columns, full of extreme numbers, leave loss and gradient alone."""
    held = draws(4)
    wide = {
        name: np.pad(held[name], ((0, 0), (0, 3)), constant_values=fill)
        for name, fill in (("old", -1e4), ("ref", 1e4), ("log_probs", 3.0), ("mask", False))
    }

    def value(log_probs, h):
        batch = batch_of(h["mask"], h["old"], h["ref"], held["rewards"])
        return numerics.mean(update.policy_loss(objective, statistics_of(log_probs), batch)[0])

    narrow_value, narrow = jax.value_and_grad(value)(jnp.asarray(held["log_probs"]), held)
    wide_value, padded = jax.value_and_grad(value)(jnp.asarray(wide["log_probs"]), wide)
    np.testing.assert_allclose(wide_value, narrow_value, rtol=1e-6)
    np.testing.assert_allclose(padded[:, :5], narrow, atol=1e-7)
    np.testing.assert_array_equal(padded[:, 5:], 0.0)


def test_supervised_loss_is_a_token_mean():
    """by hand: three tokens of 1, 2 and 6 nats: 9 over 3."""
    batch = batch_of([[1, 1], [1, 0]], np.zeros((2, 2)), np.zeros((2, 2)), np.ones(2))
    total, _ = update.supervised_loss(statistics_of([[-1.0, -2.0], [-6.0, -50.0]]), batch)
    assert (float(total.total), int(total.count)) == (9.0, 3)


def test_impossible_axes_are_all_named():
    """law: every conflict of a setting comes in one message."""
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(
            RLOO, advantage="gae", clip_low=1.5, kl_place="loss", aggregation="token_mean"
        )
    text = str(caught.value)
    assert "advantage 'gae' is not among leave_one_out, group_normalised" in text
    assert "clip_low must be in (0, 1)" in text
    assert "use aggregation sequence_mean" in text
    assert "needs ratio_level token" in text
