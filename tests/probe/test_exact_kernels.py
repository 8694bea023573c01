"""Drift of kernels and their alignment, against dense kernels in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl import ntk, probe
from ntkrl.probe.exact_kernels import (
    advantage_alignment,
    centred_alignment,
    kernel_drift,
    layer_shares,
    laziness,
)
from tests.ntk.networks import VOCAB, contexts, network
from tests.toys import toy_params, toy_policy

HERE = contexts(True)[0]


def test_kernel_drift_by_hand():
    """by hand: K_0 = I, K_t = 2I + J on two contexts; centring leaves multiples of I − J/2."""
    eye, ones = np.eye(2), np.ones((2, 2))
    start = {"head": eye, "trace_head": 5 * eye, "trace_body": eye}
    now = {"head": 2 * eye + ones, "trace_head": 10 * eye, "trace_body": 3 * eye - ones}
    result = kernel_drift(now, start)
    assert result["body_to_head"] == pytest.approx(4 / 20)
    # I + J has norm √(2²+1+1+2²), 2I − J has √(1+1+1+1), and I has √2
    assert result["laziness_head"] == pytest.approx(np.sqrt(10 / 2))
    assert result["laziness_body"] == pytest.approx(np.sqrt(4 / 2))
    assert result["cka_head"] == result["cka_body"] == pytest.approx(1.0)


def test_head_drift_is_of_the_whole_head_kernel(x64):
    """oracle: laziness and CKA of dense head kernels of two networks, over the vocabulary too."""
    described, params = network("plain", False)
    moved = {**params, "mlp": params["mlp"] + 0.3}
    kernels = [ntk.kernel(described, p, HERE) for p in (moved, params)]
    grams = [np.asarray(k.head) for k in kernels]
    dense = [np.asarray(k.dense("head")) for k in kernels]
    expected = np.linalg.norm(dense[0] - dense[1]) / np.linalg.norm(dense[1])
    assert laziness(*grams) == pytest.approx(expected, rel=1e-10)
    expected = float(ntk.cka(*kernels, "head"))
    assert 0.1 < expected < 0.999
    assert centred_alignment(*grams) == pytest.approx(expected, rel=1e-10)


def test_layer_shares_by_hand():
    """by hand: traces 1 + 2 and 4 + 5 on the diagonals."""
    traces = np.array([[[1.0, 7.0], [7.0, 2.0]], [[4.0, 0.0], [0.0, 5.0]]])
    assert layer_shares(np.array(["a", "b"]), traces) == {"a": 0.25, "b": 0.75}


def test_advantage_alignment_by_dense_kernels(x64):
    """oracle: aᵀKa of the kernel as one (O·V)² matrix; 1/(O·V) for the identity."""
    described, params = network("plain", False)
    kernel = ntk.kernel(described, params, HERE)
    y, advantages = np.array([1, 5, 8]), np.array([1.0, -2.0, 0.5])
    logits = described.logits(params, kernel.problem.head_inputs[0].features)
    pi = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    stacked = (advantages[:, None] * (np.eye(VOCAB)[y] - pi)).ravel()
    dense = np.asarray(kernel.dense()).transpose(0, 2, 1, 3).reshape(stacked.size, -1)
    expected = stacked @ dense @ stacked / (np.trace(dense) * stacked @ stacked)
    gram = ntk.score_gram(described, params, HERE, y)
    squares = 1 - 2 * pi[np.arange(3), y] + np.sum(pi**2, axis=1)
    result = advantage_alignment(gram, kernel.trace(), advantages, squares)
    assert result == pytest.approx(expected, rel=1e-9)
    eye = advantage_alignment(np.diag(squares), VOCAB * np.eye(3), advantages, squares)
    assert eye == pytest.approx(1 / (3 * VOCAB))


def test_alignment_of_a_batch(x64):
    """oracle: by kernels of all pairs, of a toy policy's tokens."""
    policy = toy_policy()
    params = toy_params(policy, dtype=jnp.float64)
    here = ntk.every_position(jax.random.randint(jax.random.key(0), (2, 3), 0, 7))
    y, advantages = np.arange(6), np.array([1.0, -2.0, 0.5, 1.0, 0.0, 3.0])
    kernel = ntk.kernel(policy, params, here)
    pi = jax.nn.softmax(policy.head(params, kernel.problem.head_inputs[0].features))
    squares = 1 - 2 * pi[np.arange(6), y] + np.sum(pi**2, axis=1)
    gram = ntk.score_gram(policy, params, here, y)
    expected = advantage_alignment(gram, kernel.trace(), advantages, squares)
    result = probe.batch_alignment(policy, params, here, y, advantages)
    assert result == pytest.approx(expected, rel=1e-10) and 0 < result < 1
