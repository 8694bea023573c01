"""Tests of the comparison in numbers."""

import json
import math

import pytest

from ntkrl.report import format_table, read_run
from ntkrl.report.table import number, summary_rows


@pytest.fixture
def rows(run_paths):
    """The rows of the four synthetic runs."""
    return summary_rows([read_run(path) for path in run_paths])


def test_rows_by_hand(rows):
    """By hand: all numbers of the table from the formulas in conftest."""
    base, cfrl, rl = rows
    assert (base.label, cfrl.label, rl.label) == ("base", "cfrl", "rl")
    assert (base.runs, cfrl.runs) == (4, 2)
    # Seeds start at 0.1 and 0.2, and end 20 · 0.02 = 0.4 higher.
    assert base.reward_start.mean == pytest.approx(0.15)
    assert base.noise == pytest.approx(0.02)
    assert rl.reward_start.mean == pytest.approx(0.15)
    assert rl.reward_end.mean == pytest.approx(0.55)
    # Two values 0.1 apart: 0.1/√2 with n − 1; the population formula would give 0.05.
    assert rl.reward_end.sd == pytest.approx(0.1 / math.sqrt(2))
    assert rl.gain == pytest.approx(0.4 / 0.02)
    assert (rl.pass_at_k.mean, rl.distinct.mean) == (0.5, 3.0)
    assert rl.entropy.mean == pytest.approx(2.0 - 0.04 * 20)
    assert base.entropy.mean == pytest.approx(2.0)
    assert rl.confidence.mean == pytest.approx(0.6)
    # rl: probed at 5, 10, 15, 20, 0.25 + 0.01 · 12.5. cfrl: stage 1 ends at 8, so 10, 15, 20,
    # 0.25 + 0.01 · 15; with step 5, where the share is 1 by construction, it would be 0.55.
    assert rl.head_share.mean == pytest.approx(0.375)
    assert cfrl.head_share.mean == pytest.approx(0.40)
    assert rl.correlation.mean == pytest.approx(0.9)
    # 20 steps of 1 + 0.25 + 0.5 seconds, without 7 of probing and 9 of evaluating.
    assert rl.seconds.mean == pytest.approx(35.0)
    assert rl.end_steps == (20,) and rl.unfinished == 0


def test_format_golden(run_paths):
    """Golden: the whole text, at most 100 columns, whatever the order of the runs."""
    runs = [read_run(path) for path in run_paths]
    text = format_table(runs)
    assert text == format_table(runs[::-1])
    lines = text.splitlines()
    cells = " 0.150  0.550 ± 0.071  +20.0  0.500  3.000  1.200   0.600"
    assert lines[4] == f"cfrl    2  {cells}  0.400  0.900  35.00"
    assert lines[5] == f"rl      2  {cells}  0.375  0.900  35.00"
    assert lines[3].startswith("base    4   0.150  ± 0.020 noise      –  0.500  3.000  2.000")
    assert max(map(len, lines)) <= 100


def test_long_labels_and_wide_numbers_fit(run_paths):
    """Law: no label makes the table wider than 100 columns."""
    config = run_paths[0] / "config.json"
    config.write_text(json.dumps({"name": "n" * 120, "seed": 0}))
    metrics = run_paths[0] / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"eval/reward": 0.', '"eval/reward": -123450.'))
    lines = format_table([read_run(path) for path in run_paths]).splitlines()
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("nnn") and "…" in line for line in lines)
    assert "differ by more than noise" in " ".join(lines)


def test_what_is_not_there(run_paths):
    """By hand: a stopped run is starred and its step told; a single run has no spread."""
    metrics = run_paths[0] / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(True)[:13]))
    (run_paths[0] / "finished").unlink()
    (run_paths[0] / "timings.jsonl").unlink()
    runs = [read_run(run_paths[0]), read_run(run_paths[2])]
    _, cfrl, rl = summary_rows(runs)
    assert rl.reward_end.mean == pytest.approx(0.3) and math.isnan(rl.reward_end.sd)
    assert math.isnan(rl.seconds.mean) and cfrl.seconds.mean == pytest.approx(35.0)
    text = format_table(runs)
    assert "rl*" in text and "cfrl*" not in text
    assert "cfrl at step 20; rl at step 10" in text
    assert "not finished: rl 1 of 1" in text


def test_only_a_start(run_paths):
    """By hand: with nothing but step 0 there is a base and no end; start must not pose as it."""
    metrics = run_paths[0] / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines(True)[0])
    base, rl = summary_rows([read_run(run_paths[0])])
    assert base.reward_start.mean == pytest.approx(0.1)
    assert rl.reward_end.count == 0 and math.isnan(rl.entropy.mean) and math.isnan(rl.gain)


def test_number_by_hand():
    """By hand: six characters at most, rounding included."""
    told = {0.0: "0.000", 9.9996: "10.00", -3.14159: "-3.142", 999.96: "1000", math.nan: "–"}
    told |= {99.9951: "100.0", 12345.6: "12346", -9.87: "-9.870", 1e7: "1e+07"}
    assert {value: number(value) for value in told} == told
