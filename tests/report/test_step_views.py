"""Tests of the data that the page's script receives."""

import json
import re

import numpy as np
import pytest

from ntkrl.report import read_run
from ntkrl.report.page import LEAST_STEP_BYTES, step_section
from ntkrl.report.step_views import packed
from tests.report.conftest import SIZE, ledger_arrays, write_ledger


def _runs_of(section):
    (data,) = re.findall(r'id="step-data">(.*?)</script>', section)
    return json.loads(data)["runs"]


def _unpacked(packed):
    return np.array(packed["values"]) * packed["unit"]


def test_steps_by_hand(run_paths):
    """By hand: parts by role, changes by token and sums by sample, to four digits."""
    (run,) = _runs_of(step_section([read_run(run_paths[0])], LEAST_STEP_BYTES))
    assert [step["step"] for step in run["steps"]] == [5, 10]
    assert [completion["start"] for completion in run["completions"]] == [0, 10, 20, 30, 40]
    arrays, step = ledger_arrays(10), run["steps"][1]
    result = step["measures"]["log_prob"]
    assert list(result) == ["actual", "R", "G", "momentum", "decay", "optimizer", "curvature"]
    head = sum(arrays[f"log_prob/{term}/head"].sum(axis=1) for term in ("policy", "kl"))
    np.testing.assert_allclose(_unpacked(result["R"]), head, atol=6e-4 * np.abs(head).max())
    actual = arrays["log_prob/actual"]
    gap = np.abs(_unpacked(result["actual"]) - actual).max()
    assert 0 < gap < 6e-4 * np.abs(actual).max()
    # samples by advantage, falling: row 0 is the last of the four
    assert [sample["advantage"] for sample in step["samples"]] == [1.5, 0.5, -0.5, -1.5]
    terms = sum(arrays[f"log_prob/{t}/{g}"] for t in ("policy", "kl") for g in ("head", "body"))
    expected = terms[:10, 3].sum()
    assert _unpacked(step["rows"][0])[0] == pytest.approx(expected, abs=1e-3)


def test_packing_by_hand():
    """By hand: a unit per array; zeros have one too."""
    assert packed(np.array([0.01234567, -2.0])) == {"unit": 1e-3, "values": [12, -2000]}
    assert packed(np.zeros(2)) == {"unit": 1.0, "values": [0, 0]}


def test_pages_stay_small(run_paths):
    """Law: with less room there are fewer seeds, then steps, then tokens, which the page states."""
    for step in range(15, 80, 5):
        write_ledger(run_paths[0], step, 0, by="group")
    runs = [read_run(path) for path in run_paths[:2]]
    all_of_them = step_section(runs, LEAST_STEP_BYTES)
    assert "2 of 2 runs with ledgers; of each at most 12 of its" in all_of_them
    steps = [step["step"] for step in _runs_of(all_of_them)[0]["steps"]]
    assert len(steps) == 12 and (steps[0], steps[-1]) == (5, 75)
    sizes = []
    for room in (30_000, 6_000, 4_500):
        section = step_section(runs, room)
        (run,) = _runs_of(section)
        assert "1 of 2 runs with ledgers (the first of each method" in section
        assert run["steps"][-1]["step"] == 75
        sizes.append(sum(len(s["measures"]["entropy"]["actual"]["values"]) for s in run["steps"]))
    assert sizes[0] > SIZE == sizes[1] > sizes[2] == 40
    assert "the last accounted step" in section and "the first 4 of them by token" in section
    assert "Left out: even one step" in step_section(runs, 0)


def test_no_ledgers_no_section(run_paths):
    """By hand: without ledgers there is nothing to show, and no script."""
    run = read_run(run_paths[0])
    run.ledgers.clear()
    assert step_section([run], LEAST_STEP_BYTES) == ""
