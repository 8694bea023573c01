"""Parameter changes against SVD, polyfit and full matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl.probe import parameters
from ntkrl.probe.parameters import (
    classifier_measures,
    direction_cosine,
    extend_line,
    leading_direction,
    line_fit,
    start_line,
    update_rank,
    update_ranks,
    update_sparsity,
)


def test_sparsity_by_hand():
    """by hand: bfloat16 has 8 bits, so 1 + 1/512 rounds to 1 and 1 + 1/64 does not.

    Of 4 + 2 entries two are visible; three are within 1e-3 (none of them visible), and all of the
    scalar's leaf.
    """
    before = {"a": jnp.ones((2, 2)), "b": jnp.ones(2)}
    after = {"a": 1 + jnp.array([[1 / 512, 1 / 64], [0.0, 0.0]]), "b": 1 + jnp.array([1.0, 1e-4])}
    result = update_sparsity(before, after, 1e-3)
    np.testing.assert_allclose(result["bf16_visible"], 2 / 6, rtol=1e-6)
    np.testing.assert_allclose(result["unchanged"], 3 / 6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(6, 4), (3, 8)])
def test_rank_by_svd(x64, shape):
    """oracle: singular values and vectors of numpy."""
    change = np.random.default_rng(1).normal(size=shape) * 1e-6
    left, values, right = np.linalg.svd(change)
    lead = leading_direction(jnp.asarray(change))
    result = update_rank(jnp.asarray(change), lead)
    squares = values**2
    expected = {
        "change_norm": np.sqrt(squares.sum()),
        "stable_rank": squares.sum() / squares[0],
        "effective_rank": squares.sum() ** 2 / (squares**2).sum(),
        "leading_energy": squares[0] / squares.sum(),
    }
    assert set(result) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, rtol=1e-9)
    np.testing.assert_allclose(abs(lead.left @ left[:, 0]), 1.0, rtol=1e-9)
    np.testing.assert_allclose(abs(lead.right @ right[0]), 1.0, rtol=1e-9)
    assert float(lead.left @ change @ lead.right) > 0


def test_one_direction_in_single_precision():
    """by hand: 1e-12 u vᵀ has rank 1 by every count, though its fourth powers underflow."""
    u, v = jnp.array([3.0, 4.0]) / 5, jnp.array([1.0, 2.0, 2.0]) / 3
    change = 1e-12 * u[:, None] * v[None]
    lead = leading_direction(change)
    result = update_rank(change, lead)
    for name in ("stable_rank", "effective_rank", "leading_energy"):
        np.testing.assert_allclose(result[name], 1.0, rtol=1e-5)
    # the opposite step has the same u and v up to sign, and cosine −1
    np.testing.assert_allclose(direction_cosine(lead, leading_direction(-change)), -1, rtol=1e-5)
    turned = leading_direction(1e-12 * u[:, None] * jnp.array([[2.0, -1.0, 0.0]]))
    np.testing.assert_allclose(direction_cosine(lead, turned), 0.0, atol=1e-5)
    assert float(leading_direction(jnp.zeros((2, 3))).value) == 0.0


def test_line_fit_by_polyfit(x64):
    """oracle: R² of each of four entries by numpy's polyfit; steps apart by unequal gaps."""
    rng = np.random.default_rng(2)
    steps = np.array([10.0, 30.0, 40.0, 80.0, 100.0])
    path = 50 + np.stack([3 * steps, rng.normal(size=5), steps**2 / 20, np.zeros(5)], axis=1)
    sums = None
    for step, point in zip(steps, path, strict=True):
        tree = {"a": jnp.asarray(point[:3]), "b": jnp.asarray(point[3])}
        sums = start_line(tree, step) if sums is None else extend_line(sums, tree, step)
    fits, scalars = line_fit(sums)
    expected, left, total_square = [], 0.0, 0.0
    for w in path.T[:3]:
        residual = w - np.polyval(np.polyfit(steps, w, 1), steps)
        total = np.sum((w - w.mean()) ** 2)
        expected.append(1 - np.sum(residual**2) / total)
        left, total_square = left + np.sum(residual**2), total_square + total
    np.testing.assert_allclose(fits["a"], expected, rtol=1e-9)
    assert float(fits["b"]) == 0.0
    # the entry that never moved is no part of the mean; it would give 3/4 of this
    np.testing.assert_allclose(scalars["linearity"], np.mean(expected), rtol=1e-7)
    np.testing.assert_allclose(scalars["linearity_pooled"], 1 - left / total_square, rtol=1e-9)


