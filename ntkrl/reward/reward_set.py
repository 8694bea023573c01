"""Reward functions and their weighted sum, and files of rewards for its normalisation.

Normalised rewards are (reward − mean) / √(variance + 1e-8), with the unbiased variance over all
rewards of a file that `ntkrl evaluate` wrote, as in the recipe of princeton-pli/what-makes-good-rm.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np

from ntkrl import durable_files
from ntkrl.json_files import MAX_RECORD_BYTES, read_json
from ntkrl.json_values import from_json, to_json
from ntkrl.messages import did_you_mean, listed, with_places
from ntkrl.reward.contract import CONTRACT, CallLog, RewardError, RewardFunction, TrainerState

EPSILON = 1e-8
ANSWERS = ("answer", "solution", "ground_truth", "label", "target", "reference", "gold")
"""Usual names of one column: the right answer."""
FORM = 'expected {"rewards": {"NAME": [numbers]}}, as `ntkrl evaluate` writes it'


@dataclasses.dataclass(frozen=True, eq=False)
class RewardResult:
    """Rewards of a batch of completions.

    rewards: `[B]` float32, weighted sum over the functions that apply to the row.
    per_function: name to `[B]` float32, unweighted, NaN where the function does not apply.
    logged: name to the mean of the values of this call's `log_metric`.
    extra: name to the values of this call's `log_extra`, in order.
    failures: name of a function whose call failed, to the cause; its rewards are `on_failure`.
    """

    rewards: np.ndarray
    per_function: dict[str, np.ndarray]
    logged: dict[str, float]
    extra: dict[str, list[Any]]
    failures: dict[str, str]


@dataclasses.dataclass(eq=False)
class _FunctionResult:
    """Rewards `[B]` of one function, the values it logged, and the cause if its call failed."""

    rewards: np.ndarray
    metrics: dict[str, list[float]]
    extra: dict[str, list[Any]]
    failure: str | None = None


@dataclasses.dataclass(frozen=True)
class RewardSet:
    """Reward functions whose weighted sum is the reward.

    functions: one or more, with different names.
    local_slice, allgather_object: of `runtime`, which workers must not import; the prompts that
      this process calls the functions for, and the exchange of results between processes.
    place: from a completion's number to the name of its row, such as "prompts.jsonl:6".
    trainer_state: progress of the run, see `during`; None before it is known.
    """

    functions: tuple[RewardFunction, ...]
    local_slice: Callable[[int], slice] = lambda count: slice(0, count)
    allgather_object: Callable[[str, Any], list[Any]] = lambda name, value: [value]
    place: Callable[[int], str] = lambda row: f"row {row}"
    trainer_state: TrainerState | None = None

    def __post_init__(self) -> None:
        if not self.functions:
            raise ValueError("no reward function given; name at least one, such as 'expressions'.")
        by_name: dict[str, list[str]] = {}
        for function in self.functions:
            by_name.setdefault(function.name, []).append(function.label)
        for name, labels in by_name.items():
            if len(labels) > 1:
                raise ValueError(
                    f"{len(labels)} reward functions are named {name!r} ({', '.join(labels)}); "
                    "rename all but one, since metrics are stored by name."
                )

    def during(self, trainer_state: TrainerState) -> Self:
        """Return the set with the progress of the run that its functions receive."""
        return dataclasses.replace(self, trainer_state=trainer_state)

    def check_columns(self, columns: Iterable[str]) -> None:
        """Check that the named columns of the prompt set provide every required parameter.

        Raises:
          ValueError: a column has a name of the contract, or a required parameter is not a
            column; lists all of them.
        """
        columns = tuple(columns)
        problems = [
            f"the column {name!r} has a name that the contract uses; rename it"
            for name in columns
            if name in CONTRACT
        ]
        for function in self.functions:
            for name in function.missing(columns):
                hint = _nearest_column(name, columns)
                problems.append(f"{function.label} requires {name!r}, which is not a column{hint}")
        if problems:
            raise ValueError(
                f"reward functions and columns do not fit{listed(problems)}\n"
                f"Columns are: {', '.join(columns) if columns else 'none'}; always provided are "
                f"{', '.join(CONTRACT)}. Add the column to the prompt file or a default to the "
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
        """Reward completions; each of several processes calls the functions for its own prompts.

        Args:
          prompts: B prompts, each repeated for its completions; lists of messages if
            conversational.
          completions: B texts.
          completion_ids: B lists of token ids.
          columns: name to B values.
          conversational: pass each completion as one assistant message.
          group: completions per prompt, in consecutive rows; a call gets complete groups.

        Raises:
          ValueError: arguments of different lengths, columns that do not fit, a function that
            fails, or a row to which no function applies.
        """
        self.check_columns(columns)
        _check_sizes(completions, prompts=prompts, completion_ids=completion_ids, **columns)
        part = self.local_slice(len(completions) // group)
        local_rows = slice(part.start * group, part.stop * group)

        def score(function: RewardFunction) -> _FunctionResult:
            rows = slice(None) if function.on_mesh else local_rows
            texts = completions[rows]
            # a copy for each function, so that none can change the arguments of another
            arguments: dict[str, Any] = {
                name: list(values[rows]) for name, values in columns.items()
            }
            arguments |= {
                "prompts": list(prompts[rows]),
                "completions": completion_values(texts, conversational),
                "completion_ids": [list(ids) for ids in completion_ids[rows]],
                "trainer_state": self.trainer_state,
            }
            if not texts:
                return _FunctionResult(np.zeros(0), {}, {})
            first = 0 if function.on_mesh else local_rows.start
            return _call_function(function, arguments, texts, lambda row: self.place(first + row))

        results = self._score_all(score)
        per_function = {name: result.rewards for name, result in results.items()}
        metrics = _concatenate(result.metrics for result in results.values())
        return RewardResult(
            rewards=self.total(per_function, completions),
            per_function=per_function,
            logged={name: sum(values) / len(values) for name, values in metrics.items()},
            extra=_concatenate(result.extra for result in results.values()),
            failures={n: r.failure for n, r in results.items() if r.failure is not None},
        )

    def _score_all(
        self, score: Callable[[RewardFunction], _FunctionResult]
    ) -> dict[str, _FunctionResult]:
        """Score with every function, and gather the results of all processes."""
        # in threads, since most wait for worker processes or for a network
        with ThreadPoolExecutor(len(self.functions)) as pool:
            pending = {f.name: pool.submit(score, f) for f in self.functions if not f.on_mesh}
            # programs of several processes must run in one order
            results = {f.name: score(f) for f in self.functions if f.on_mesh}
            results |= self._gather({name: future.result() for name, future in pending.items()})
        return {f.name: results[f.name] for f in self.functions}

    def _gather(self, local: dict[str, _FunctionResult]) -> dict[str, _FunctionResult]:
        """Concatenate the rows of all processes; the same numbers in each of them."""
        values = {
            name: {
                **vars(result),
                "rewards": result.rewards.tolist(),
                "extra": to_json(result.extra),
            }
            for name, result in local.items()
        }
        by_process = self.allgather_object("rewards", values)
        results = {}
        for name in local:
            parts = [process[name] for process in by_process]
            failures = [part["failure"] for part in parts if part["failure"] is not None]
            results[name] = _FunctionResult(
                np.concatenate([np.asarray(part["rewards"], np.float32) for part in parts]),
                _concatenate(part["metrics"] for part in parts),
                _concatenate(from_json(part["extra"]) for part in parts),
                failures[0] if failures else None,
            )
        return results

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
        empty = np.flatnonzero(absent_FB.all(axis=0))
        if empty.size:
            rows = [f"{self.place(row)}, {completions[row]!r:.60}" for row in empty.tolist()]
            raise ValueError(
                f"every reward function returned None for {empty.size} completions{listed(rows)}\n"
                "At least one must apply to each row: return a number there, or remove such "
                "prompts."
            )
        weights_F = np.asarray([f.weight for f in self.functions])
        values_FB -= np.asarray([f.shift for f in self.functions])[:, None]
        values_FB /= np.asarray([f.scale for f in self.functions])[:, None]
        weighted_FB = weights_F[:, None] * np.where(absent_FB, 0.0, values_FB)
        # function by function: equal rows stay equal, as columns of a BLAS product need not
        return np.sum(weighted_FB, axis=0).astype(np.float32)


def _nearest_column(name: str, columns: Sequence[str]) -> str:
    """Return a question that names the column of the same meaning, or else of near spelling."""
    same = [column for column in columns if name in ANSWERS and column in ANSWERS]
    if same:
        return f"; did you mean {same[0]!r}?"
    return did_you_mean(name, columns) or did_you_mean(name, CONTRACT, cutoff=0.8)


def _call_function(
    function: RewardFunction,
    arguments: dict[str, Any],
    completions: Sequence[str],
    place: Callable[[int], str],
) -> _FunctionResult:
    """Call a function; a failure is its default reward in every row, if it has one."""
    log = CallLog()
    try:
        arguments |= {"log_metric": log.log_metric, "log_extra": log.log_extra}
        return _FunctionResult(function.rewards(arguments, completions), log.metrics, log.extra)
    except RewardError as error:
        reason = with_places(str(error), place)
        if function.on_failure is None:
            raise RewardError(reason) from error.__cause__ or error
        default = np.full(len(completions), function.on_failure, np.float32)
        return _FunctionResult(default, {}, {}, reason)


def _check_sizes(completions: Sequence[Any], **others: Sequence[Any]) -> None:
    wrong = [
        f"{name} has {len(values)}"
        for name, values in others.items()
        if len(values) != len(completions)
    ]
    if wrong:
        raise ValueError(f"there are {len(completions)} completions, but {', '.join(wrong)} rows.")


def completion_values(completions: Sequence[str], conversational: bool) -> list[Any]:
    """Return texts as rows have them: as they are, or each a list of one assistant message."""
    if not conversational:
        return list(completions)
    return [[{"role": "assistant", "content": text}] for text in completions]


def _concatenate(parts: Iterable[Mapping[str, list[Any]]]) -> dict[str, list[Any]]:
    joined: dict[str, list[Any]] = {}
    for part in parts:
        for name, values in part.items():
            joined.setdefault(name, []).extend(values)
    return joined


def write_rewards(path: Path, per_function: Mapping[str, Sequence[float] | np.ndarray]) -> None:
    """Write rewards by function name as JSON, NaN (not applicable) as null."""
    values_of = {
        name: [None if value != value else float(value) for value in values]
        for name, values in per_function.items()
    }
    durable_files.save_text(path, json.dumps({"rewards": values_of}) + "\n")


def read_normalisation(path: str | Path) -> dict[str, tuple[float, float]]:
    """Return `{function: (shift, scale)}` of a file of rewards.

    Raises:
      ValueError: no such file, another form, or fewer than two rewards of a function.
    """
    normalisation = {}
    for name, values in _load(Path(path), "reward.normalisation").items():
        listed_values = values if isinstance(values, list) else []
        numbers = [value for value in listed_values if isinstance(value, int | float)]
        if len(numbers) < 2 or not np.isfinite(numbers).all():
            raise ValueError(
                f"reward.normalisation {path}: {name!r} needs at least two finite rewards; {FORM}."
            )
        scale = float(np.sqrt(np.var(numbers, ddof=1) + EPSILON))
        normalisation[name] = (float(np.mean(numbers)), scale)
    return normalisation


def read_rewards(path: Path, setting: str) -> dict[str, np.ndarray]:
    """Read `{function: rewards [B]}` (float32, NaN where not applicable) of `write_rewards`.

    Raises:
      ValueError: no such file, or another form; the message names the config's `setting`.
    """
    rewards = {}
    for name, values in _load(path, setting).items():
        if not isinstance(values, list) or not all(
            value is None or isinstance(value, int | float) for value in values
        ):
            raise ValueError(f"{setting} {path}: {name!r} is not a list of numbers; {FORM}.")
        rewards[name] = np.array(values, np.float32)
    return rewards


def _load(path: Path, setting: str) -> dict[str, Any]:
    try:
        content = read_json(path, MAX_RECORD_BYTES, finite=False)
    except ValueError as error:
        raise ValueError(f"{setting} {path} cannot be read ({error}); {FORM}.") from error
    rewards = content["rewards"] if isinstance(content, dict) and "rewards" in content else None
    if not isinstance(rewards, dict) or not rewards:
        raise ValueError(f"{setting} {path} has no rewards; {FORM}.")
    return rewards
