"""Reward functions under TRL's contract, and their weighted sum.

A function is called with keyword arguments only: `prompts`, `completions`, `completion_ids`,
`trainer_state` (always None here), `log_extra`, `log_metric` and every column of the prompt
set as a list; of these it gets the ones it names, or all if it has `**kwargs`. It returns one
number per completion, or None where it does not apply.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ntkrl.reward.checks import RewardError, call_user, checked_values, listed

KNOWN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


@dataclasses.dataclass(frozen=True)
class RewardFunction:
    """One reward function.

    name: its name in metrics; different for each function of a set.
    call: the Python function, plain or async.
    weight: finite factor of its rewards in the sum.
    source: what messages call it, such as "my_rewards.py:score"; the name if None.
    shift, scale: rewards enter the sum as (reward − shift) / scale; see normalisation.py.
    on_failure: the reward of every row of a call that fails, or None to stop the run.
    on_mesh: whether it runs a program on the devices of all processes, which must call it alike.
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
        """Check what can be known without calling.

        Raises:
          ValueError: a weight that is not finite, something that cannot be called, or a
            parameter that cannot be given by keyword.
        """
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
        """How messages call the function."""
        return self.name if self.source is None else self.source

    @functools.cached_property
    def parameters(self) -> tuple[inspect.Parameter, ...]:
        """What the function takes."""
        try:
            return tuple(inspect.signature(self.call).parameters.values())
        except ValueError as error:
            raise ValueError(
                f"{self.label}: its parameters cannot be read ({error}); wrap it in a function "
                "written in Python."
            ) from error

    def missing(self, columns: Iterable[str]) -> list[str]:
        """Return the required parameters that neither the contract nor a column provides."""
        given = {*KNOWN, *columns}
        return [
            p.name
            for p in self.parameters
            if p.default is p.empty
            and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            and p.name not in given
        ]

    def accepted(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments the function names, or all if it has `**kwargs`."""
        if any(p.kind is p.VAR_KEYWORD for p in self.parameters):
            return dict(arguments)
        named = {p.name for p in self.parameters}
        return {name: value for name, value in arguments.items() if name in named}


@dataclasses.dataclass(frozen=True, eq=False)
class RewardResult:
    """Rewards of a batch of completions.

    rewards: `[B]` float32, weighted sum over the functions that apply to the row.
    per_function: name to `[B]` float32, unweighted, NaN where the function does not apply.
    logged: name to the mean of the values given to `log_metric` in this call.
    extra: name to the values given to `log_extra` in this call, in order.
    failures: name of a function whose call failed, to why; its rewards are `on_failure`.
    """

    rewards: np.ndarray
    per_function: dict[str, np.ndarray]
    logged: dict[str, float]
    extra: dict[str, list[Any]]
    failures: dict[str, str]


@dataclasses.dataclass(frozen=True)
class RewardSet:
    """Reward functions whose weighted sum is the reward.

    functions: one or more, with different names.
    own_part, agree: of `runtime`, which is not imported here since workers do without JAX: what
      of the prompts this process calls the functions for, and what all processes found.
    """

    functions: tuple[RewardFunction, ...]
    own_part: Callable[[int], slice] = lambda count: slice(0, count)
    agree: Callable[[str, Any], list[Any]] = lambda name, value: [value]

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
          ValueError: no function, or two of equal name.
        """
        if not self.functions:
            raise ValueError("no reward function given; name at least one, such as 'expressions'.")
        by_name: dict[str, list[str]] = {}
        for function in self.functions:
            by_name.setdefault(function.name, []).append(function.label)
        for name, labels in by_name.items():
            if len(labels) > 1:
                raise ValueError(
                    f"{len(labels)} reward functions are named {name!r} ({', '.join(labels)}); "
                    "rename all but one, since metrics are kept by name."
                )

    def check_columns(self, columns: Iterable[str]) -> None:
        """Check that the columns of the prompt set serve every function.

        Args:
          columns: names of the columns.

        Raises:
          ValueError: a column bears a name of the contract, or required parameters of
            functions are no columns; all of them in one message.
        """
        columns = tuple(columns)
        problems = [
            f"the column {name!r} has a name that reward functions are given already; rename it"
            for name in columns
            if name in KNOWN
        ]
        for function in self.functions:
            for name in function.missing(columns):
                near = difflib.get_close_matches(name, (*columns, *KNOWN), n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                problems.append(f"{function.label} requires {name!r}, which is no column{hint}")
        if problems:
            raise ValueError(
                f"reward functions and columns do not fit{listed(problems)}\n"
                f"Columns are: {', '.join(columns) if columns else 'none'}; always given are "
                f"{', '.join(KNOWN)}. Add the column to the prompt file or a default to the "
                "parameter."
            )

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        conversational: bool = False,
        group: int = 1,
    ) -> RewardResult:
        """Reward completions; of several processes each calls the functions for its own prompts.

        Args:
          prompts: B prompts, each repeated for its completions; lists of messages if
            conversational.
          completions: B texts.
          completion_ids: B lists of token ids.
          columns: name to B values.
          conversational: give functions each completion as one assistant message.
          group: completions per prompt, in consecutive rows; a call gets whole groups.

        Returns:
          The rewards, with what the functions logged.

        Raises:
          ValueError: arguments of different lengths, columns that do not fit, a function that
            raises or returns anything but B finite numbers or Nones, or a row to which no
            function applies.
        """
        self.check_columns(columns)
        _check_sizes(completions, prompts=prompts, completion_ids=completion_ids, **columns)

        part = self.own_part(len(completions) // group)
        own = slice(part.start * group, part.stop * group)

        def call(function: RewardFunction) -> _Called:
            rows = slice(None) if function.on_mesh else own
            texts = completions[rows]
            # Built anew for each function, so that none can change what the next one sees.
            arguments = {name: list(values[rows]) for name, values in columns.items()}
            arguments |= {
                "prompts": list(prompts[rows]),
                "completions": _shown(texts, conversational),
                "completion_ids": [list(ids) for ids in completion_ids[rows]],
                "trainer_state": None,
            }
            return _called(function, arguments, texts) if texts else _Called(np.zeros(0), {}, {})

        by_name = self._called(call)
        per_function = {name: one.rewards for name, one in by_name.items()}
        metrics = _joined(one.metrics for one in by_name.values())
        return RewardResult(
            rewards=self.total(per_function, completions),
            per_function=per_function,
            logged={name: sum(values) / len(values) for name, values in metrics.items()},
            extra=_joined(one.extra for one in by_name.values()),
            failures={n: one.failure for n, one in by_name.items() if one.failure is not None},
        )

    def _called(self, call: Callable[[RewardFunction], _Called]) -> dict[str, _Called]:
        """Call every function, and join what all processes found."""
        # all at once: most wait for processes of their own or for a network
        with ThreadPoolExecutor(len(self.functions)) as pool:
            apart = {f.name: pool.submit(call, f) for f in self.functions if not f.on_mesh}
            # but programs of several processes in one order
            found = {f.name: call(f) for f in self.functions if f.on_mesh}
            found |= self._gathered({name: one.result() for name, one in apart.items()})
        return {f.name: found[f.name] for f in self.functions}

    def _gathered(self, own: dict[str, _Called]) -> dict[str, _Called]:
        """Join what every process found of its rows; the same numbers in all of them."""
        plain = {name: {**vars(one), "rewards": one.rewards.tolist()} for name, one in own.items()}
        everyone = self.agree("rewards", plain)
        found = {}
        for name in own:
            parts = [told[name] for told in everyone]
            failures = [part["failure"] for part in parts if part["failure"] is not None]
            found[name] = _Called(
                np.concatenate([np.asarray(part["rewards"], np.float32) for part in parts]),
                _joined(part["metrics"] for part in parts),
                _joined(part["extra"] for part in parts),
                failures[0] if failures else None,
            )
        return found

    def total(
        self, per_function: Mapping[str, np.ndarray], completions: Sequence[str]
    ) -> np.ndarray:
        """Return the weighted sum `[B]` of rewards after shift and scale.

        Args:
          per_function: name to `[B]`, NaN where a function does not apply.
          completions: B texts, for messages.

        Raises:
          ValueError: a row to which no function applies.
        """
        values_FB = np.stack([per_function[f.name] for f in self.functions]).astype(np.float64)
        absent_FB = np.isnan(values_FB)
        idle = np.flatnonzero(absent_FB.all(axis=0))
        if idle.size:
            rows = [f"row {row}, {completions[row]!r:.60}" for row in idle]
            raise ValueError(
                f"every reward function returned None for {idle.size} completions{listed(rows)}\n"
                "At least one must apply to each row: return a number there, or leave such "
                "prompts out."
            )
        weights_F = np.asarray([f.weight for f in self.functions])
        values_FB -= np.asarray([f.shift for f in self.functions])[:, None]
        values_FB /= np.asarray([f.scale for f in self.functions])[:, None]
        return (weights_F @ np.where(absent_FB, 0.0, values_FB)).astype(np.float32)


def _check_sizes(completions: Sequence[Any], **others: Sequence[Any]) -> None:
    wrong = [
        f"{name} has {len(values)}"
        for name, values in others.items()
        if len(values) != len(completions)
    ]
    if wrong:
        raise ValueError(f"there are {len(completions)} completions, but {', '.join(wrong)} rows.")


def _shown(completions: Sequence[str], conversational: bool) -> list[Any]:
    if not conversational:
        return list(completions)
    return [[{"role": "assistant", "content": text}] for text in completions]


@dataclasses.dataclass(eq=False)
class _Called:
    """One function's rewards `[B]`, and what it logged; `failure` says why there are none."""

    rewards: np.ndarray
    metrics: dict[str, list[float]]
    extra: dict[str, list[Any]]
    failure: str | None = None


def _called(
    function: RewardFunction, arguments: dict[str, Any], completions: Sequence[str]
) -> _Called:
    found = _Called(np.zeros(0), {}, {})

    def log_metric(name: str, value: float) -> None:
        found.metrics.setdefault(name, []).append(float(value))

    def log_extra(column: str, values: Iterable[Any]) -> None:
        found.extra.setdefault(column, []).extend(values)

    given = {**arguments, "log_metric": log_metric, "log_extra": log_extra}
    try:
        returned = call_user(function.call, function.accepted(given), function.label)
        found.rewards = checked_values(returned, completions, function.label)
    except RewardError as error:
        if function.on_failure is None:
            raise
        default = np.full(len(completions), function.on_failure, np.float32)
        return _Called(default, {}, {}, str(error))
    return found


def _joined(parts: Iterable[Mapping[str, list[Any]]]) -> dict[str, list[Any]]:
    whole: dict[str, list[Any]] = {}
    for part in parts:
        for name, values in part.items():
            whole.setdefault(name, []).extend(values)
    return whole
