"""Rows in memory as a file: JSON Lines, or Parquet for values that JSON has no form for.

A run reads what the file holds, so that it is the same run when another program reads the file:
tuples and NumPy arrays become lists, NumPy scalars Python's numbers.
"""

import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ntkrl.data.published import Rows, python_rows
from ntkrl.json_files import parse_json
from ntkrl.json_values import LARGEST, SMALLEST, to_json
from ntkrl.messages import joined


@dataclasses.dataclass(frozen=True, eq=False)
class RowFile:
    """Rows and the file that holds them.

    rows: as they are read from the file, but numbered as in memory.
    content, ending: of the file. digest: of the rows.
    """

    rows: Rows
    content: bytes
    ending: str

    @property
    def digest(self) -> str:
        """The first digits of the rows' SHA-256; for JSON Lines, that of the file."""
        lines = [json.dumps(to_json(row)) + "\n" for _, row in self.rows.rows]
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:12]


def row_file(values: Iterable[Any], source: str) -> RowFile:
    """Return the file of some rows; those that are no objects become problems of its rows.

    Args:
      values: a mapping from column to value each.
      source: of the rows, for messages.

    Raises:
      ValueError: a column with values that neither JSON nor Parquet can hold, or Parquet is needed
        and pyarrow is not installed.
    """
    rows: list[tuple[int, dict[str, Any]]] = []
    problems: list[tuple[int, str]] = []
    for number, value in enumerate(values):
        if not isinstance(value, Mapping):
            problems.append((number, _not_an_object(value)))
        elif not all(isinstance(name, str) for name in value):
            names = [repr(name) for name in value if not isinstance(name, str)]
            problems.append((number, f"column names must be text, not {', '.join(names)}"))
        else:
            rows.append((number, dict(value)))
    columns = dict.fromkeys(name for _, row in rows for name in row)
    other: dict[str, Any] = {}
    for name in columns:
        for _, row in rows:
            kind = _kind_without_json(row[name]) if name in row else None
            if kind is not None:
                other.setdefault(name, kind)
    if other:
        content, read = _parquet_file([_plain(row) for _, row in rows], other, source)
        ending = ".parquet"
    else:
        lines = [json.dumps(_plain(row)) for _, row in rows]
        content, ending = "".join(f"{line}\n" for line in lines).encode(), ".jsonl"
        read = [parse_json(line, finite=False) for line in lines]
    numbered = [(number, row) for (number, _), row in zip(rows, read, strict=True)]
    return RowFile(Rows(source, "row", numbered, problems), content, ending)


def _not_an_object(value: Any) -> str:
    hint = '; write {"prompt": text}' if isinstance(value, str) else ""
    return f"expected a dict, found {type(value).__name__}{hint}"


def _kind_without_json(value: Any, depth: int = 0) -> str | None:
    """Return the name of a type within a value that JSON has no form for, or None."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if value is None or isinstance(value, str | bool):
        return None
    if isinstance(value, int):
        return None if SMALLEST <= value <= LARGEST else "integers above 64 bits"
    if isinstance(value, float):
        return None if math.isfinite(value) else repr(float(value))
    if depth > 32:
        return "values nested deeper than 32"
    if isinstance(value, list | tuple):
        entries: Iterable[Any] = value
    elif isinstance(value, dict) and all(isinstance(key, str) for key in value):
        entries = value.values()
    else:
        return type(value).__name__
    kinds = (_kind_without_json(entry, depth + 1) for entry in entries)
    return next((kind for kind in kinds if kind is not None), None)


def _plain(value: Any) -> Any:
    """Return a value that JSON has a form for, with Python's numbers for NumPy's."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return value


def _parquet_file(
    rows: list[dict[str, Any]], kinds: Mapping[str, str], source: str
) -> tuple[bytes, list[dict[str, Any]]]:
    """Return a Parquet file of some rows and the rows as it is read.

    Args:
      rows: the rows.
      kinds: column to the name of the type that JSON has no form for.
      source: for messages.

    Raises:
      ValueError: a column that Parquet has no form for either, or no pyarrow.
    """
    named = joined(f"column {name!r} holds {kind}" for name, kind in kinds.items())
    fix = "convert it to text, numbers or lists, or leave it out"
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(
            f"{source}: {named}, for which JSON has no form; {fix}, or pip install 'ntkrl[data]', "
            "which writes Parquet."
        ) from error
    arrays, names = {}, dict.fromkeys(name for row in rows for name in row)
    for name in names:
        try:
            arrays[name] = pyarrow.array([row[name] if name in row else None for row in rows])
        except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{source}: column {name!r} fits neither JSON nor Parquet ({reason:.120}); {fix}."
            ) from error
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(arrays), file)
    table = parquet.ParquetFile(io.BytesIO(file.getvalue())).read()
    return file.getvalue(), python_rows(table, source)
