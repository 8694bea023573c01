"""The Bradley–Terry loss by hand and against TRL's formula."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ntkrl.update import preference_loss


def test_by_hand():
    """by hand: margins 2 and −1, sums 4 and 1."""
    total, metrics = preference_loss(jnp.array([[3.0, 1.0], [0.0, 1.0]]), 0.5)
    expected = math.log(1 + math.exp(-2)) + math.log(1 + math.e) + 0.5 * (16 + 1)
    assert float(total.total) == pytest.approx(expected, rel=1e-6) and int(total.count) == 2
    assert [float(metrics[n].total) for n in ("accuracy", "margin", "mean_reward")] == [
        1.0,
        1.0,
        2.5,
    ]


def test_equal_to_torch():
    """oracle: −logsigmoid(r⁺ − r⁻).mean() + λ mean((r⁺ + r⁻)²) in torch, and its gradient."""
    scores = np.random.default_rng(0).normal(size=(7, 2)).astype(np.float32) * 3
    theirs = torch.tensor(scores, requires_grad=True)
    loss = -torch.nn.functional.logsigmoid(theirs[:, 0] - theirs[:, 1]).mean()
    loss = loss + 0.01 * torch.mean((theirs[:, 0] + theirs[:, 1]) ** 2)
    loss.backward()

    def mean(scores):
        total, _ = preference_loss(scores, 0.01)
        return total.total / total.count

    value, gradient = jax.value_and_grad(mean)(jnp.asarray(scores))
    assert float(value) == pytest.approx(loss.item(), rel=1e-6)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-5, atol=1e-7)
