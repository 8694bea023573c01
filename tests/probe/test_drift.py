"""Drift of features and kernels, and sums of the head kernel, against dense kernels in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl import ntk, probe
from ntkrl.probe.batch import group_measures
from ntkrl.probe.drift import (
    advantage_alignment,
    centred_alignment,
    kernel_drift,
    layer_shares,
    laziness,
)
from ntkrl.probe.geometry import (
    ches,
    cosine_variances,
    feature_drift,
    head_influence,
    head_sums,
    token_sums,
)
from ntkrl.softmax import Head
from tests.ntk.networks import HEADS, VOCAB, contexts, network
from tests.toys import toy_params, toy_policy

HERE = contexts(True)[0]


def test_cosine_variances_by_loops(x64):
    """oracle: cosines by double loop over pairs; their means are those of feature_measures."""
    rng = np.random.default_rng(0)
    phi = rng.normal(size=(6, 4))
    rows, groups = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 0, 0, 0, 1, 1])
    kinds = {"within_response": [], "across_responses": [], "across_prompts": []}
    for i in range(6):
        for j in range(6):
            cosine = phi[i] @ phi[j] / np.linalg.norm(phi[i]) / np.linalg.norm(phi[j])
            if rows[i] == rows[j] and i != j:
                kinds["within_response"].append(cosine)
            elif groups[i] == groups[j] and rows[i] != rows[j]:
                kinds["across_responses"].append(cosine)
            elif groups[i] != groups[j]:
                kinds["across_prompts"].append(cosine)
    given = [jnp.asarray(a) for a in (phi, rows, groups)]
    found = cosine_variances(*given)
    means = probe.feature_measures(given[0], *given)
    for kind, values in kinds.items():
        np.testing.assert_allclose(found[f"cosine_variance_{kind}"], np.var(values), rtol=1e-10)
        np.testing.assert_allclose(means[f"cosine_{kind}"], np.mean(values), rtol=1e-10)


def test_feature_drift_by_hand():
    """by hand: (3, 4) from (0, 5): moved √10 of 5, cosine 20/25; and (2, 0) from (1, 0)."""
    found = feature_drift(jnp.array([[3.0, 4.0], [2.0, 0.0]]), jnp.array([[0.0, 5.0], [1.0, 0.0]]))
    expected = {
        "feature_distortion_relative": (np.sqrt(10) / 5 + 1) / 2,
        "feature_cosine_start": (0.8 + 1) / 2,
        "feature_norm_ratio": (1 + 2) / 2,
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6)


def test_ches_by_hand():
    """by hand: Σφ⁺ = (2, 2) of two tokens, Σφ⁻ = (3, 0) of one: 6 − 8, and ⟨(1, 1), (3, 0)⟩ − 2."""
    chosen = jnp.array([[[1.0, 0.0], [1.0, 2.0], [9.0, 9.0]]])
    rejected = jnp.array([[[3.0, 0.0], [9.0, 9.0]]])
    masks = jnp.array([[True, True, False]]), jnp.array([[True, False]])
    raw, normalised = ches(chosen, masks[0], rejected, masks[1])
    assert raw.tolist() == [-2.0] and normalised.tolist() == [1.0]


@pytest.mark.parametrize("kind,chunk", [("plain", None), ("all", 4)])
def test_head_influence_is_the_head_kernel(x64, kind, chunk):
    """oracle: g_oᵀ R g_u with R and logits written out; tiles of 4 of 9 rows overlap."""
    described, params = network(kind, False)
    kernel = ntk.kernel(described, params, HERE)
    phi = kernel.problem.head_inputs[0].features
    y = jnp.array([1, 5, 8])
    logits = described.logits(params, phi)
    g = np.eye(VOCAB)[y] - np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    given = HEADS[kind]
    bias = params["head_bias"] if "bias" in given else None
    settings = {name: given[name] for name in given if name != "bias"}
    head = Head(params["head"], bias, **settings)
    found = head_influence(head, (phi, y), (phi[:2], y[:2]), chunk)
    expected = np.einsum("ov,ouvw,uw->ou", g, kernel.dense("head"), g)[:, :2]
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("kind,chunk", [("plain", None), ("all", 4)])
def test_head_sums_are_sums_of_pairs(x64, kind, chunk):
    """law: sums without pairs are the pairs' sums; a temperature is a scale of the logits."""
    described, params = network(kind, False)
    phi = ntk.kernel(described, params, HERE).readings[0].features
    given = HEADS[kind]
    bias = params["head_bias"] if "bias" in given else None
    head = Head(params["head"], bias, **{name: given[name] for name in given if name != "bias"})
    y, weights = jnp.array([1, 5, 8]), jnp.array([[1.0, 0.0], [-2.0, 0.0], [0.5, 3.0]])
    pairs = head_influence(head, (phi, y), (phi, y))
    found = head_sums(head, phi, y, weights, 1.0, chunk)
    np.testing.assert_allclose(found, pairs @ weights, rtol=1e-10)
    if head.soft_cap is None:
        warm = dataclasses.replace(head, scale=head.scale / 2.0)
        found = head_sums(head, phi, y, weights, 2.0, chunk)
        np.testing.assert_allclose(found, head_sums(warm, phi, y, weights), rtol=1e-10)


