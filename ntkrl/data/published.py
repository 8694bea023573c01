"""Readers of published data sets in local files.

| path | content |
|---|---|
| `FILE.json` | a list of objects |
| `FILE.parquet` | a table; needs the extra `data` (pyarrow), as the next two do |
| `DIR` with state.json | a split saved by `datasets` (`save_to_disk`) |
| `DIR` with *.parquet | all shards of one split |
| any other file | JSON Lines: an object per line |

`DIR/NAME` also names the split NAME in DIR or a subdirectory of DIR, in any of these forms, such as
the shards `DIR/data/NAME-00000-of-00002.parquet` and `DIR/data/NAME-00001-of-00002.parquet`.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ntkrl import directory_kinds
from ntkrl.json_files import parse_json
from ntkrl.messages import joined

SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]+)?\.parquet")
ENDINGS = (".jsonl", ".json", ".parquet")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz")
OTHER_TABLES = (".csv", ".tsv", ".xlsx", ".xls")
KINDS = {
    "a run directory of `ntkrl train`": directory_kinds.is_run,
    "a Hugging Face model directory": directory_kinds.is_model,
}
FORMS = "JSON Lines, .json (a list of objects), .parquet, or a directory of a saved dataset"


class Rows(NamedTuple):
    """Rows of a path before validation.

    source: the path, for messages. unit: "line" or "row", counted by the numbers. rows: number and
    object. problems: number and fault of rows that are not objects.
    """

    source: str
    unit: str
    rows: list[tuple[int, dict[str, Any]]]
    problems: list[tuple[int, str]]

    def place(self, number: int) -> str:
        """Return the name of a row for messages."""
        colon = self.unit == "line"
        return f"{self.source}:{number}" if colon else f"{self.source} row {number}"


def files_of(path: str | Path) -> list[Path]:
    """Return the files of a path or of a split's name, in the order of their rows.

    Raises:
      ValueError: no such file, several splits or forms of one, or missing shards.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _directory_files(path)
    return _named_split(path)


def read_rows(path: str | Path) -> Rows:
    """Read every row.

    Args:
      path: see the module; lines of JSON Lines count from 1, other rows from 0.

    Raises:
      ValueError: errors of `files_of`, a file that is corrupt or not a list, or no pyarrow.
    """
    files = files_of(path)
    if files[0].suffix.lower() in PACKED:
        raise ValueError(f"{files[0]} is compressed; unpack it. Allowed are {FORMS}.")
    if files[0].suffix.lower() in OTHER_TABLES:
        raise ValueError(
            f"{files[0]} is a table in a format that is not read; convert it to JSON Lines, for "
            "example by pandas: read_csv(…).to_json('prompts.jsonl', orient='records', lines=True)."
        )
    if files[0].suffix not in (".json", ".parquet", ".arrow"):
        return _json_lines(files[0])
    values = [value for file in files for value in READERS[file.suffix](file)]
    source = str(files[0]) if len(files) == 1 and Path(path).is_file() else str(path)
    rows, problems = [], []
    for number, value in enumerate(values):
        if isinstance(value, dict):
            rows.append((number, value))
        else:
            problems.append((number, f"expected an object, found {type(value).__name__}"))
    return Rows(source, "row", rows, problems)


def _directory_files(path: Path) -> list[Path]:
    if (path / "state.json").is_file():
        return _saved_files(path)
    if (path / "dataset_dict.json").is_file():
        splits = sorted(part.name for part in path.iterdir() if (part / "state.json").is_file())
        raise ValueError(f"{path} is a directory of several splits; {_choices(path, splits)}.")
    tables = sorted(path.glob("*.parquet"))
    if tables:
        return _split_shards(path, tables)
    for kind, suits in KINDS.items():
        if suits(path):
            raise ValueError(f"{path} is {kind}, not prompts. Allowed are {FORMS}.")
    splits = _all_splits(path)
    hint = f"; {_choices(path, splits)}" if splits else " without a data file"
    raise ValueError(f"{path} is a directory{hint}. Allowed are {FORMS}.")


