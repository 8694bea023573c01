"""Scalars of a step ledger, from arrays written by hand."""

import numpy as np
import pytest

from ntkrl import attribution
from ntkrl.attribution import MEASURES
from ntkrl.report import GLOSSARY, is_known


def test_measures_by_hand():
    """by hand: Δ = (2, 0); policy of two samples, KL, momentum; shares add up to one."""
    zero = np.zeros(2)
    columns = {
        "policy/head": np.array([[1.0, 0.0], [0.0, 0.5]]),
        "policy/body": np.array([[0.0, 0.5], [0.0, 0.0]]),
        "kl/head": np.array([[-0.5, 0.0], [0.0, 0.0]]),
        "kl/body": np.zeros((2, 2)),
        **{f"{column}/{g}": zero for column in ("decay", "optimizer") for g in ("head", "body")},
        "momentum/head": np.array([0.5, 0.0]),
        "momentum/body": zero,
        "curvature": np.array([0.5, -0.5]),
        "actual": np.array([2.0, 0.0]),
    }
    arrays = {f"{measure}/{name}": value for measure in MEASURES for name, value in columns.items()}
    same = np.array([[True, False], [False, True]])
    result = attribution.ledger_measures(arrays, np.array([1.0, -1.0]), same)
    shares = {"policy": 0.75, "kl": -0.25, "momentum": 0.25, "decay": 0.0, "optimizer": 0.0}
    shares |= {"curvature": 0.25}
    assert sum(shares.values()) == 1.0
    shares |= {"head": 0.25, "body": 0.25, "positive": 0.25, "negative": 0.25}
    shares |= {"self": 0.25, "others": 0.25}
    for name, value in shares.items():
        assert result[f"ledger/{name}_share"] == pytest.approx(value, abs=1e-12), name
    assert result["ledger/curvature_size"] == pytest.approx(np.hypot(0.5, 0.5) / 2)
    assert result["ledger/self_entropy"] == pytest.approx((0.5 + 0.5) / 2)
    assert result["ledger/others_entropy"] == pytest.approx((0.5 + 0.0) / 2)
    assert result["ledger/actual_entropy"] == 1.0
    assert all(map(is_known, result))
    # terms that this step lacks
    lacking = {
        f"ledger/{t}_{kind}" for t in ("bonus", "likelihood") for kind in ("share", "entropy")
    }
    assert {name for name in GLOSSARY if name.startswith("ledger/")} == {*result} | lacking
