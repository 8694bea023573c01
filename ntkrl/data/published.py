"""Rows of data sets in the forms they are published in, from this machine alone.

| path | holds |
|---|---|
| `FILE.json` | a list of objects |
| `FILE.parquet` | a table; needs the extra `data` (pyarrow), as the two below |
| `DIR` with state.json | a split that `datasets` saved (`save_to_disk`) |
| `DIR` with *.parquet | shards of one split, together |
| any other file | JSON Lines: an object per line |

`DIR/NAME` is a split NAME that lies in DIR, or in a folder of DIR, in any of these forms: where DIR
holds `data/NAME-00000-of-00002.parquet` and its sister, the two together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]+)?\.parquet")
ENDINGS = (".jsonl", ".json", ".parquet")
FORMS = "JSON Lines, .json (a list of objects), .parquet, or a directory of a saved dataset"


class Rows(NamedTuple):
    """What a path holds, unchecked.

    source: the path, for messages. unit: "line" or "row", what numbers count. rows: number and
    object. problems: number and fault of those that are no objects.
    """

    source: str
    unit: str
    rows: list[tuple[int, dict[str, Any]]]
    problems: list[tuple[int, str]]

    def place(self, number: int) -> str:
        """Name a row in messages."""
        colon = self.unit == "line"
        return f"{self.source}:{number}" if colon else f"{self.source} row {number}"


def files_of(path: str | Path) -> list[Path]:
    """Return the files that a path or a split's name stands for, in the order of their rows.

    Raises:
      ValueError: nothing there, several splits or forms of one, or shards that are missing.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _in_directory(path)
    return _split(path)


def read_rows(path: str | Path) -> Rows:
    """Read every row.

    Args:
      path: see the module; lines of JSON Lines are counted from 1, rows of the rest from 0.

    Raises:
      ValueError: what `files_of` raises, a file that is damaged or no list, or no pyarrow.
    """
    files = files_of(path)
    if files[0].suffix not in (".json", ".parquet", ".arrow"):
        return _json_lines(files[0])
    values = [value for file in files for value in READERS[file.suffix](file)]
    source = str(files[0]) if len(files) == 1 and Path(path).is_file() else str(path)
    fault = "expected an object, found "
    problems = [
        (number, fault + type(value).__name__)
        for number, value in enumerate(values)
        if not isinstance(value, dict)
    ]
    wrong = {number for number, _ in problems}
    rows = [(number, value) for number, value in enumerate(values) if number not in wrong]
    return Rows(source, "row", rows, problems)


def _in_directory(path: Path) -> list[Path]:
    if (path / "state.json").is_file():
        return _saved(path)
    if (path / "dataset_dict.json").is_file():
        splits = sorted(part.name for part in path.iterdir() if (part / "state.json").is_file())
        raise ValueError(f"{path} is a directory of several splits; {_name_one(path, splits)}.")
    tables = sorted(path.glob("*.parquet"))
    if tables:
        return _one_split(path, tables)
    inside = sorted({name for part in (path, *_folders(path)) for name in _names(part)})
    hint = f"; {_name_one(path, inside)}" if inside else ", and holds no data file"
    raise ValueError(f"{path} is a directory{hint}. Allowed are {FORMS}.")


def _name_one(path: Path, splits: Sequence[str]) -> str:
    return f"name one of {', '.join(str(path / split) for split in splits)}"


def _folders(path: Path) -> list[Path]:
    return sorted(part for part in path.iterdir() if part.is_dir())


def _names(path: Path) -> list[str]:
    """Return what splits a folder holds, by the names of files and folders."""
    found = []
    for part in path.iterdir():
        shard = SHARD.fullmatch(part.name)
        if shard:
            found.append(shard["split"])
        elif part.suffix in ENDINGS:
            found.append(part.stem)
        elif (part / "state.json").is_file() or (part.is_dir() and any(part.glob("*.parquet"))):
            found.append(part.name)
    return found


