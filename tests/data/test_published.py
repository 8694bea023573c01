"""Formats in which data sets are published: the files and rows read, and errors."""

import decimal
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from ntkrl.data.prompts import read_set
from ntkrl.data.published import files_of, read_rows

TURN = [{"role": "user", "content": "a"}]
ROWS = [{"prompt": TURN, "score": 0.5}, {"prompt": TURN, "score": None}]


def _table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def _shard(directory, split, number, count, rows, end=""):
    return _table(directory / f"{split}-{number:05d}-of-{count:05d}{end}.parquet", rows)


def _objects(path):
    return [row for _, row in read_rows(path).rows]


def test_a_list_of_objects_and_a_table(tmp_path):
    """by hand: the same rows from either, columns and absences kept."""
    listed = tmp_path / "rows.json"
    listed.write_text(json.dumps(ROWS))
    for path in (listed, _table(tmp_path / "rows.parquet", ROWS)):
        result = read_set(path)
        assert result.prompts == (TURN, TURN) and result.columns == {"score": [0.5, None]}
        assert result.source == str(path)


def test_saved_datasets_are_read_as_their_library_reads_them(tmp_path):
    """oracle: `datasets`, for a split in several files and one that was a selection."""
    import datasets

    rows = [
        {"prompt": str(i), "chosen": [{"role": "assistant", "content": "x" * i}]} for i in range(7)
    ]
    dataset = datasets.Dataset.from_list(rows)
    saved = datasets.DatasetDict(
        {"train_prefs": dataset, "test_prefs": dataset.shuffle(seed=1).select([4, 2, 0])}
    )
    saved.save_to_disk(tmp_path / "saved", num_shards={"train_prefs": 3, "test_prefs": 1})
    assert len(files_of(tmp_path / "saved" / "train_prefs")) == 3
    for split in saved:
        result = _objects(tmp_path / "saved" / split)
        assert result == datasets.load_from_disk(tmp_path / "saved" / split).to_list()
    with pytest.raises(
        ValueError, match=r"several splits; give one of .*test_prefs, .*train_prefs"
    ):
        read_rows(tmp_path / "saved")


def test_splits_by_name(tmp_path):
    """by hand: shards in a folder in order, old names with a hash, a folder of tables, JSON."""
    for number in (1, 0):
        _shard(tmp_path / "data", "train_prefs", number, 2, [{"n": number}])
    _shard(tmp_path / "data", "test_prefs", 0, 1, [{"n": 2}], "-6effd6ab7e")
    assert [row["n"] for row in _objects(tmp_path / "train_prefs")] == [0, 1]
    assert read_rows(tmp_path / "train_prefs").source == str(tmp_path / "train_prefs")
    assert _objects(tmp_path / "test_prefs") == [{"n": 2}]
    for number in (1, 0):
        _table(tmp_path / "converted" / "sft" / f"{number:04d}.parquet", [{"n": 3 + number}])
    assert _objects(tmp_path / "sft") == [{"n": 3}, {"n": 4}]
    (tmp_path / "alpaca").mkdir()
    (tmp_path / "alpaca" / "val.json").write_text('[{"n": 4}]')
    assert _objects(tmp_path / "val") == [{"n": 4}]
    # other splits beside it are no part of one
    with pytest.raises(
        ValueError, match=r"several splits; give one of .*test_prefs, .*train_prefs"
    ):
        read_rows(tmp_path / "data")
    with pytest.raises(
        ValueError, match=r"no such file. .* has .*sft, test_prefs, train_prefs, val"
    ):
        read_rows(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"train: no such file; did you mean .*/train_prefs\?"):
        read_rows(tmp_path / "train")
    with pytest.raises(ValueError, match=r"is a directory; give one of .*sft"):
        read_rows(tmp_path)
    (tmp_path / "val.jsonl").write_text('{"n": 5}\n')
    with pytest.raises(ValueError, match=r"is ambiguous: .*val.jsonl, .*val.json; give the path"):
        read_rows(tmp_path / "val")


def _bad_json(place):
    (place / "x.json").write_text('{"prompt": "a"}\n{"prompt": "b"}')
    return "x.json"


def _no_list(place):
    (place / "x.json").write_text('{"prompt": "a"}')
    return "x.json"


