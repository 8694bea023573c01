"""Calling code the user wrote, and checking what it returned, with messages that name it."""

from __future__ import annotations

import asyncio
import inspect
import numbers
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SHOWN = 10


class RewardError(ValueError):
    """A reward that could not be had, told in full: what, where, and what to do."""


ALLOWED = "a list of one finite number (or None) per completion"


def listed(problems: Sequence[str]) -> str:
    """Return the problems as indented lines, the first ten in full and the rest counted."""
    lines = [f"\n  {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"\n  and {len(problems) - SHOWN} more")
    return "".join(lines)


def call_user(call: Callable[..., Any], arguments: Mapping[str, Any], label: str) -> Any:
    """Call a reward function, and await it if it is async.

    Args:
      call: the function.
      arguments: its keyword arguments.
      label: what messages call it, such as "my_rewards.py:score".

    Returns:
      What it returned.

    Raises:
      RewardError: the function raised; says what and at which line, chained from the original.
    """
    try:
        result = call(**arguments)
        if inspect.isawaitable(result):
            return asyncio.run(_wait(result))
        return result
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(
            f"reward function {label} raised {type(error).__name__}: {error}"
            f"{_place(error, label)}. Catch it there and return None (not applicable) or a number."
        ) from error


def checked_values(returned: Any, completions: Sequence[str], label: str) -> np.ndarray:
    """Check what a reward function returned.

    Args:
      returned: the function's result.
      completions: B texts, for messages.
      label: what messages call the function.

    Returns:
      `[B]` float32, NaN where the result is None.

    Raises:
      RewardError: not a one-dimensional sequence of B finite numbers or Nones.
    """
    if isinstance(returned, list | tuple):
        values = list(returned)
    else:
        array = np.asarray(returned)
        if array.ndim != 1:
            raise RewardError(
                f"reward function {label} returned {type(returned).__name__} ({returned!r:.60}); "
                f"allowed is {ALLOWED}."
            )
        values = array.tolist()
    if len(values) != len(completions):
        raise RewardError(
            f"reward function {label} returned {len(values)} rewards for {len(completions)} "
            f"completions; allowed is {ALLOWED}."
        )
    rewards_B = np.full(len(values), np.nan, np.float32)
    problems = []
    for row, value in enumerate(values):
        number = None if value is None else _number(value)
        if number is not None and np.isfinite(number):
            rewards_B[row] = number
        elif value is not None:
            problems.append(
                f"row {row} is {value!r:.60} for the completion {completions[row]!r:.60}"
            )
    if problems:
        raise RewardError(
            f"reward function {label} returned values that are no finite float32 numbers"
            f"{listed(problems)}\nAllowed is {ALLOWED}."
        )
    return rewards_B


async def _wait(result: Any) -> Any:
    return await result


def _number(value: Any) -> np.float32 | None:
    """Return the value in float32, as rewards are kept; None if it is no number."""
    if isinstance(value, numbers.Real | np.bool_):
        try:
            with np.errstate(over="ignore"):  # infinity is reported with its row
                return np.float32(value)
        except OverflowError:  # an integer beyond float64
            return np.float32(np.inf)
    array = None if isinstance(value, str | bytes) else np.asarray(value)
    # Arrays without dimensions are how JAX and torch reductions come back.
    if array is not None and array.ndim == 0 and array.dtype.kind in "biuf":
        return np.float32(array)
    return None


def _place(error: Exception, label: str) -> str:
    """Return the innermost line of the user's file in the traceback, else of any file."""
    frames = traceback.extract_tb(error.__traceback__)
    file = label.rpartition(":")[0]
    path = Path(file).resolve()
    own = [frame for frame in frames if file and Path(frame.filename).resolve() == path]
    frame = own[-1] if own else frames[-1]
    shown = file if own else frame.filename
    return f" at {shown}:{frame.lineno}"