def _split(path: Path) -> list[Path]:
    """Find a split by its name in a directory or its folders."""
    directory, name = path.parent, path.name
    found: list[list[Path]] = []
    for part in (directory, *_folders(directory)) if directory.is_dir() else ():
        found += [[part / (name + end)] for end in ENDINGS if (part / (name + end)).is_file()]
        shards = [s for s in sorted(part.glob("*.parquet")) if _split_of(s) == name]
        found += [_one_split(part, shards)] if shards else []
        inner = part / name
        if inner.is_dir() and part != directory:
            found.append(_in_directory(inner))
    if len(found) > 1:
        told = ", ".join(str(files[0]) for files in found)
        raise ValueError(f"{path} may be any of {told}; name the one that is meant.")
    if not found:
        there = []
        if directory.is_dir():
            there = sorted({n for part in (directory, *_folders(directory)) for n in _names(part)})
        beside = f" {directory} holds {', '.join(there)}." if there else ""
        raise ValueError(f"{path}: no such file.{beside} Allowed are {FORMS}.")
    return found[0]


def _split_of(path: Path) -> str | None:
    shard = SHARD.fullmatch(path.name)
    return None if shard is None else shard["split"]


def _one_split(path: Path, tables: Sequence[Path]) -> list[Path]:
    """Check that tables are the whole of one split."""
    shards = [shard for table in tables if (shard := SHARD.fullmatch(table.name))]
    splits = sorted({shard["split"] for shard in shards})
    if len(splits) > 1 or (shards and len(shards) < len(tables)):
        names = [*splits, *(table.name for table in tables if _split_of(table) is None)]
        raise ValueError(f"{path} holds tables of several splits; {_name_one(path, names)}.")
    if shards:
        counts = {int(shard["count"]) for shard in shards}
        held = sorted(int(shard["number"]) for shard in shards)
        if len(counts) > 1 or held != list(range(max(counts))):
            raise ValueError(
                f"{path}: of the {max(counts)} shards of {splits[0]} there are "
                f"{', '.join(table.name for table in tables)}; copy each of them once."
            )
    return list(tables)


def _saved(path: Path) -> list[Path]:
    state = _parsed(path / "state.json")
    again = "save the dataset again with datasets' save_to_disk"
    entries = state["_data_files"] if isinstance(state, dict) and "_data_files" in state else None
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and "filename" in entry for entry in entries
    ):
        raise ValueError(f"{path / 'state.json'} names no data files; {again}.")
    if any(state[key] for key in ("_indices_files", "_indices_data_files") if key in state):
        raise ValueError(f"{path} holds a selection of its rows apart from them; {again}.")
    files = [path / str(entry["filename"]) for entry in entries]
    missing = [file.name for file in files if file.parent != path or not file.is_file()]
    if missing or not files:
        raise ValueError(f"{path}: {', '.join(missing) or 'every data file'} is missing; {again}.")
    return files


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error


def _json_list(path: Path) -> list[Any]:
    try:
        found = _parsed(path)
    except ValueError as error:
        raise ValueError(f"{error} An object per line is JSON Lines: call it .jsonl.") from error
    if not isinstance(found, list):
        raise ValueError(f"{path} holds {type(found).__name__}; expected a list of objects.")
    return found


def needed_arrow(path: Path) -> Any:
    """Return pyarrow, which only tables need.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(
            f"{path}: Parquet and saved datasets are read by pyarrow, which is not installed; "
            "pip install 'ntkrl[data]'."
        ) from error
    return pyarrow


def _parquet(path: Path) -> list[Any]:
    arrow = needed_arrow(path)
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path).read().to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no whole Parquet file ({error}); copy it again.") from error


def _stream(path: Path) -> list[Any]:
    arrow = needed_arrow(path)
    try:
        with arrow.memory_map(str(path)) as source, arrow.ipc.open_stream(source) as reader:
            return reader.read_all().to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no whole Arrow file ({error}); copy it again.") from error


READERS = {".json": _json_list, ".parquet": _parquet, ".arrow": _stream}


def _json_lines(path: Path) -> Rows:
    rows, problems = [], []
    try:
        # Windows editors put a byte-order mark first; it is no part of the first row.
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    for line, raw in enumerate(content.split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            problems.append((line, f"not UTF-8 (byte {error.start}); save the file as UTF-8"))
        except (ValueError, RecursionError) as error:
            problems.append((line, f"malformed JSON: {error}"))
        else:
            if isinstance(row, dict):
                rows.append((line, row))
            else:
                problems.append((line, f"expected a JSON object, found {type(row).__name__}"))
    return Rows(str(path), "line", rows, problems)
