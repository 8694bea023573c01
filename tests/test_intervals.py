"""Intervals and paired tests: exact ones by enumeration, drawn ones against them."""

import itertools

import numpy as np
import pytest

from ntkrl.intervals import bootstrap, mean_interval, paired_difference


def test_exact_p_value_by_enumeration():
    """oracle: all 2⁵ sign patterns of five differences."""
    a, b = np.zeros(5), np.array([0.3, 0.1, 0.4, -0.2, 0.5])
    means = [np.mean(b * signs) for signs in itertools.product((1, -1), repeat=5)]
    expected = np.mean(np.abs(means) >= abs(b.mean()) - 1e-9)
    result = paired_difference(a, b)
    assert result.exact and result.patterns == 32
    assert result.difference == pytest.approx(0.22)
    assert result.p_value == expected and 2 / 32 < expected < 1


def test_p_values_by_hand():
    """by hand: three differences of one sign give 2/8; equal values give 1; pairs, not groups."""
    assert paired_difference([1.0, 5.0, 9.0], [1.1, 5.3, 9.2]).p_value == 0.25
    assert paired_difference([1.0, 2.0], [1.0, 2.0]).p_value == 1.0
    # no sum of ±0.8 ± 0.2 ± 0.6 ± 0.7 is nearer to 0 than 0.3; floats would tell ties apart: 14
    assert paired_difference(np.zeros(4), [0.8, 0.2, -0.6, -0.7]).p_value == 16 / 16


def test_drawn_p_value_meets_the_exact_one():
    """law: 4000 drawn patterns of ten differences come within four standard errors."""
    b = np.random.default_rng(0).normal(size=10) + 0.4
    exact = paired_difference(np.zeros(10), b)
    drawn = paired_difference(np.zeros(10), b, draws=1000)
    assert exact.exact and not drawn.exact and drawn.patterns == 1000
    error = 4 * np.sqrt(exact.p_value * (1 - exact.p_value) / 1000)
    assert exact.p_value != drawn.p_value and abs(exact.p_value - drawn.p_value) < error
    # the seen pattern counts: never 0
    sure = paired_difference(np.zeros(40), np.ones(40), draws=100)
    assert sure.p_value == 1 / 101


def test_bootstrap_interval_is_near_the_normal_one():
    """oracle: mean ± 1.96 standard errors of 400 values; the level and the seed matter."""
    values = np.random.default_rng(1).normal(size=400)
    result = mean_interval(values, draws=2000)
    error = values.std() / 20
    assert result.value == values.mean()
    np.testing.assert_allclose(
        result[1:], values.mean() + 1.96 * error * np.array([-1, 1]), atol=0.25 * error
    )
    narrow = mean_interval(values, draws=2000, level=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.674 * error, rel=0.15)
    assert mean_interval(values, draws=200) == mean_interval(values, draws=200)
    assert mean_interval(values, draws=200) != mean_interval(values, draws=200, seed=1)


def test_columns_are_resampled_together():
    """law: the difference of equal columns is 0 in every resample; infinite values stay."""
    values = np.random.default_rng(2).normal(size=9)
    result = bootstrap(lambda a, b: np.mean(a - b), values, values, draws=50)
    assert result == (0.0, 0.0, 0.0)
    ends = bootstrap(lambda a: np.inf if a[0] else 1.0, np.array([0, 1]), draws=50)
    assert ends == (1.0, 1.0, np.inf)


def test_mistakes():
    """law: values that cannot be paired or resampled are refused."""
    with pytest.raises(ValueError, match=r"not \(2,\) and \(3,\)"):
        paired_difference([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match=r"equally many rows, one or more, not \[0\]"):
        mean_interval([])
    with pytest.raises(ValueError, match=r"not \[2, 3\]"):
        bootstrap(lambda a, b: 0.0, np.ones(2), np.ones(3))
