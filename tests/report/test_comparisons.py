"""Tests of methods against each other."""

import json

import pytest

from ntkrl.report import read_run, table_section
from ntkrl.report.comparisons import comparison_table, comparisons
from tests.report.conftest import write_run


def _edit(path, name, change):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if name in line:
            line[name] = change(line["step"], line[name])
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _of(listed, metric):
    (comparison,) = [comparison for comparison in listed if comparison.metric == metric]
    return comparison


def test_pairs_by_hand(run_paths):
    """By hand: paired seeds: gaps of 0.3 and 0.1 give 0.2, p 2/4, whatever the seeds' levels."""
    for path, gap in zip(run_paths[:2], (0.3, 0.1), strict=True):
        _edit(path, "eval/reward", lambda step, value, gap=gap: value + gap * (step > 0))
    comparison = _of(comparisons([read_run(path) for path in run_paths]), "eval/reward")
    assert (comparison.first, comparison.second, comparison.seeds) == ("cfrl", "rl", 2)
    assert comparison.test.difference == pytest.approx(0.2)
    assert (comparison.test.low, comparison.test.high) == pytest.approx((0.1, 0.3))
    assert comparison.test.p_value == 0.5 and comparison.test.exact


@pytest.mark.parametrize("stopped", [0, 2])
def test_last_common_step_by_hand(run_paths, stopped):
    """By hand: a run that stopped at step 10 is compared with the other at step 10, not at 0."""
    metrics = run_paths[stopped] / "metrics.jsonl"
    lines = metrics.read_text().splitlines(True)
    metrics.write_text("".join(lines[:13]))
    runs = [read_run(path) for path in run_paths]
    assert _of(comparisons(runs), "eval/reward").test.difference == pytest.approx(0.0)
    assert _of(comparisons(runs), "probe/entropy").test.difference == pytest.approx(0.0)
    metrics.write_text(lines[0])
    comparison = _of(comparisons([read_run(path) for path in run_paths]), "eval/reward")
    assert comparison.seeds == 1 and comparison.test is None


def test_too_few_seeds_are_said(run_paths, tmp_path):
    """By hand: one seed in common, or one that is there twice, gives words and no test."""
    runs = [read_run(path) for path in (run_paths[0], *run_paths[2:])]
    result = comparisons(runs)
    assert result and all(
        comparison.test is None and comparison.seeds == 1 for comparison in result
    )
    (note,) = comparison_table(runs).notes
    assert note.startswith("rl and cfrl: too few seeds, 1 seed in common; a test needs two")
    section = table_section(comparison_table(runs))
    assert "too few seeds" in section and "<table>" not in section
    again = write_run(tmp_path / "again", "rl", 0)
    runs = [read_run(path) for path in (*run_paths, again)]
    assert {comparison.seeds for comparison in comparisons(runs)} == {1}
    assert comparison_table(runs[:2]) is None


def test_section_by_hand(run_paths):
    """By hand: a row per metric that both have, and the number of tests."""
    section = table_section(comparison_table([read_run(path) for path in run_paths]))
    assert section.count('<th scope="row">rl − cfrl</th>') == 9
    assert "for there being 9 of these tests" in section
    cells = "<td>held-out reward</td><td>2</td><td>0.000</td><td>0.000 to 0.000</td><td>1</td>"
    assert cells in section
