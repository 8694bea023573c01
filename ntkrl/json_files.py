"""JSON files that users give, read within limits; every mistake is a sentence that names the file.

A file may come from anywhere. Nothing is parsed before its size is known, nothing is returned whose
depth or repeated fields would surprise what reads it.
"""

import json
import math
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ntkrl.messages import quoted

MAX_BYTES = 16 * 2**20
"""Of a config or an index; an index of 100 000 tensors has 10 MB."""
MAX_RECORD_BYTES = 256 * 2**20
"""Of a file that this package writes, with numbers or texts of every sample."""
MAX_DEPTH = 64


def read_object(path: Path, max_bytes: int = MAX_BYTES, finite: bool = True) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
      ValueError: as `read_json`, or another value.
    """
    value = read_json(path, max_bytes, finite)
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(value).__name__}.")
    return value


def read_json(path: Path, max_bytes: int = MAX_BYTES, finite: bool = True) -> Any:
    """Read a JSON file in UTF-8, with or without a byte-order mark.

    Args:
      path: of the file.
      max_bytes: largest size.
      finite: refuse NaN and infinity.

    Raises:
      ValueError: it cannot be read, is larger than `max_bytes`, or is not JSON; values nested
        deeper than MAX_DEPTH, a field twice in an object, or numbers that are not finite.
    """
    content = read_limited(path, max_bytes)
    try:
        return parse_json(content.decode("utf-8-sig"), finite)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON: not UTF-8 at byte {error.start}; save it as UTF-8."
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); write the file again.") from error


def read_limited(path: Path, max_bytes: int) -> bytes:
    """Read a file that must not be large.

    Raises:
      ValueError: not a regular file (a pipe would never end), unreadable, or larger.
    """
    try:
        check_regular(path, max_bytes)
        with path.open("rb") as file:
            return file.read(max_bytes)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error


def check_regular(path: Path, max_bytes: int) -> None:
    """Check the kind and the size of a file, without opening it.

    Raises:
      OSError: it does not exist.
      ValueError: not a regular file, or larger.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a regular file; put the file itself there.")
    if status.st_size > max_bytes:
        raise ValueError(
            f"{path} has {status.st_size} bytes; a file of this name has at most {max_bytes}. Copy "
            "it again from its source."
        )


def parse_json(text: str, finite: bool = True) -> Any:
    """Parse JSON.

    Args:
      text: content of a file, or of a line.
      finite: refuse NaN and infinity, naming the field.

    Raises:
      ValueError: as `read_json`, without the name of the file.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_DEPTH} values") from error
    if finite or text.count("[") + text.count("{") > MAX_DEPTH:
        for name, number in _numbers(value):
            if finite and not math.isfinite(number):
                raise ValueError(f"{name} is {number}, not a finite number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; a field that is there twice must have the same value."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        for name, value in pairs:
            if value != entries[name]:
                raise ValueError(
                    f"the field {quoted(name)} occurs twice, as {quoted(value)} and as "
                    f"{quoted(entries[name])}"
                )
    return entries


def _numbers(root: Any) -> Iterator[tuple[str, float]]:
    """Yield the names and values of all numbers with a fraction, and check the depth."""
    stack: list[tuple[str, Any, int]] = [("the value", root, 1)]
    while stack:
        name, value, depth = stack.pop()
        if depth > MAX_DEPTH and isinstance(value, dict | list):
            raise ValueError(f"{name[:80]} is nested deeper than {MAX_DEPTH} values")
        if isinstance(value, float):
            yield name, value
        elif isinstance(value, dict):
            prefix = f"{name}." if depth > 1 else ""
            stack += [(f"{prefix}{key}", entry, depth + 1) for key, entry in value.items()]
        elif isinstance(value, list):
            stack += [(f"{name}[{i}]", entry, depth + 1) for i, entry in enumerate(value)]