def _choices(path: Path, splits: Sequence[str]) -> str:
    return f"give one of {', '.join(str(path / split) for split in splits)}"


def _subdirectories(path: Path) -> list[Path]:
    return sorted(part for part in path.iterdir() if part.is_dir())


def _all_splits(path: Path) -> list[str]:
    """Return the names of all splits in a directory and its subdirectories."""
    return sorted({n for part in (path, *_subdirectories(path)) for n in _split_names(part)})


def _split_names(path: Path) -> list[str]:
    """Return the names of the splits directly in a directory."""
    names = []
    for part in path.iterdir():
        shard = SHARD.fullmatch(part.name)
        if shard:
            names.append(shard["split"])
        elif part.suffix in ENDINGS:
            names.append(part.stem)
        elif (part / "state.json").is_file() or (part.is_dir() and any(part.glob("*.parquet"))):
            names.append(part.name)
    return names


def _named_split(path: Path) -> list[Path]:
    """Find a split by its name in a directory or its subdirectories."""
    directory, name = path.parent, path.name
    matches: list[list[Path]] = []
    for part in (directory, *_subdirectories(directory)) if directory.is_dir() else ():
        matches += [[part / (name + end)] for end in ENDINGS if (part / (name + end)).is_file()]
        shards = [s for s in sorted(part.glob("*.parquet")) if _split_of(s) == name]
        matches += [_split_shards(part, shards)] if shards else []
        inner = part / name
        if inner.is_dir() and part != directory:
            matches.append(_directory_files(inner))
    if len(matches) > 1:
        listed = ", ".join(str(files[0]) for files in matches)
        raise ValueError(f"{path} is ambiguous: {listed}; give the path of one.")
    if not matches:
        raise ValueError(f"{path}: no such file{_nearest_file(path)} Allowed are {FORMS}.")
    return matches[0]


def _nearest_file(path: Path) -> str:
    """Return the name in the same directory, or the split, of nearest spelling, or what is missing.

    Where a directory is missing, the names beside that are compared.
    """
    directory = path.parent
    if set("*?[") & set(path.name):
        return ": names are not expanded; give the files, separated by commas."
    if not directory.is_dir():
        return f": {directory} does not exist{_nearest_file(directory)}"
    names = sorted(part.name for part in directory.iterdir() if not part.name.startswith("."))
    splits = _all_splits(directory)
    for known in (names, splits):
        for name, of in ((path.name, known), (path.stem, [Path(each).stem for each in known])):
            near = difflib.get_close_matches(name, of, n=1, cutoff=0.6)
            if near:
                return f"; did you mean {directory / known[of.index(near[0])]}?"
    files = [name for name in names if Path(name).suffix in ENDINGS] or splits
    return f". {directory} has {joined(files, ', ')}." if files else "."


def _split_of(path: Path) -> str | None:
    shard = SHARD.fullmatch(path.name)
    return None if shard is None else shard["split"]


def _split_shards(path: Path, tables: Sequence[Path]) -> list[Path]:
    """Check that tables are all shards of one split."""
    shards = [shard for table in tables if (shard := SHARD.fullmatch(table.name))]
    splits = sorted({shard["split"] for shard in shards})
    if len(splits) > 1 or (shards and len(shards) < len(tables)):
        names = [*splits, *(table.name for table in tables if _split_of(table) is None)]
        raise ValueError(f"{path} has tables of several splits; {_choices(path, names)}.")
    if shards:
        counts = {int(shard["count"]) for shard in shards}
        numbers = sorted(int(shard["number"]) for shard in shards)
        if len(counts) > 1 or numbers != list(range(max(counts))):
            raise ValueError(
                f"{path}: of the {max(counts)} shards of {splits[0]} only "
                f"{', '.join(table.name for table in tables)} exist; copy each of them once."
            )
    return list(tables)


