"""Shift and scale of rewards from a file of precomputed ones."""

import json

import numpy as np
import pytest

from ntkrl.reward import RewardFunction, RewardSet, read_normalisation, write_rewards


def test_by_hand(tmp_path):
    """by hand: mean 2, unbiased variance 4 of (0, 2, 4, null); a reward of 6 becomes 2."""
    path = tmp_path / "rewards.json"
    write_rewards(path, {"armo": np.array([0.0, 2.0, 4.0, np.nan])})
    (shift, scale), *_ = read_normalisation(path).values()
    assert (shift, scale) == (2.0, np.sqrt(4.0 + 1e-8))
    function = RewardFunction("armo", lambda completions: [6.0, 2.0], 3.0, None, shift, scale)
    result = RewardSet((function,))(["p", "p"], ["a", "b"], [[1], [1]], {})
    np.testing.assert_allclose(result.rewards, [6.0, 0.0], rtol=1e-6)
    # metrics keep the function's own numbers
    np.testing.assert_array_equal(result.per_function["armo"], [6.0, 2.0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "has no rewards"),
        (json.dumps({"rewards": {"a": [1.0]}}), "'a' needs at least two finite rewards"),
        (json.dumps({"rewards": {"a": 3}}), "'a' needs at least two finite rewards"),
    ],
)
def test_files_that_do_not_serve(tmp_path, content, message):
    path = tmp_path / "rewards.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_normalisation(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_normalisation(tmp_path / "none.json")
