"""Python values as JSON: tagged and restored exactly, or in a readable form.

Parquet and saved data sets hold values that JSON has no form for: dates, bytes, decimals, NaN.
`to_json` writes them as {"$type": NAME, "value": …}, which `from_json` restores without executing
anything; an object with a key "$type" of its own is tagged too. `readable` is for files that people
and other tools read.
"""

import base64
import datetime
import decimal
import fractions
import io
import math
import sys
import uuid
import zoneinfo
from collections.abc import Callable
from typing import Any

import numpy as np

TAG = "$type"
BASES: tuple[Any, ...] = (int, float, str, list, dict)
"""Types whose subclasses, such as enums and defaultdict, become the type itself."""
SMALLEST, LARGEST = -(2**63), 2**63 - 1
"""Integers within these bounds are JSON numbers; parsers limit the digits of others."""


def to_json(value: Any) -> Any:
    """Return a value in JSON types, from which `from_json` restores it.

    Raises:
      TypeError: a type that has no form here; the message names it.
    """
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return value if SMALLEST <= value <= LARGEST else _tagged("int", hex(value))
    if kind is float:
        return value if math.isfinite(value) else _tagged("float", repr(value))
    if kind is list:
        return [to_json(entry) for entry in value]
    if kind is dict:
        if TAG not in value and all(type(key) is str for key in value):
            return {key: to_json(entry) for key, entry in value.items()}
        return _tagged("dict", [[to_json(key), to_json(entry)] for key, entry in value.items()])
    for name, (types, encode, _) in CODECS.items():
        if isinstance(value, types):
            return _tagged(name, encode(value))
    for base in BASES:
        if isinstance(value, base):
            return to_json(base(value))
    raise TypeError(f"{kind.__module__}.{kind.__qualname__} has no JSON form")