def _cut_table(place):
    path = _table(place / "x.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    return "x.parquet"


def _missing_shard(place):
    _shard(place, "train", 0, 2, ROWS)
    return "train"


def _saved(place, state, content=None):
    (place / "x").mkdir()
    (place / "outside.arrow").touch()
    (place / "x" / "state.json").write_text(json.dumps(state))
    if content is not None:
        (place / "x" / "d.arrow").write_bytes(content)
    return "x"


MISTAKES = [
    (_bad_json, "is not valid JSON .* to .jsonl"),
    (_no_list, "is dict; expected a list of objects"),
    (_cut_table, "is not a complete Parquet file .* copy it again"),
    (_missing_shard, "of the 2 shards of train only train-00000-of-00002.parquet"),
    (lambda place: _saved(place, {}), "state.json names no data files"),
    (lambda place: _saved(place, {"_data_files": [{"filename": "d.arrow"}]}), "d.arrow is missing"),
    (
        lambda place: _saved(place, {"_data_files": [{"filename": "../outside.arrow"}]}),
        "is missing",
    ),
    (lambda place: _saved(place, {"_data_files": []}), "every data file is missing"),
    (
        lambda place: _saved(place, {"_data_files": [{"filename": "d"}], "_indices_files": [1]}),
        "a selection of rows separately",
    ),
    (
        lambda place: _saved(place, {"_data_files": [{"filename": "d.arrow"}]}, b"nothing"),
        "is not a complete Arrow file",
    ),
]


@pytest.mark.parametrize(("make", "message"), MISTAKES)
def test_mistakes_are_told(tmp_path, make, message):
    """law: a sentence that names the file and the fix."""
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / make(tmp_path))


def test_wrong_rows_are_named(tmp_path):
    """by hand: rows of a list are counted from 0."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "a"}, 3, {"prompt": TURN}, {"instruction": "b"}]))
    with pytest.raises(ValueError) as caught:
        read_set(path)
    message = str(caught.value)
    assert "problems: 3" in message and f"{path} row 1: expected an object, found int" in message
    assert "row 2: mixed forms: this prompt is a list of messages, that of row 0 is text" in message
    assert "row 3: no 'prompt' (missing or null); the row has instruction" in message


def test_tables_need_pyarrow(tmp_path, monkeypatch):
    """story: the error names the extra to install when pyarrow is missing."""
    path = _table(tmp_path / "rows.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'ntkrl\[data\]'"):
        read_rows(path)


class WithoutPandas:
    """An import hook that hides pandas."""

    def find_spec(self, name, *_):
        if name.partition(".")[0] == "pandas":
            raise ImportError(name)


def test_values_without_a_python_type(tmp_path):
    """law: nanoseconds, far dates and text that is not UTF-8 disturb no other column.

    In a process of its own, since pyarrow looks for pandas once.
    """
    invalid = pa.array([b"\xff", b"a", None], pa.binary()).cast(pa.string(), safe=False)
    parquet.write_table(
        pa.table(
            {
                "prompt": ["a", "b", "c"],
                "nanoseconds": pa.array([1, None, 3], pa.timestamp("ns")),
                "years": pa.array([10**17, None, 0], pa.timestamp("ms")),
                "duration": pa.array([1, None, 0], pa.duration("ns")),
                "day": pa.array([1, None, 0], pa.time64("ns")),
                "price": pa.array([decimal.Decimal("1.50"), None, decimal.Decimal("0.1")]),
            }
        ),
        tmp_path / "rows.parquet",
    )
    parquet.write_table(pa.table({"prompt": invalid}), tmp_path / "text.parquet")
    code = (
        "import sys\n"
        "from tests.data.test_published import WithoutPandas\n"
        "sys.modules.pop('pandas', None)\n"
        "sys.meta_path.insert(0, WithoutPandas())\n"
        "from ntkrl.data import read_set\n"
        "columns = read_set('rows.parquet').columns\n"
        "for name, values in columns.items():\n"
        "    print(name, [str(value) for value in values])\n"
        "try:\n"
        "    read_set('text.parquet')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[:5] == [
        "nanoseconds ['1970-01-01T00:00:00.000000001', 'None', '1970-01-01T00:00:00.000000003']",
        "years ['3170843-11-07T09:46:40.000', 'None', '1970-01-01T00:00:00.000']",
        "duration ['1 nanoseconds', 'None', '0 nanoseconds']",
        "day ['1', 'None', '0']",
        "price ['1.50', 'None', '0.10']",
    ]
    assert "'prompt' is bytes; expected text" in run.stdout


def test_packed_files_and_patterns_of_names(tmp_path):
    """by hand: a compressed file is called that, not six lines that are no UTF-8; so is a glob."""
    (tmp_path / "rows.jsonl.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(ValueError, match=r"rows.jsonl.gz is compressed; unpack it"):
        read_rows(tmp_path / "rows.jsonl.gz")
    with pytest.raises(ValueError, match=r"\*.jsonl: no such file: names are not expanded; give"):
        read_rows(tmp_path / "*.jsonl")
