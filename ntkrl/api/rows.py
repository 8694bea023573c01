"""Prompts of a call: a path, or rows in memory."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ntkrl import data
from ntkrl.messages import quoted

FORMS = (
    'a list of dicts such as [{"prompt": "text", "answer": "text"}], a datasets.Dataset, or the '
    "path of a file"
)


def read_rows(values: Any, name: str) -> str | data.RowFile:
    """Return the path, or the rows and the file that holds them.

    Args:
      values: of the caller.
      name: of the argument.

    Raises:
      ValueError: of another type, no rows, or columns that no file can hold.
    """
    if isinstance(values, str | os.PathLike):
        return os.fspath(values)
    if isinstance(values, Mapping):
        raise ValueError(_mapping_problem(values, name))
    if hasattr(values, "to_dict") and hasattr(values, "columns"):
        raise ValueError(
            f"{name} is a {type(values).__name__}; pass its rows, {name}={name}.to_dict('records')."
        )
    if callable(getattr(values, "to_list", None)) and hasattr(values, "column_names"):
        values = values.to_list()  # datasets.Dataset
    if not isinstance(values, list | tuple):
        raise ValueError(f"{name} is {quoted(values)} ({type(values).__name__}); pass {FORMS}.")
    if not values:
        raise ValueError(f"{name} is empty; pass {FORMS}.")
    return data.row_file(values, name)


def _mapping_problem(values: Mapping[Any, Any], name: str) -> str:
    if values and all(hasattr(part, "column_names") for part in values.values()):
        first = next(iter(values))
        return f"{name} has the splits {', '.join(map(str, values))}; pass one, as [{first!r}]."
    hint = "; put it in a list" if "prompt" in values else ""
    return f"{name} is one dict{hint}. Expected {FORMS}."


def path_in_run(file: data.RowFile, run_dir: str | os.PathLike) -> str:
    """Return the path of a file of rows in a run directory.

    Raises:
      ValueError: a directory whose name the config cannot list.
    """
    if "," in str(run_dir):
        raise ValueError(f"run_dir {str(run_dir)!r} has a comma, which separates files of prompts.")
    return str(Path(run_dir) / "data" / f"prompts-{file.digest}{file.ending}")


def count_rows(values: str | data.RowFile) -> int:
    """Return the number of rows.

    Raises:
      ValueError: files that cannot be read.
    """
    if isinstance(values, data.RowFile):
        return len(values.rows.rows)
    tables: Iterable[data.Rows] = map(data.read_rows, data.split_names(values))
    return sum(len(table.rows) for table in tables)
