"""Keyword arguments that a call does not have: the argument or the setting that may be meant."""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from ntkrl import settings_list
from ntkrl.command_line import OTHER_NAMES
from ntkrl.messages import did_you_mean

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
ARGUMENTS = {"data": "prompts", "reward": "rewards"}
"""Arguments of calls by the shorthands of the command line that are called otherwise."""


def with_hints(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Return a function that says, of an argument that it does not have, which may be meant."""
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        unknown = [name for name in kwargs if name not in known]
        if unknown:
            hints = [f"{name!r}{_hint(name, list(known))}" for name in unknown]
            name = function.__qualname__.removesuffix(".__init__")
            raise TypeError(f"{name} has no argument {'; '.join(hints)}")
        return function(*args, **kwargs)

    return call


def _hint(name: str, known: list[str]) -> str:
    """Return the argument or the setting that a name of no argument may mean."""
    other = OTHER_NAMES.get(name, name)
    setting = other.removeprefix("config.")
    other = ARGUMENTS.get(other, other)
    if other in known:
        return f"; did you mean {other!r}?"
    every = [entry.name for entry in settings_list.read_settings_list()]
    same = [each for each in every if setting in (each, each.rpartition(".")[2])]
    if same and "config" in known:
        return f"; did you mean config={{{same[0]!r}: …}}?"
    return did_you_mean(name, known) or f"; there are {', '.join(known)}"
