"""Tests of the tables: methods in numbers, feature cosines, and the best of N."""

import json
import math

import pytest

from ntkrl.report import format_table, read_run, table_section
from ntkrl.report.runs import read_runs
from ntkrl.report.tables import best_of_table, number, similarity_table, summaries
from tests.report.conftest import write_run


@pytest.fixture
def rows(run_paths):
    """The rows of the four synthetic runs."""
    return summaries([read_run(path) for path in run_paths])


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
    """Golden: the full text, at most 100 columns, whatever the order of the runs."""
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
    """By hand: a stopped run is starred with its step; a single run has no spread."""
    metrics = run_paths[0] / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(True)[:13]))
    (run_paths[0] / "finished").unlink()
    (run_paths[0] / "timings.jsonl").unlink()
    runs = [read_run(run_paths[0]), read_run(run_paths[2])]
    _, cfrl, rl = summaries(runs)
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
    base, rl = summaries([read_run(run_paths[0])])
    assert base.reward_start.mean == pytest.approx(0.1)
    assert rl.reward_end.count == 0 and math.isnan(rl.entropy.mean) and math.isnan(rl.gain)


def test_a_noise_that_was_not_measured_is_not_printed(run_paths):
    """by hand: 0 of one sampling and an absent figure give neither ± nor Δ/noise."""
    for change in (lambda line: line | {"eval/reward_sd": 0.0}, lambda line: line):
        metrics = run_paths[0] / "metrics.jsonl"
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        rows = [{n: v for n, v in row.items() if n != "eval/reward_sd"} for row in rows]
        metrics.write_text("".join(json.dumps(change(row)) + "\n" for row in rows))
        base, _ = summaries([read_run(run_paths[0])])
        assert math.isnan(base.noise)
        text = format_table([read_run(run_paths[0])])
        assert "± 0" not in text and "noise  " not in text.splitlines()[3]


def test_number_by_hand():
    """By hand: six characters at most, rounding included."""
    texts = {0.0: "0.000", 9.9996: "10.00", -3.14159: "−3.142", 999.96: "1000", math.nan: "–"}
    texts |= {99.9951: "100.0", 12345.6: "12346", -9.87: "−9.870", 1e7: "1e+07"}
    assert {value: number(value) for value in texts} == texts


def _with_lines(path, change):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        change(line)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_cosines_at_the_start_and_at_the_last_probe(tmp_path):
    """by hand: base is the mean at step 0, a method's row the mean of its runs' last probes."""
    for seed, moved in ((0, 0.1), (1, 0.3)):
        path = write_run(tmp_path / f"rl-{seed}", "rl", seed)

        def change(line, moved=moved):
            if "probe/cosine_within_response" in line and line["step"] > 0:
                line["probe/cosine_within_response"] = 0.5 + moved
            if "probe/cosine_within_response" in line:
                line["probe/cosine_variance_within_response"] = 0.25 + line["step"]

        _with_lines(path, change)
    result = similarity_table(read_runs([tmp_path / "rl-0", tmp_path / "rl-1"]))
    assert result.rows == (
        ("base", "0.800", "0.250", "0.700", "–", "0.600", "–"),
        ("rl", "0.700", "20.25", "0.700", "–", "0.600", "–"),
    )
    assert result.heads[1:3] == ("same response, mean", "same response, variance")


def test_best_of_several_counts(tmp_path):
    """by hand: before is after less the gap; counts in their order, other evaluations left out."""
    path = write_run(tmp_path / "a", "<rl>", 3)
    metrics = {"eval/reward": 0.5}
    for count, level, gap in ((1, 0.5, 0.25), (2, 0.75, 0.125), (10, 1.0, 0.0)):
        metrics[f"diversity/best_of_{count}"] = level
        metrics[f"diversity/gap_best_of_{count}"] = gap
        metrics[f"diversity/gap_best_of_{count}_low"] = gap - 0.5
        metrics[f"diversity/gap_best_of_{count}_high"] = gap + 0.5
    (path / "evaluations").mkdir(exist_ok=True)
    (path / "evaluations" / "test.json").write_text(json.dumps(metrics))
    (path / "evaluations" / "alone.json").write_text(json.dumps({"diversity/best_of_1": 9.0}))
    result = best_of_table(read_runs([path]))
    assert result.heads == ("mean largest reward of", "1 sample", "2 samples", "10 samples")
    assert result.rows == (
        ("<rl>, seed 3: test, before", "0.250", "0.625", "1.000"),
        ("<rl>, seed 3: test, after", "0.500", "0.750", "1.000"),
        (
            "<rl>, seed 3: test, gap",
            "0.250 (−0.250 to 0.750)",
            "0.125 (−0.375 to 0.625)",
            "0.000 (−0.500 to 0.500)",
        ),
    )
    page = table_section(result)
    assert "<h2>Best of N</h2>" in page and "&lt;rl&gt;, seed 3" in page and "<rl>" not in page


def test_a_run_that_was_probed_once_has_no_end(tmp_path):
    """by hand: the starting model's numbers are not a method's, nor the other way round."""
    path = write_run(tmp_path / "a", "rl", 0)
    last = [0]

    def change(line):
        if line["step"] not in last:
            for name in [name for name in line if name.startswith("probe/cosine")]:
                del line[name]

    _with_lines(path, change)
    cells = ("0.800", "–", "0.700", "–", "0.600", "–")
    assert similarity_table(read_runs([path])).rows == (("base", *cells), ("rl", *("–",) * 6))
    other = write_run(tmp_path / "b", "rl", 0)
    last = [20]
    _with_lines(other, change)
    assert similarity_table(read_runs([other])).rows == (("base", *("–",) * 6), ("rl", *cells))


@pytest.mark.parametrize("kept", [("reward",), ()])
def test_runs_without_numbers_get_no_table(tmp_path, kept):
    """law: a table of dashes has no information."""
    path = write_run(tmp_path / "a", "rl", 0)

    def change(line):
        for name in [name for name in line if name not in ("step", *kept)]:
            del line[name]

    _with_lines(path, change)
    runs = read_runs([path])
    assert similarity_table(runs) is None and best_of_table(runs) is None