def from_json(value: Any) -> Any:
    """Return the value that `to_json` was called with.

    Raises:
      ValueError: an unknown tag.
    """
    if isinstance(value, list):
        return [from_json(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if TAG not in value:
        return {key: from_json(entry) for key, entry in value.items()}
    name = value[TAG]
    if name == "int":
        return int(value["value"], 16)
    if name == "float":
        return float(value["value"])
    if name == "dict":
        return {from_json(key): from_json(entry) for key, entry in value["value"]}
    if name not in CODECS:
        raise ValueError(f"{name!r} is not a tag of this format; known are {', '.join(CODECS)}.")
    return CODECS[name][2](value["value"])


def readable(value: Any) -> Any:
    """Return a value in JSON types for readers that know no tags; what is JSON stays as it is.

    Times are ISO 8601, bytes base64, decimals text, sets sorted lists, NaN and infinity null.
    """
    if value is None or isinstance(value, bool | str):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, int):
        return int(value) if SMALLEST <= value <= LARGEST else hex(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [readable(entry) for entry in value]
    if isinstance(value, dict):
        return {str(key): readable(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(readable, value), key=str)
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, np.datetime64 | np.timedelta64):
        return str(value)
    if isinstance(value, np.generic | np.ndarray):
        return readable(value.tolist())
    return str(value)


def _tagged(name: str, value: Any) -> dict[str, Any]:
    return {TAG: name, "value": value}


def _array_bytes(array: Any) -> str:
    file = io.BytesIO()
    np.save(file, np.asarray(array), allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()


def _array(text: str) -> np.ndarray:
    return np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)


def _array_json(array: np.ndarray) -> Any:
    if not array.dtype.hasobject:
        return _array_bytes(array)
    return [list(array.shape), [to_json(entry) for entry in array.ravel().tolist()]]


def _array_from_json(value: Any) -> np.ndarray:
    if isinstance(value, str):
        return _array(value)
    shape, entries = value
    array = np.empty(len(entries), object)
    for index, entry in enumerate(entries):
        array[index] = from_json(entry)
    return array.reshape(shape)


def _zone(time: datetime.datetime | datetime.time) -> Any:
    """Return a time zone as its key, as [seconds, name] of a fixed offset, or None."""
    zone = time.tzinfo
    key = getattr(zone, "key", None) or getattr(zone, "zone", None)  # zoneinfo's, pytz's
    if zone is None or key is not None:
        return key
    offset = zone.utcoffset(time if isinstance(time, datetime.datetime) else None)
    if offset is None:
        raise TypeError(f"a time of the zone {zone!r} has no JSON form")
    return offset.total_seconds()


def _from_zone(zone: Any) -> datetime.tzinfo | None:
    if zone is None:
        return None
    if isinstance(zone, str):
        return zoneinfo.ZoneInfo(zone)
    return datetime.timezone(datetime.timedelta(seconds=zone))


def _time_json(time: Any) -> Any:
    return [time.replace(tzinfo=None, fold=0).isoformat(), _zone(time), time.fold]


def _datetime(value: Any) -> datetime.datetime:
    text, zone, fold = value
    return datetime.datetime.fromisoformat(text).replace(tzinfo=_from_zone(zone), fold=fold)


def _time(value: Any) -> datetime.time:
    text, zone, fold = value
    return datetime.time.fromisoformat(text).replace(tzinfo=_from_zone(zone), fold=fold)


class _Pandas:
    """Types of pandas, which readers of Parquet return for nanoseconds; matched if it is loaded."""

    def __init__(self, name: str):
        self.name = name

    def __instancecheck__(self, value: Any) -> bool:
        pandas = sys.modules["pandas"] if "pandas" in sys.modules else None
        return pandas is not None and isinstance(value, getattr(pandas, self.name))


def _timestamp(value: Any) -> Any:
    import pandas

    nanoseconds, unit, zone = value
    time = pandas.Timestamp(nanoseconds, unit="ns", tz=None if zone is None else "UTC")
    return (time if zone is None else time.tz_convert(_from_zone(zone))).as_unit(unit)


def _timedelta(value: Any) -> Any:
    import pandas

    return pandas.Timedelta(value[0], unit="ns").as_unit(value[1])


def _duration(value: Any) -> datetime.timedelta:
    return datetime.timedelta(*value)


Codec = tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]
CODECS: dict[str, Codec] = {
    # NumPy and pandas first: some of their scalars are Python's too
    "numpy": (np.generic, _array_bytes, lambda text: _array(text)[()]),
    "ndarray": (np.ndarray, _array_json, _array_from_json),
    "pandas.Timestamp": (
        _Pandas("Timestamp"),
        lambda time: [time.as_unit("ns").value, time.unit, _zone(time)],
        _timestamp,
    ),
    "pandas.Timedelta": (
        _Pandas("Timedelta"),
        lambda time: [time.as_unit("ns").value, time.unit],
        _timedelta,
    ),
    "datetime": (datetime.datetime, _time_json, _datetime),
    "date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "time": (datetime.time, _time_json, _time),
    "timedelta": (datetime.timedelta, lambda d: [d.days, d.seconds, d.microseconds], _duration),
    "decimal": (decimal.Decimal, str, decimal.Decimal),
    "fraction": (fractions.Fraction, str, fractions.Fraction),
    "complex": (complex, str, complex),
    "uuid": (uuid.UUID, str, uuid.UUID),
    "bytes": (bytes, lambda b: base64.b64encode(b).decode(), base64.b64decode),
    "bytearray": (
        bytearray | memoryview,
        lambda b: base64.b64encode(b).decode(),
        lambda text: bytearray(base64.b64decode(text)),
    ),
    "tuple": (tuple, lambda t: to_json(list(t)), lambda value: tuple(from_json(value))),
    "set": (set, lambda s: to_json(list(s)), lambda value: set(from_json(value))),
    "frozenset": (frozenset, lambda s: to_json(list(s)), lambda v: frozenset(from_json(v))),
}
"""By tag: types, value → JSON, JSON → value."""
