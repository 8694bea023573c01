"""The head's norms and ranks by blocks of rows, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl.probe.parameters import classifier_measures


@pytest.mark.parametrize("block", [3, 4, 100])
def test_classifier_measures(x64, block):
    """oracle: whole matrices in numpy; blocks of 3 of 8 rows overlap, and 100 is all."""
    rng = np.random.default_rng(0)
    start = rng.normal(size=(8, 5))
    weight = start + 0.1 * rng.normal(size=(8, 5))
    found, norms = classifier_measures(jnp.asarray(weight), jnp.asarray(start), block)

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
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9)
    np.testing.assert_allclose(norms, rows, rtol=1e-12)


def test_bfloat16_is_summed_in_float32():
    """by hand: 512 rows of (1, 0); a bfloat16 sum of ones stops at 256."""
    weight = jnp.zeros((512, 2), jnp.bfloat16).at[:, 0].set(1)
    found, norms = classifier_measures(weight, jnp.zeros_like(weight), 64)
    np.testing.assert_allclose(found["head_norm"] ** 2, 512, rtol=1e-6)
    assert norms.dtype == jnp.float32


def test_no_second_copy_of_the_matrix():
    """law: by the compiler's analysis, temporaries are row norms and far below V×D.

    In float32, since the compiler for CPUs widens loops over bfloat16 as a whole.
    """
    shape = jax.ShapeDtypeStruct((65536, 16), jnp.float32)
    measured = jax.jit(lambda w, s: classifier_measures(w, s, 256))
    held = measured.lower(shape, shape).compile().memory_analysis().temp_size_in_bytes
    assert held < 65536 * 16 * 4 / 4
