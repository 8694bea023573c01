"""Law: values that JSON cannot hold are restored exactly, and have a readable form."""

import collections
import datetime
import decimal
import enum
import fractions
import json
import math
import uuid
import zoneinfo

import numpy as np
import pytest

from ntkrl.json_values import from_json, readable, to_json

BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
EAST = datetime.timezone(datetime.timedelta(hours=5, minutes=45))
TIME = datetime.datetime(2024, 10, 27, 2, 30, 1, 7)
VALUES = [
    None,
    True,
    3,
    -(2**63),
    2**63,
    -(10**5000),
    0.1,
    -0.0,
    math.nan,
    -math.inf,
    "text",
    "null \x00, half \ud800, right-to-left \u202e",
    [1, [2.5, None]],
    {"a": {"b": [1]}},
    {"$type": "datetime", "value": "not a date"},
    {"$type": {"$type": "set"}},
    {1: "a", None: "b", (1, 2): [b"c"]},
    (1, (2, [3])),
    {1, 2},
    frozenset({"a"}),
    b"\x00\xff",
    bytearray(b"ab"),
    TIME,
    TIME.replace(tzinfo=datetime.UTC),
    TIME.replace(tzinfo=EAST),
    TIME.replace(tzinfo=BERLIN),
    TIME.replace(tzinfo=BERLIN, fold=1),
    datetime.datetime.min,
    TIME.date(),
    TIME.time(),
    TIME.time().replace(tzinfo=EAST),
    datetime.timedelta(days=-3, microseconds=5),
    decimal.Decimal("1.50"),
    decimal.Decimal("NaN"),
    fractions.Fraction(1, 3),
    1 - 2j,
    uuid.UUID(int=7),
    np.float32(0.1),
    np.int64(3),
    np.bool_(True),
    np.str_("a"),
    np.datetime64("2024-01-01T00:00:00.000000001"),
    np.arange(6, dtype=np.int16).reshape(2, 3)[:, ::2],
    np.array(["a", "bc"]),
    np.array([None, b"a", TIME], object),
    np.array([(1, 2.0)], [("x", "i4"), ("y", "f8")]),
]


def _same(left, right):
    """Equal in type and value, where NaN equals itself."""
    assert type(left) is type(right)
    if isinstance(left, np.ndarray):
        assert left.dtype == right.dtype and left.shape == right.shape
        assert all(_same(a, b) for a, b in zip(left.ravel(), right.ravel(), strict=True))
    elif isinstance(left, datetime.datetime | datetime.time):
        assert left == right and left.fold == right.fold and left.tzinfo == right.tzinfo
    elif isinstance(left, list | tuple):
        assert all(_same(a, b) for a, b in zip(left, right, strict=True))
    elif isinstance(left, dict):
        assert _same(list(left.items()), list(right.items()))
    else:
        assert left == right or (left != left and right != right)
        if isinstance(left, float | decimal.Decimal):
            assert str(left) == str(right)  # 1.50, -0.0
    return True


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_restored_exactly(value):
    """law: through JSON text that any parser reads, alone and inside other values."""
    for outer in (value, [value, 1], {"a": value}):
        text = json.dumps(to_json(outer), allow_nan=False)
        assert _same(from_json(json.loads(text)), outer)


def test_subclasses_are_their_base():
    """law: an enum or a defaultdict is a number, a text or a dict."""

    class Level(enum.IntEnum):
        HIGH = 3

    Pair = collections.namedtuple("Pair", "x y")
    assert from_json(to_json(Level.HIGH)) == 3
    assert from_json(to_json(collections.OrderedDict(a=1))) == {"a": 1}
    assert from_json(to_json(Pair(1, 2))) == (1, 2)


def test_pandas_times_of_nanoseconds():
    """law: pyarrow returns pandas' types for them, and they arrive with their nanoseconds."""
    pandas = pytest.importorskip("pandas")
    for zone in (None, "UTC", "Europe/Berlin"):
        time = pandas.Timestamp("2024-01-01T00:00:00.123456789", tz=zone)
        assert from_json(to_json(time)) == time and from_json(to_json(time)).nanosecond == 789
    assert from_json(to_json(pandas.Timedelta(5, "ns"))) == pandas.Timedelta(5, "ns")


def test_unknown_types_and_tags():
    """law: neither is guessed."""
    with pytest.raises(TypeError, match="builtins.object has no JSON form"):
        to_json([object()])
    with pytest.raises(ValueError, match="'module' is not a tag"):
        from_json({"$type": "module", "value": "os"})


def test_readable():
    """by hand: forms for people; JSON stays as it is."""
    row = {
        "time": TIME.replace(tzinfo=EAST),
        "day": TIME.date(),
        "bytes": b"ab",
        "price": decimal.Decimal("1.50"),
        "nan": math.nan,
        "set": {2, 1},
        "array": np.array([[1.5, np.inf]]),
        "tuple": (1, "a"),
        3: 10**30,
    }
    expected = {
        "time": "2024-10-27T02:30:01.000007+05:45",
        "day": "2024-10-27",
        "bytes": "YWI=",
        "price": "1.50",
        "nan": None,
        "set": [1, 2],
        "array": [[1.5, None]],
        "tuple": [1, "a"],
        "3": hex(10**30),
    }
    assert readable(row) == expected and readable(expected) == expected
    for value in VALUES:
        json.dumps(readable(value), allow_nan=False)