def _saved_files(path: Path) -> list[Path]:
    state = _read_json(path / "state.json")
    fix = "save the dataset again with datasets' save_to_disk"
    entries = state["_data_files"] if isinstance(state, dict) and "_data_files" in state else None
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and "filename" in entry for entry in entries
    ):
        raise ValueError(f"{path / 'state.json'} names no data files; {fix}.")
    if any(state[key] for key in ("_indices_files", "_indices_data_files") if key in state):
        raise ValueError(f"{path} stores a selection of rows separately; {fix}.")
    files = [path / str(entry["filename"]) for entry in entries]
    missing = [file.name for file in files if file.parent != path or not file.is_file()]
    if missing or not files:
        raise ValueError(f"{path}: {', '.join(missing) or 'every data file'} is missing; {fix}.")
    return files


def read_bytes(path: Path) -> bytes:
    """Read a file without the byte-order mark that Windows editors write.

    Raises:
      ValueError: it cannot be read.
    """
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error


def _read_json(path: Path) -> Any:
    content = read_bytes(path)
    try:
        return parse_json(content.decode("utf-8"), finite=False)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error


def _json_list(path: Path) -> list[Any]:
    try:
        values = _read_json(path)
    except ValueError as error:
        raise ValueError(f"{error} Rename a file with an object per line to .jsonl.") from error
    if not isinstance(values, list):
        raise ValueError(f"{path} is {type(values).__name__}; expected a list of objects.")
    return values


def import_pyarrow(path: str | Path) -> Any:
    """Return pyarrow; raise ValueError if it is not installed."""
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(
            f"{path}: Parquet and saved datasets are read by pyarrow, which is not installed; "
            "pip install 'ntkrl[data]'."
        ) from error
    return pyarrow


def _parquet(path: Path) -> list[Any]:
    arrow = import_pyarrow(path)
    from pyarrow import parquet

    try:
        return python_rows(parquet.ParquetFile(path).read(), path)
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is not a complete Parquet file ({error}); copy it again."
        ) from error


def python_rows(table: Any, path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of an Arrow table as Python values."""
    arrow = import_pyarrow(path)
    no_python_type = (ValueError, OverflowError, NotImplementedError, arrow.ArrowException)
    try:
        return table.to_pylist()
    except no_python_type:
        pass

    def values(name: str) -> list[Any]:
        column = table[name]
        for convert in (
            column.to_pylist,
            lambda: _numpy_values(column),  # nanoseconds, years > 9999
            lambda: column.cast("binary").to_pylist(),  # text that is not UTF-8
            lambda: column.cast("int64").to_pylist(),  # nanoseconds of a day
        ):
            try:
                return convert()
            except no_python_type:
                continue
        raise ValueError(
            f"{path}: the column {name!r} ({column.type}) has values without a Python type; "
            "install pandas, which has one for nanoseconds, or leave the column out."
        )

    columns = {name: values(name) for name in table.column_names}
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _numpy_values(column: Any) -> list[Any]:
    values = zip(column.to_numpy(zero_copy_only=False), column.is_valid().to_pylist(), strict=True)
    return [value if is_valid else None for value, is_valid in values]


def _stream(path: Path) -> list[Any]:
    arrow = import_pyarrow(path)
    try:
        with arrow.memory_map(str(path)) as source, arrow.ipc.open_stream(source) as reader:
            return python_rows(reader.read_all(), path)
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is not a complete Arrow file ({error}); copy it again."
        ) from error


READERS = {".json": _json_list, ".parquet": _parquet, ".arrow": _stream}


def _json_lines(path: Path) -> Rows:
    rows, problems = [], []
    for line, raw in enumerate(read_bytes(path).split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            row = parse_json(raw.decode("utf-8"), finite=False)
        except UnicodeDecodeError as error:
            problems.append((line, f"not UTF-8 (byte {error.start}); save the file as UTF-8"))
        except ValueError as error:
            problems.append((line, f"malformed JSON: {error}"))
        else:
            if isinstance(row, dict):
                rows.append((line, row))
            else:
                problems.append((line, f"expected a JSON object, found {type(row).__name__}"))
    return Rows(str(path), "line", rows, problems)
