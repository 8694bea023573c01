"""Positions of tokens in packed rows."""

import jax.numpy as jnp
import numpy as np

from ntkrl.models.positions import segment_counts


def test_segments_count_by_hand():
    """by hand: numbers restart with a segment, and padding has none."""
    number, length = segment_counts(jnp.array([[2, 2, 2, 1, 0, 1, 0]]))
    assert number.tolist() == [[1, 2, 3, 1, 0, 2, 0]]
    assert length.tolist() == [[3, 3, 3, 2, 2, 2, 2]]


def test_segments_count_as_the_table_of_pairs():
    """oracle: the numbers are those of a T × T table of tokens of one segment, in any order."""
    segments = np.random.default_rng(0).integers(0, 5, (6, 23))
    same = segments[:, :, None] == segments[:, None, :]
    earlier = np.tril(np.ones((23, 23), bool)) & (segments > 0)[:, None, :]
    number, length = segment_counts(jnp.asarray(segments))
    np.testing.assert_array_equal(number, np.sum(same & earlier, axis=2))
    np.testing.assert_array_equal(length, np.sum(same, axis=2))
