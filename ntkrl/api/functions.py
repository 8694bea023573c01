"""Reward functions of a call: names as in a config, and functions of the calling program."""

import functools
import inspect
import os
import re
from collections.abc import Callable
from typing import Any

from ntkrl import reward
from ntkrl.messages import quoted

FORMS = (
    "a function such as score(completions, answer, **kwargs), a built-in name, 'FILE.py:NAME' or a "
    "reward model's directory"
)
LAMBDA = "<lambda>"


def read_rewards(values: Any) -> tuple[str, dict[str, Callable[..., Any]]]:
    """Return the config's `reward.function`, and the functions by their names there.

    Args:
      values: one or several.

    Raises:
      ValueError: entries of other types, or two functions of one name; all in one message.
    """
    several = isinstance(values, list | tuple)
    entries = list(values) if several else [values]
    if not entries:
        raise ValueError(f"rewards is empty; pass {FORMS}.")
    specs: list[str] = []
    functions: dict[str, Callable[..., Any]] = {}
    problems = []
    unnamed = sum(_name(entry) == LAMBDA for entry in entries)
    lambdas = 0
    for number, entry in enumerate(entries):
        place = f"rewards[{number}]" if several else "rewards"
        if isinstance(entry, str | os.PathLike):
            specs.append(os.fspath(entry))
            continue
        problem = _problem(entry)
        if problem is not None:
            problems.append(f"{place} is {problem}")
            continue
        name = _name(entry)
        if name == LAMBDA:
            lambdas += 1
            name = f"lambda_{lambdas}" if unnamed > 1 else "lambda"
        spec = f"{reward.IN_PROCESS}{name}"
        if spec in functions:
            problems.append(
                f"{place} is named {name!r}, as another one is; give it another name, since "
                "metrics are stored by name"
            )
        functions[spec] = entry
        specs.append(spec)
    if problems:
        raise ValueError("; ".join(problems) + ".")
    return ",".join(specs), functions


def _problem(entry: Any) -> str | None:
    """Return what an entry is, if it is no function."""
    if not callable(entry):
        return f"{quoted(entry)} ({type(entry).__name__}); expected {FORMS}"
    if inspect.isclass(entry):
        return f"the class {entry.__name__}; pass an instance of it, or a function"
    name = _name(entry)
    if name != LAMBDA and not re.fullmatch(r"\w[\w.-]*", name):
        return f"named {name!r}; its __name__ must be letters, digits, - . and _"
    return None


def _name(entry: Any) -> str:
    """Return the name of a function, of a partial one's function, or of an object's class."""
    if isinstance(entry, functools.partial):
        return _name(entry.func)
    name = getattr(entry, "__name__", None)
    return name if isinstance(name, str) else type(entry).__name__
