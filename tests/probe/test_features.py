"""Geometry of features, and sums over the head kernel, by loops and dense kernels."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl import ntk, probe
from ntkrl.probe.features import (
    ches,
    completion_cosines,
    cosine_variances,
    feature_drift,
    head_sums,
)
from ntkrl.softmax import OutputHead, SoftmaxOptions
from tests.ntk.networks import HEADS, VOCAB, contexts, network

HERE = contexts(True)[0]


def test_feature_measures_by_loops():
    """oracle: cosines by double loop over pairs, rank and drift in numpy."""
    rng = np.random.default_rng(0)
    phi, start = rng.normal(size=(6, 4)), rng.normal(size=(6, 4))
    rows, groups = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 0, 0, 0, 1, 1])
    result = probe.feature_measures(*map(jnp.asarray, (phi, start, rows, groups)))
    kinds = {"within_response": [], "across_responses": [], "across_prompts": []}
    positive = []
    for i in range(6):
        for j in range(6):
            if i == j:
                continue
            cosine = phi[i] @ phi[j] / np.linalg.norm(phi[i]) / np.linalg.norm(phi[j])
            positive.append(cosine > 0)
            if rows[i] == rows[j]:
                kinds["within_response"].append(cosine)
            elif groups[i] == groups[j]:
                kinds["across_responses"].append(cosine)
            else:
                kinds["across_prompts"].append(cosine)
    for name, values in kinds.items():
        assert len(values) > 0
        np.testing.assert_allclose(result[f"cosine_{name}"], np.mean(values), rtol=1e-5)
    np.testing.assert_allclose(result["positive_pairs"], np.mean(positive), rtol=1e-5)
    values = np.linalg.eigvalsh(phi @ phi.T)
    np.testing.assert_allclose(
        result["effective_rank"], values.sum() ** 2 / (values**2).sum(), rtol=1e-4
    )
    drift = np.linalg.norm(phi - start, axis=1).mean()
    np.testing.assert_allclose(result["feature_distortion"], drift, rtol=1e-5)


def test_equal_features_have_cosine_one_and_rank_one():
    """by hand: six copies of one vector."""
    phi = jnp.ones((6, 4))
    result = probe.feature_measures(phi, phi, jnp.arange(6) // 2, jnp.arange(6) // 4)
    for name in ("cosine_within_response", "cosine_across_prompts", "effective_rank"):
        np.testing.assert_allclose(result[name], 1.0, rtol=1e-5)
    assert float(result["feature_distortion"]) == 0.0


def test_completion_cosines_by_loops(x64):
    """oracle: double loop over pairs; exactly 0 for a completion of one token, and of none."""
    rows, completions = np.array([0, 0, *range(1, 20), 20, 20, 20]), 22
    phi = np.random.default_rng(0).normal(size=(rows.size, 40))
    unit = phi / np.linalg.norm(phi, axis=1, keepdims=True)
    expected = np.zeros((completions, completions))
    for s in range(completions):
        for t in range(completions):
            pairs = [
                unit[i] @ unit[j]
                for i in np.flatnonzero(rows == s)
                for j in np.flatnonzero(rows == t)
                if i != j
            ]
            expected[s, t] = np.mean(pairs) if pairs else 0.0
    result = np.asarray(completion_cosines(jnp.asarray(phi), jnp.asarray(rows), completions))
    np.testing.assert_allclose(result, expected, rtol=1e-10)
    assert (result[expected == 0] == 0).all()


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
    arrays = [jnp.asarray(a) for a in (phi, rows, groups)]
    result = cosine_variances(*arrays)
    means = probe.feature_measures(arrays[0], *arrays)
    for kind, values in kinds.items():
        np.testing.assert_allclose(result[f"cosine_variance_{kind}"], np.var(values), rtol=1e-10)
        np.testing.assert_allclose(means[f"cosine_{kind}"], np.mean(values), rtol=1e-10)


def test_feature_drift_by_hand():
    """by hand: (3, 4) from (0, 5): moved √10 of 5, cosine 20/25; and (2, 0) from (1, 0)."""
    result = feature_drift(jnp.array([[3.0, 4.0], [2.0, 0.0]]), jnp.array([[0.0, 5.0], [1.0, 0.0]]))
    expected = {
        "feature_distortion_relative": (np.sqrt(10) / 5 + 1) / 2,
        "feature_cosine_start": (0.8 + 1) / 2,
        "feature_norm_ratio": (1 + 2) / 2,
    }
    assert set(result) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, rtol=1e-6)


def test_ches_by_hand():
    """by hand: Σφ⁺ = (2, 2) of two tokens, Σφ⁻ = (3, 0) of one: 6 − 8, and ⟨(1, 1), (3, 0)⟩ − 2."""
    chosen = jnp.array([[[1.0, 0.0], [1.0, 2.0], [9.0, 9.0]]])
    rejected = jnp.array([[[3.0, 0.0], [9.0, 9.0]]])
    masks = jnp.array([[True, True, False]]), jnp.array([[True, False]])
    raw, normalised = ches(chosen, masks[0], rejected, masks[1])
    assert raw.tolist() == [-2.0] and normalised.tolist() == [1.0]


@pytest.mark.parametrize("kind,chunk", [("plain", None), ("all", 4)])
def test_head_sums_are_sums_of_pairs(x64, kind, chunk):
    """oracle: Σ_u w_u g_oᵀ R g_u, R and logits written out; law: a temperature scales logits."""
    described, params = network(kind, False)
    kernel = ntk.kernel(described, params, HERE)
    phi = kernel.problem.head_inputs[0].features
    options = HEADS[kind]
    bias = params["head_bias"] if "bias" in options else None
    head = OutputHead(
        params["head"], bias, **{name: options[name] for name in options if name != "bias"}
    )
    y, weights = jnp.array([1, 5, 8]), jnp.array([[1.0, 0.0], [-2.0, 0.0], [0.5, 3.0]])
    logits = described.logits(params, phi)
    g = np.eye(VOCAB)[y] - np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    pairs = np.einsum("ov,ouvw,uw->ou", g, kernel.dense("head"), g)
    result = head_sums(head, phi, y, weights, SoftmaxOptions(1.0, chunk_vocabulary=chunk))
    np.testing.assert_allclose(result, pairs @ weights, rtol=1e-10)
    if head.soft_cap is None:
        warm = dataclasses.replace(head, scale=head.scale / 2.0)
        result = head_sums(head, phi, y, weights, SoftmaxOptions(2.0, chunk_vocabulary=chunk))
        np.testing.assert_allclose(result, head_sums(warm, phi, y, weights), rtol=1e-10)
