"""A reward function under TRL's contract: its parameters, its call, and checks of its result.

A function is called with keyword arguments only: `prompts`, `completions`, `completion_ids`,
`trainer_state` (a TrainerState), `log_extra`, `log_metric` and every column of the prompt set as a
list; it receives those it names, or all if it has `**kwargs`. It returns one number per
completion, or None where it does not apply.
"""

import asyncio
import dataclasses
import decimal
import functools
import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ntkrl.json_values import to_json
from ntkrl.messages import listed

CONTRACT = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
ALLOWED = "a list of one finite number (or None) per completion"


@dataclasses.dataclass(frozen=True)
class TrainerState:
    """Progress of a run when a function is called, in fields of transformers' TrainerState.

    global_step: optimizer steps taken. max_steps: of all stages, at most.
    epoch: passes over the training prompts so far. num_train_epochs: of all stages, rounded up.
    num_input_tokens_seen: tokens trained on.
    """

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    num_train_epochs: int = 0
    num_input_tokens_seen: int = 0


class RewardError(ValueError):
    """A reward function failed; the message names it, the place and the fix."""


class RewardUnavailableError(ValueError):
    """A reward function can no longer be called: the run stops, whatever a failed call counts."""


@dataclasses.dataclass(frozen=True)
class RewardFunction:
    """One reward function.

    name: in metrics; unique within a set.
    call: the Python function, plain or async.
    weight: finite factor of its rewards in the sum.
    source: in messages, such as "my_rewards.py:score"; None for the name.
    shift, scale: rewards enter the sum as (reward − shift) / scale; see `read_normalisation`.
    on_failure: reward of every row of a failed call, or None to stop the run.
    on_mesh: it runs a program on the devices of all processes, all of which must call it.
    """

    name: str
    call: Callable[..., Any]
    weight: float = 1.0
    source: str | None = None
    shift: float = 0.0
    scale: float = 1.0
    on_failure: float | None = None
    on_mesh: bool = False

    def __post_init__(self) -> None:
        for name in ("weight", "shift", "on_failure"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{self.label}: {name} is {value}; it must be a finite number.")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"{self.label}: scale is {self.scale}; it must be positive.")
        if not callable(self.call):
            raise ValueError(f"{self.label} is {type(self.call).__name__}, not a function.")
        positional = [p.name for p in self.parameters if p.kind is p.POSITIONAL_ONLY]
        if positional:
            raise ValueError(
                f"{self.label} takes {', '.join(positional)} by position only; reward functions "
                "are called by keyword, so remove the '/' from its parameters."
            )

    @property
    def label(self) -> str:
        """Name of the function in messages."""
        return self.name if self.source is None else self.source

    @property
    def file(self) -> str:
        """Name of its file, empty where that is unknown."""
        code = getattr(inspect.unwrap(self.call), "__code__", None)
        return self.label.rpartition(":")[0] or getattr(code, "co_filename", "")

    @functools.cached_property
    def parameters(self) -> tuple[inspect.Parameter, ...]:
        """Parameters of the function."""
        try:
            return tuple(inspect.signature(self.call).parameters.values())
        except ValueError as error:
            raise ValueError(
                f"{self.label}: its parameters cannot be read ({error}); wrap it in a function "
                "written in Python."
            ) from error

    def missing(self, columns: Iterable[str]) -> list[str]:
        """Return the required parameters that neither the contract nor a column provides."""
        provided = {*CONTRACT, *columns}
        return [
            p.name
            for p in self.parameters
            if p.default is p.empty
            and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            and p.name not in provided
        ]

    def rewards(self, arguments: Mapping[str, Any], completions: Sequence[str]) -> np.ndarray:
        """Call the function and return its rewards `[B]`, float32, NaN where it returned None.

        Args:
          arguments: of the contract, and columns; those it does not name are left out.
          completions: B texts, for messages.

        Raises:
          RewardError: it raised, or did not return B finite numbers or Nones.
          RewardUnavailableError: it cannot be called again.
        """
        if not any(p.kind is p.VAR_KEYWORD for p in self.parameters):
            names = {p.name for p in self.parameters}
            arguments = {name: value for name, value in arguments.items() if name in names}
        try:
            returned = self.call(**arguments)
            if inspect.isawaitable(returned):
                returned = asyncio.run(wait(returned))
        except (RewardError, RewardUnavailableError):
            raise
        except Exception as error:
            raise RewardError(
                f"reward function {self.label} raised {type(error).__name__}: {error} at "
                f"{_place(error, self.file)}. Catch it there and return None (not applicable) "
                "or a number."
            ) from error
        return _checked(returned, completions, self.label)


class CallLog:
    """The values that one call of a reward function logs, in order, by name.

    Numbers and arrays of NumPy, torch and JAX become Python's.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, list[float]] = {}
        self.extra: dict[str, list[Any]] = {}

    def log_metric(self, name: str, value: Any) -> None:
        """Log one number; raise TypeError for anything else."""
        try:
            number = float(_item(value))
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"log_metric({name!r}, …) takes one number, not {type(value).__name__} "
                f"({value!r:.60}); log its mean"
            ) from error
        self.metrics.setdefault(name, []).append(number)

    def log_extra(self, column: str, values: Any) -> None:
        """Log a list or array of values, one per completion; text where JSON has no form."""
        self.extra.setdefault(column, []).extend(map(_loggable, _python(values)))


def _item(value: Any) -> Any:
    """Return the number in an array of one element, of any library; other values as they are."""
    try:
        return value.item() if callable(getattr(value, "item", None)) else value
    except (TypeError, ValueError, RuntimeError):  # several elements
        return value


def _python(value: Any) -> Any:
    """Return an array or scalar of any library as Python values."""
    return value.tolist() if callable(getattr(value, "tolist", None)) else value


def _loggable(value: Any) -> Any:
    value = _python(value)
    try:
        to_json(value)
    except TypeError:
        return str(value)
    return value


async def wait(result: Any) -> Any:
    """Return the result of an awaitable."""
    return await result


def line_in(path: Path, error: Exception) -> int | None:
    """Return the innermost line of a file in an error's traceback, or None."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if Path(f.filename).resolve() == path.resolve()]
    return lines[-1] if lines else None


def _place(error: Exception, file: str) -> str:
    """Return the innermost traceback line in the user's file, or else of all."""
    line = line_in(Path(file), error) if file else None
    if line is not None:
        return f"{file}:{line}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno}"


def _checked(returned: Any, completions: Sequence[str], label: str) -> np.ndarray:
    values = returned if isinstance(returned, list | tuple) else _python(returned)
    if getattr(returned, "ndim", 1) != 1 or not isinstance(values, list | tuple):
        raise RewardError(
            f"reward function {label} returned {type(returned).__name__} ({returned!r:.60}); "
            f"allowed is {ALLOWED}."
        )
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
            f"reward function {label} returned values that are not finite float32 numbers"
            f"{listed(problems)}\nAllowed is {ALLOWED}."
        )
    return rewards_B


def _number(value: Any) -> np.float32 | None:
    """Return the value in float32, the dtype of rewards; None if it is not a number."""
    value = _item(value)  # reductions of NumPy, JAX and torch return arrays
    if not isinstance(value, numbers.Real | np.bool_ | decimal.Decimal):
        return None
    try:
        with np.errstate(over="ignore"):  # infinity is reported with its row
            return np.float32(value)
    except OverflowError:  # an integer beyond float64
        return np.float32(np.inf)
