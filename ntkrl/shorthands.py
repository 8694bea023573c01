"""Short names of the settings that most runs change, on the command line and in Python."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from ntkrl.messages import did_you_mean, quoted

if TYPE_CHECKING:
    from ml_collections import ConfigDict

SHORTHANDS: dict[str, str] = {
    "model": "model.path: Hugging Face or PEFT directory, hub name or GGUF file",
    "data": "data.path: prompts, JSONL or another of TRL's formats; several with commas",
    "reward": "reward.function: FILE.py:NAME, a built-in name or a reward model; several with "
    "commas",
    "learning_rate": "rate of the last stage; all other rates keep their ratio to it",
    "steps": "rollout steps of all stages together; several stages keep their proportions",
    "seed": "seed of sampling, batch order and new parameters",
    "run_dir": "run_dir: directory that the run writes",
}
"""Meaning by name."""
PLACES = {
    "model": "model.path",
    "data": "data.path",
    "reward": "reward.function",
    "run_dir": "run_dir",
}
"""Settings that take the text of a shorthand."""


def apply_shorthands(config: ConfigDict, values: Mapping[str, Any]) -> None:
    """Set the settings that shorthands stand for, in place.

    Args:
      config: of a run.
      values: by name of SHORTHANDS; numbers may be text.

    Raises:
      ValueError: unknown names, values of the wrong kind, or stages that a value does not fit; all
        of them in one message.
    """
    problems = []
    for name, value in values.items():
        try:
            _apply(config, name, value)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems) + ".")


def _apply(config: ConfigDict, name: str, value: Any) -> None:
    if name not in SHORTHANDS:
        hint = did_you_mean(name, SHORTHANDS) or f"; there are {', '.join(SHORTHANDS)}"
        raise ValueError(f"{name} is not a shorthand{hint}")
    if name in PLACES:
        text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name}={quoted(value)}: expected text, for {PLACES[name]}")
        _set_field(config, PLACES[name], text)
    elif name == "seed":
        _set_field(config, name, _integer(name, value, 0))
    elif name == "steps":
        _set_steps(_stages(config, name), _integer(name, value, 1))
    else:
        _scale_rates(_stages(config, name), _rate(value))


def _set_field(config: ConfigDict, name: str, value: Any) -> None:
    section_name, _, field = name.rpartition(".")
    section = config.get(section_name) if section_name else config
    if section is None or field not in section:
        raise ValueError(f"{name} is not a setting of this config")
    section[field] = value


def _set_stage(stage: Any, **values: Any) -> None:
    """Set fields of a stage, which is a plain dictionary in a saved config."""
    unchecked = contextlib.nullcontext() if isinstance(stage, dict) else stage.ignore_type()
    with unchecked:  # fields that are None have no type
        stage.update(values)


def _integer(name: str, value: Any, least: int) -> int:
    """Return a whole number, which text may hold."""
    number = _number(value, int)
    if number is None or number < least:
        raise ValueError(f"{name}={quoted(value)}: expected a whole number of at least {least}")
    return number


def _rate(value: Any) -> float:
    rate = _number(value, float)
    if rate is None or not 0 < rate < math.inf:
        raise ValueError(
            f"learning_rate={quoted(value)}: expected a number above 0, for example 1e-5"
        )
    return rate


def _number(value: Any, kind: Callable[[Any], Any]) -> Any:
    """Return a value as `int` or `float`; None if it is no such number."""
    if isinstance(value, bool):
        return None
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if isinstance(value, str) or number == value else None


def _stages(config: ConfigDict, name: str) -> Sequence[Any]:
    stages = config.stages if "stages" in config else ()
    if not stages:
        raise ValueError(f"{name}: the config has no stages")
    return stages


def _set_steps(stages: Sequence[Any], total: int) -> None:
    """Divide rollout steps among stages, in proportion to their steps, or to their epochs."""
    if total < len(stages):
        raise ValueError(f"steps={total}: {len(stages)} stages need at least a step each")
    lengths = [stage["steps"] for stage in stages]
    if len(stages) == 1:
        lengths = [1]
    elif all(length is None for length in lengths):
        lengths = [stage["epochs"] for stage in stages]
    if any(length is None or not length > 0 for length in lengths):
        raise ValueError(
            f"steps={total}: not every stage has a length in steps, or every stage in epochs; set "
            "them by --config.stages[0].steps=… and so on"
        )
    for stage, steps in zip(stages, _shares(lengths, total), strict=True):
        _set_stage(stage, steps=steps, epochs=None)


def _shares(lengths: Sequence[float], total: int) -> list[int]:
    """Divide a total in proportion to lengths, by largest remainders, each share at least 1."""
    length = sum(Fraction(each) for each in lengths)
    exact = [Fraction(each) * total / length for each in lengths]
    shares = [max(math.floor(share), 1) for share in exact]
    while sum(shares) != total:
        missing = 1 if sum(shares) < total else -1
        movable = [i for i, share in enumerate(shares) if share + missing >= 1]
        shares[max(movable, key=lambda i: missing * (exact[i] - shares[i]))] += missing
    return shares


def _scale_rates(stages: Sequence[Any], rate: float) -> None:
    """Set the rate of the last stage's last trained pattern; the others keep their ratio to it."""
    last = [value for _, value in stages[-1]["parameters"] if value]
    if not last:
        raise ValueError(
            f"learning_rate={rate!r}: the last stage trains nothing; set its parameters by "
            f"--config.stages[{len(stages) - 1}].parameters=…"
        )

    def scaled(value: float | None) -> float | None:
        # exact in decimals, so that 1e-5 becomes 1e-4 and not 9.999999999999999e-05
        return value and float(Fraction(str(value)) * Fraction(str(rate)) / Fraction(str(last[-1])))

    for stage in stages:
        rows = tuple((pattern, scaled(value)) for pattern, value in stage["parameters"])
        _set_stage(stage, parameters=rows)
