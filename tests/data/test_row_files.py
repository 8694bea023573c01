"""By hand: rows in memory, the file that holds them, and what is read from it."""

import datetime
import sys

import numpy as np
import pytest

from ntkrl import data


def test_json_lines_hold_what_json_has_a_form_for(tmp_path):
    """law: rows as read from the file, numbered as in memory; arrays and tuples become lists."""
    rows = [
        {"prompt": "ä", "n": np.int64(3), "pair": (1, 2), "x": np.ones(2), "none": None},
        {"prompt": "b", "deep": {"key": [True, 0.1]}},
    ]
    file = data.row_file(rows, "prompts")
    assert file.ending == ".jsonl" and file.rows.unit == "row" and file.rows.problems == []
    first = {"prompt": "ä", "n": 3, "pair": [1, 2], "x": [1.0, 1.0], "none": None}
    assert file.rows.rows == [(0, first), (1, rows[1])]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(file.content)
    assert [row for _, row in data.read_rows(path).rows] == [row for _, row in file.rows.rows]
    # the digest is of the rows: equal for equal rows, another for another number
    assert file.digest == data.row_file([dict(row) for row in rows], "other").digest
    assert file.digest != data.row_file([{**rows[0], "n": 4}, rows[1]], "prompts").digest


def test_parquet_holds_the_rest(tmp_path):
    """law: a date, bytes and NaN come back; the numbers of invalid rows are those of the list."""
    rows = [
        {"prompt": "a", "day": datetime.date(2024, 2, 29), "raw": b"\x00"},
        "no row",
        {"prompt": "b", "day": None, "value": float("nan")},
    ]
    file = data.row_file(rows, "prompts")
    assert file.ending == ".parquet"
    assert file.rows.problems == [(1, 'expected a dict, found str; write {"prompt": text}')]
    numbers, read = zip(*file.rows.rows, strict=True)
    assert numbers == (0, 2) and read[0]["day"] == rows[0]["day"] and read[0]["raw"] == b"\x00"
    path = tmp_path / "rows.parquet"
    path.write_bytes(file.content)
    assert repr([row for _, row in data.read_rows(path).rows]) == repr(list(read))


def test_columns_that_no_file_holds(monkeypatch):
    with pytest.raises(ValueError, match="column 'x' fits neither JSON nor Parquet"):
        data.row_file([{"prompt": "a", "x": object()}], "prompts")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="column 'day' holds date, for which JSON has no form"):
        data.row_file([{"prompt": "a", "day": datetime.date(2024, 1, 1)}], "prompts")