def test_ranks_of_stacked_matrices():
    """law: of a stack the mean over its matrices; vectors are left out."""
    rng = np.random.default_rng(5)
    before = {"stack": jnp.asarray(rng.normal(size=(2, 4, 3))), "bias": jnp.zeros(4)}
    after = {"stack": before["stack"] + 0.1 * rng.normal(size=(2, 4, 3)), "bias": jnp.ones(4)}
    result, leading = update_ranks(before, after)
    assert set(result) == set(leading) == {"stack"}
    moved = np.asarray(after["stack"] - before["stack"])
    squares = np.linalg.svd(moved, compute_uv=False) ** 2
    expected = {
        "change_norm": np.sqrt(squares.sum(axis=1)),
        "stable_rank": squares.sum(axis=1) / squares[:, 0],
        "effective_rank": squares.sum(axis=1) ** 2 / (squares**2).sum(axis=1),
        "leading_energy": squares[:, 0] / squares.sum(axis=1),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(result["stack"][name], values.mean(), rtol=1e-4)
    turned = leading["stack"].left.at[1].multiply(-1)
    cosines = jax.vmap(direction_cosine)(leading["stack"], leading["stack"]._replace(left=turned))
    np.testing.assert_allclose(cosines, [1, -1], rtol=1e-5)


def test_the_same_entries_every_time():
    """by hand: evenly spread over all leaves, all of them where there are few."""
    few = {"a": jnp.arange(3.0), "b": 3.0 + jnp.arange(4.0).reshape(2, 2)}
    assert parameters.sample_entries(few).tolist() == list(range(7))
    many = {"a": jnp.arange(3e4).reshape(3, -1), "b": 3e4 + jnp.arange(1e4)}
    result = np.asarray(parameters.sample_entries(many))
    assert len(result) == parameters.ENTRIES and result[0] == 0 and result[-1] == 4e4 - 1
    gaps = np.diff(result)
    assert gaps.min() >= 9 and gaps.max() <= 10


@pytest.mark.parametrize("block", [3, 4, 100])
def test_classifier_measures(x64, block):
    """oracle: full matrices in numpy; blocks of 3 of 8 rows overlap, and 100 is all."""
    rng = np.random.default_rng(0)
    start = rng.normal(size=(8, 5))
    weight = start + 0.1 * rng.normal(size=(8, 5))
    result = classifier_measures(jnp.asarray(weight), jnp.asarray(start), block)

    def stable_rank(matrix):
        return np.sum(matrix**2) / np.linalg.norm(matrix, 2) ** 2

    rows = np.linalg.norm(weight, axis=1)
    expected = {
        "head_norm": np.linalg.norm(weight),
        "head_distance": np.linalg.norm(weight - start),
        "head_row_norm": rows.mean(),
        "head_row_norm_max": rows.max(),
        "head_stable_rank": stable_rank(weight),
        "head_distance_stable_rank": stable_rank(weight - start),
    }
    assert set(result) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, rtol=1e-9)


def test_bfloat16_is_summed_in_float32():
    """by hand: 512 rows of (1, 0); a bfloat16 sum of ones stops at 256."""
    weight = jnp.zeros((512, 2), jnp.bfloat16).at[:, 0].set(1)
    result = classifier_measures(weight, jnp.zeros_like(weight), 64)
    np.testing.assert_allclose(result["head_norm"] ** 2, 512, rtol=1e-6)
    assert result["head_row_norm"].dtype == jnp.float32


def test_no_second_copy_of_the_matrix():
    """law: by the compiler's analysis, temporaries are row norms and far below V×D.

    In float32, since the compiler for CPUs widens loops over bfloat16 as a whole.
    """
    shape = jax.ShapeDtypeStruct((65536, 16), jnp.float32)
    measured = jax.jit(lambda w, s: classifier_measures(w, s, 256))
    temporary = measured.lower(shape, shape).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 65536 * 16 * 4 / 4
