"""Measures of kernels and of their drift, against dense kernels in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl import ntk, probe
from ntkrl.probe.exact_kernels import (
    advantage_alignment,
    centred_alignment,
    kernel_drift,
    kernel_measures,
    layer_shares,
    laziness,
    plan_kernel,
)
from tests.ntk.networks import VOCAB, contexts, network
from tests.toys import toy_params, toy_policy

HERE = contexts(True)[0]


def flat(dense):
    """`[O, U, V, V]` as one symmetric matrix."""
    return dense.transpose(0, 2, 1, 3).reshape(dense.shape[0] * dense.shape[2], -1)


@pytest.mark.usefixtures("x64")
def test_parts_of_a_capped_head():
    """oracle: slopes vary over the vocabulary, so norms and spectra take another algorithm."""
    kernel = ntk.kernel(*network("cap", False), HERE)
    result = kernel_measures(plan_kernel(*network("cap", False), HERE), 6)
    shares = np.zeros(2)
    for part in ("head", "body", "full"):
        dense = np.asarray(kernel.dense(part))
        traces = np.einsum("ouvv->ou", dense)
        np.testing.assert_allclose(result[f"trace_{part}"], traces, rtol=1e-9)
        assert result[f"frobenius_{part}"] == pytest.approx(np.linalg.norm(dense), rel=1e-9)
        values = np.linalg.eigvalsh(flat(dense))[::-1][:6]
        np.testing.assert_allclose(result[f"eigenvalues_{part}"], values, rtol=1e-8)
        shares += result[f"share_{part}"] if part != "full" else 0.0
    np.testing.assert_allclose(shares, 1.0, rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_blocks_and_groups_and_a_small_head():
    """oracle: memory for one context at a time gives the same result; groups sum up."""
    here = ntk.Contexts(HERE.tokens, HERE.positions[:2], np.arange(2), HERE.mask)
    described, params = network("plain", False)
    # so small a W that the largest eigenvalue of the head kernel, V-fold, is most of the spectrum
    params = {**params, "head": 0.05 * params["head"]}
    # a quarter of 1.2 KB holds M of one pair (16 numbers of 8 bytes), not of four
    plan = plan_kernel(described, params, here, layers=True, memory_gib=1.2e3 / 2**30)
    assert len(plan.pairs) == 3 and plan.body_kernels == 3 * (1 + len(plan.kernel.problem.groups))
    steps = []
    result = kernel_measures(plan, 8, lambda done, doing: steps.append((done, doing)))
    assert [done for done, _ in steps] == list(range(plan.steps))
    assert steps[0][1] == "body" and steps[-1][1] == "eigenvalues of full"
    kernel = ntk.kernel(described, params, here, groups=ntk.by_layer(described, params))
    dense = np.asarray(kernel.dense())
    np.testing.assert_allclose(result["trace_full"], np.einsum("ouvv->ou", dense), rtol=1e-9)
    assert result["frobenius_full"] == pytest.approx(np.linalg.norm(dense), rel=1e-9)
    np.testing.assert_allclose(result["trace_layers"].sum(axis=0), result["trace_full"], rtol=1e-9)
    query = list(result["layers"]).index("query")
    np.testing.assert_allclose(result["trace_layers"][query], kernel.trace("query"), rtol=1e-9)
    values = np.linalg.eigvalsh(flat(dense))[::-1][:8]
    np.testing.assert_allclose(result["eigenvalues_full"], values, rtol=1e-8)
    head = np.linalg.eigvalsh(np.kron(result["head"], np.eye(VOCAB)))[::-1]
    np.testing.assert_allclose(np.repeat(result["eigenvalues_head"], VOCAB), head, rtol=1e-8)


@pytest.mark.usefixtures("x64")
def test_too_many_eigenvalues():
    """law: there are O·V of them, and Lanczos finds fewer."""
    plan = plan_kernel(*network("plain", False), HERE)
    with pytest.raises(ValueError, match=r"eigenpairs must be in \[1, 27\) for these contexts"):
        kernel_measures(plan, 3 * VOCAB)


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