def test_group_measures_by_pairs(x64):
    """oracle: two prompts of three completions; the second has equal advantages and no pair."""
    rng = np.random.default_rng(3)
    phi, y = rng.normal(size=(6, 2, 4)), rng.integers(0, 5, (6, 2))
    mask = np.array([[1, 1], [1, 0], [1, 1], [1, 1], [1, 1], [1, 0]], bool)
    each = np.array([1.0, -2.0, 0.5, 3.0, 3.0, 3.0])
    head = Head(jnp.asarray(rng.normal(size=(5, 4))))
    given = (jnp.asarray(leaf) for leaf in (phi, y, np.repeat(each[:, None], 2, 1), mask))
    found = group_measures(head, *given, 3)
    plain, scaled = ches(phi[:1], mask[:1], phi[1:2], mask[1:2])
    assert float(found["probe/ches"]) == pytest.approx(float(plain[0]))
    assert float(found["probe/ches_normalised"]) == pytest.approx(float(scaled[0]))
    rows, columns = np.nonzero(mask)
    own = jnp.asarray(phi[rows, columns]), jnp.asarray(y[rows, columns])
    influence, a = head_influence(head, own, own), jnp.asarray(each[rows])
    sums = token_sums(influence, a, rows // 3, rows // 3)
    for sign in ("positive", "negative"):
        wanted = float(jnp.mean(sums[sign][a > 0]))
        assert float(found[f"probe/head_sum_{sign}"]) == pytest.approx(wanted)
    spill = token_sums(influence, jnp.sign(a), rows // 3, rows // 3)["positive"][a < 0]
    assert float(found["probe/head_sum_wrong"]) == pytest.approx(float(jnp.mean(spill)))


def test_token_sums_by_hand():
    """by hand: of three updated tokens the last is of another prompt, the first has A > 0."""
    influence = jnp.array([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    found = token_sums(
        influence, jnp.array([2.0, -3.0, 1.0]), jnp.array([0, 1]), jnp.array([0, 0, 1])
    )
    assert found["positive"].tolist() == [2.0, 4.0]
    assert found["negative"].tolist() == [-6.0, 0.0]


def test_kernel_drift_by_hand():
    """by hand: K_0 = I, K_t = 2I + J on two contexts; centring leaves multiples of I − J/2."""
    eye, ones = np.eye(2), np.ones((2, 2))
    start = {"head": eye, "trace_head": 5 * eye, "trace_body": eye}
    now = {"head": 2 * eye + ones, "trace_head": 10 * eye, "trace_body": 3 * eye - ones}
    found = kernel_drift(now, start)
    assert found["body_to_head"] == pytest.approx(4 / 20)
    # I + J has norm √(2²+1+1+2²), 2I − J has √(1+1+1+1), and I has √2
    assert found["laziness_head"] == pytest.approx(np.sqrt(10 / 2))
    assert found["laziness_body"] == pytest.approx(np.sqrt(4 / 2))
    assert found["cka_head"] == found["cka_body"] == pytest.approx(1.0)


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
    whole = np.asarray(kernel.dense()).transpose(0, 2, 1, 3).reshape(stacked.size, -1)
    expected = stacked @ whole @ stacked / (np.trace(whole) * stacked @ stacked)
    gram = ntk.score_gram(described, params, HERE, y)
    squares = 1 - 2 * pi[np.arange(3), y] + np.sum(pi**2, axis=1)
    found = advantage_alignment(gram, kernel.trace(), advantages, squares)
    assert found == pytest.approx(expected, rel=1e-9)
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
    wanted = advantage_alignment(gram, kernel.trace(), advantages, squares)
    found = probe.batch_alignment(policy, params, here, y, advantages)
    assert found == pytest.approx(wanted, rel=1e-10) and 0 < found < 1
