"""Values of settings against the types of their fields, for values of config files and of flags."""

from __future__ import annotations

import ast
import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from ntkrl.messages import quoted

WORDS: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    bool: ("True or False", "True or False"),
    types.NoneType: ("None", "None"),
}
"""A type in words, and several of it."""
BOOLEANS = ("true", "false", "t", "f", "1", "0")
"""Words that flags of bool take, in any case."""


def type_problems(kind: Any, values: Mapping[str, Any], name: str) -> list[str]:
    """List the values that are not of the type of their field.

    Args:
      kind: a dataclass.
      values: by field; others are left out.
      name: of the section, for messages.
    """
    hints, problems = get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        if field.name in values:
            problems += _misfits(values[field.name], hints[field.name], f"{name}.{field.name}")
    return problems


def _misfits(value: Any, hint: Any, name: str) -> list[str]:
    """Describe what is not of a type: of tuples the entries, if they have the right number."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        parts = [_misfits(value, argument, name) for argument in arguments]
        if not all(parts):
            return []
        entries = [part for part in parts if not part[0].startswith(f"{name} ")]
        return entries[0] if entries else [_must_be(value, hint, name)]
    if origin is tuple and isinstance(value, tuple | list):
        endless = arguments[-1] is Ellipsis
        if endless and get_origin(arguments[0]) is tuple and not _rows(value):
            fix = f"; one row is written ({_shown(value)},)"
            return [
                _must_be(value, hint, name) + ("" if _misfits(value, arguments[0], "") else fix)
            ]
        if endless or len(value) == len(arguments):
            expected = [arguments[0]] * len(value) if endless else arguments
            pairs = enumerate(zip(value, expected, strict=True))
            return [p for i, (v, each) in pairs for p in _misfits(v, each, f"{name}[{i}]")]
    return [] if _fits(value, hint, origin) else [_must_be(value, hint, name)]


def _fits(value: Any, hint: Any, origin: Any) -> bool:
    """Return whether a value is of a type that is no union; NaN is no number."""
    if hint is types.NoneType:
        return value is None
    if hint in (int, float):
        number = isinstance(value, int if hint is int else int | float)
        return number and not isinstance(value, bool) and not math.isnan(value)
    if hint in (str, bool):
        return isinstance(value, hint)
    if origin is dict or hint is dict:
        return isinstance(value, Mapping)
    return origin is not tuple


def _rows(value: Any) -> bool:
    return all(isinstance(entry, tuple | list) for entry in value)


def _must_be(value: Any, hint: Any, name: str) -> str:
    if value is None:
        return f"{name} must not be None"
    return f"{name} must be {describe(hint)}, not {_shown(value)}"


def describe(hint: Any, several: bool = False) -> str:
    """Return a type in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(argument, several) for argument in arguments)
    if hint in WORDS:
        return WORDS[hint][several]
    if origin is tuple:
        prefix = "tuples" if several else "a tuple"
        if arguments[-1] is Ellipsis:
            return f"{prefix} of {describe(arguments[0], several=True)}"
        return f"{prefix} ({', '.join(map(describe, arguments))})"
    return "mappings" if several else "a mapping"


def flag_problem(flag: str, text: str, kind: type | None, default: Any) -> str | None:
    """Return why the text of a flag is no value of its setting's type, or None.

    Args:
      flag: with its dashes.
      text: after "=".
      kind: type of the setting.
      default: its value, an example in the message.
    """
    expected = None
    try:
        if kind is int:
            expected = WORDS[int][0]
            int(text, 0)
        elif kind is float:
            expected = WORDS[float][0]
            float(text)
        elif kind is bool and text.lower() not in BOOLEANS:
            expected = WORDS[bool][0]
            raise ValueError
        elif kind is tuple:
            expected = "a tuple in Python's syntax and in quotes"
            if "," in text or text[:1] in ("(", "["):
                ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if default is None:
            example = ", or None"
        elif kind is tuple:
            example = f""", such as {flag}="{_shown(default)}\""""
        else:
            example = f", such as {_shown(default)}"
        return f"{flag}={text}: expected {expected}{example}"
    return None


def _shown(value: Any) -> str:
    """Return a value as Python writes it; text is marked where it looks like a number."""
    numeric = isinstance(value, str) and value.replace(".", "").replace("e-", "").isdigit()
    return quoted(value) + (" (text: leave out the quotes)" if numeric else "")
