"""Tests of the report for a terminal."""

import json

import numpy as np
import pytest

from ntkrl.main import main
from ntkrl.report import format_text
from ntkrl.report.terminal import cut, sparkline, waterfall_lines
from tests.report.conftest import write_ledger, write_probe_set


def test_sparkline_by_hand():
    """By hand: lowest and highest block for the ends of the range, the middle for constants."""
    assert sparkline(np.array([0.0, 7.0, 3.0]), 10) == "▁█▄"
    assert sparkline(np.array([2.0, 2.0]), 10) == "▅▅"
    assert sparkline(np.arange(100.0), 8) == "▁▂▃▄▅▆▇█"


def test_waterfall_by_hand():
    """By hand: bars of −2, then +6 from there, then the remainder, 4 from 0."""
    lines = waterfall_lines({"policy R": -2.0, "momentum": 6.0, "actual": 4.0}, 31 + 7)
    assert lines == [
        "  policy R                  -2 ███",
        "  momentum                  +6 ███████",
        "  actual                    +4   █████",
    ]


def test_cut_by_hand():
    """By hand: ideographs take two columns, and the mark of a cut one."""
    assert cut("abc", 3) == "abc" and cut("abcd", 3) == "ab…"
    assert (
        cut("解答解", 6) == "解答解" and cut("解答解", 5) == "解答…" and cut("解答解", 4) == "解…"
    )


def test_text_is_complete(run_paths):
    """Story: table, tests, curves, ledgers, samples and notes, each line within the width."""
    (run_paths[0] / "finished").unlink()
    text = format_text(run_paths, 90)
    for word in ("R share and corr.", "methods seed by seed", "rl − cfrl, held-out reward: 0.000"):
        assert word in text
    assert "  held-out reward  ▁▃▅▆█  0.150 → 0.550, step 20" in text
    assert "cfrl, step 10: mean Δ log π of the probe tokens, nats" in text
    assert "rl, step 10: mean ΔH of the probe tokens, nats" in text
    assert "2+2= → sample 3 </script>" in text
    assert "rl, seed 0 (rl-0): not finished: still running or stopped" in text
    table = text.splitlines().index("methods seed by seed")
    assert max(len(line) for line in text.splitlines()[table:]) <= 90
    assert format_text(run_paths[::-1], 90) == text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_plain_characters(run_paths, encoding):
    """Law: characters outside the encoding are replaced one for one, so line lengths stay."""
    text, plain = format_text(run_paths), format_text(run_paths, encoding=encoding)
    plain.encode("ascii")
    assert [len(line) for line in plain.splitlines()] == [len(line) for line in text.splitlines()]
    assert "  held-out reward  _-+*#  0.150 > 0.550, step 20" in plain and "?" not in plain


def test_codes_for_terminals_are_taken_out(run_paths):
    """By hand: a sample that would clear the screen does not."""
    samples = [{"prompt": "p\x1b[2J", "completion": "a\tb\nc\r", "advantage": 1.0}] * 4
    write_ledger(run_paths[0], 20, 0, samples=samples)
    text = format_text(run_paths[:1])
    assert "p?[2J → a b c" in text and "\x1b" not in text and "\r" not in text


def test_missing_and_refused(run_paths):
    """Story: a run with nothing but a config is reported; different probe sets are refused."""
    write_probe_set(run_paths[1], "an0ther")
    text = format_text(run_paths[:2])
    assert "Refused: comparing these runs" in text and "of the probe tokens" not in text
    assert "probe entropy" not in text and "held-out reward" in text
    bare = run_paths[0].parent / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps({"name": "bare", "seed": 0}))
    assert "no metrics.jsonl" in " ".join(format_text([bare]).split())


def test_command(run_paths, capsys, monkeypatch):
    """Story: `ntkrl report --text` prints and writes no file; --out is refused beside it."""
    monkeypatch.setenv("COLUMNS", "80")
    before = sorted(run_paths[0].rglob("*"))
    assert main(["report", "--text", *map(str, run_paths)]) == 0
    assert "mean ΔH of the probe tokens" in capsys.readouterr().out
    assert sorted(run_paths[0].rglob("*")) == before
    assert main(["report", "--text", "--out=x", str(run_paths[0])]) == 2
    assert "--text writes no files" in capsys.readouterr().err
