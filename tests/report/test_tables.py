"""By hand: the tables of feature cosines and of the best of N, from numbers written down."""

import json

import pytest

from ntkrl.report.runs import read_runs
from ntkrl.report.tables import as_html, best_of, similarity, tables
from tests.report.conftest import write_run


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
    found = similarity(read_runs([tmp_path / "rl-0", tmp_path / "rl-1"]))
    assert found.rows == (
        ("base", "0.800", "0.250", "0.700", "–", "0.600", "–"),
        ("rl", "0.700", "20.25", "0.700", "–", "0.600", "–"),
    )
    assert found.heads[1:3] == ("same response, mean", "same response, variance")


def test_best_of_several_counts(tmp_path):
    """by hand: before is after less the gap; counts in their order, other evaluations left out."""
    path = write_run(tmp_path / "a", "<rl>", 3)
    told = {"eval/reward": 0.5}
    for count, own, gap in ((1, 0.5, 0.25), (2, 0.75, 0.125), (10, 1.0, 0.0)):
        told[f"diversity/best_of_{count}"] = own
        told[f"diversity/gap_best_of_{count}"] = gap
        told[f"diversity/gap_best_of_{count}_low"] = gap - 0.5
        told[f"diversity/gap_best_of_{count}_high"] = gap + 0.5
    (path / "evaluations").mkdir(exist_ok=True)
    (path / "evaluations" / "test.json").write_text(json.dumps(told))
    (path / "evaluations" / "alone.json").write_text(json.dumps({"diversity/best_of_1": 9.0}))
    found = best_of(read_runs([path]))
    assert found.heads == ("mean largest reward of", "1 sample", "2 samples", "10 samples")
    assert found.rows == (
        ("<rl>, seed 3: test, before", "0.250", "0.625", "1.000"),
        ("<rl>, seed 3: test, after", "0.500", "0.750", "1.000"),
        (
            "<rl>, seed 3: test, gap",
            "0.250 (-0.250 to 0.750)",
            "0.125 (-0.375 to 0.625)",
            "0.000 (-0.500 to 0.500)",
        ),
    )
    page = as_html(found)
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
    assert similarity(read_runs([path])).rows == (("base", *cells), ("rl", *("–",) * 6))
    other = write_run(tmp_path / "b", "rl", 0)
    last = [20]
    _with_lines(other, change)
    assert similarity(read_runs([other])).rows == (("base", *("–",) * 6), ("rl", *cells))


@pytest.mark.parametrize("kept", [("reward",), ()])
def test_runs_without_numbers_get_no_table(tmp_path, kept):
    """law: a table of dashes says nothing."""
    path = write_run(tmp_path / "a", "rl", 0)

    def change(line):
        for name in [name for name in line if name not in ("step", *kept)]:
            del line[name]

    _with_lines(path, change)
    assert tables(read_runs([path])) == []
