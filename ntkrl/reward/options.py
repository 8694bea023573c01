"""Options of built-in reward functions: replaced defaults, and lengths that follow the budget."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ntkrl.reward.built_in import BUILT_IN

SOFT_TOKENS = 128  # of soft_overlong's slope; half the budget if that is less


def with_options(name: str, options: Mapping[str, Any]) -> Callable[..., Any]:
    """Return a built-in function with some of its defaults replaced.

    Raises:
      ValueError: options that the function does not have.
    """
    function: Any = BUILT_IN[name]
    configurable = dataclasses.is_dataclass(function)
    known: Mapping[str, Any] = inspect.signature(function).parameters
    if configurable:
        known = {field.name: field for field in dataclasses.fields(function)}
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise ValueError(f"reward.options.{name} has no {', '.join(unknown)}.")
    if configurable:
        return dataclasses.replace(function, **options)
    return functools.partial(function, **options) if options else function


def fit_budget(
    options: Mapping[str, Mapping[str, Any]], functions: Sequence[str], budget: int
) -> dict[str, dict[str, Any]]:
    """Return options in which lengths that are None follow the budget of a completion.

    Args:
      options: `{built-in function: {argument: value}}`.
      functions: names of the functions in use, whose lengths are checked.
      budget: rollout.max_completion_tokens.

    Raises:
      ValueError: lengths that no completion reaches, or two that exclude each other.
    """
    fitted = {name: dict(values) for name, values in options.items()}
    problems = []
    if "soft_overlong" in functions:
        values = fitted.setdefault("soft_overlong", {})
        problems += _fit_overlong(values, budget)
    if "cosine_length" in functions:
        values = fitted.setdefault("cosine_length", {})
        problems += _fit_cosine(values, budget)
    if problems:
        raise ValueError("; ".join(f"reward.options.{problem}" for problem in problems) + ".")
    return fitted


def _fit_overlong(values: dict[str, Any], budget: int) -> list[str]:
    """Set lengths that are None; return what is wrong with the others."""
    limit = _pop_none(values, "max_completion_len", budget)
    cache = _pop_none(values, "soft_punish_cache", min(SOFT_TOKENS, max(limit // 2, 1)))
    values |= {"max_completion_len": limit, "soft_punish_cache": cache}
    problems = []
    if not 1 <= limit <= budget:
        problems.append(
            f"soft_overlong.max_completion_len must be 1 to rollout.max_completion_tokens = "
            f"{budget}, not {limit}: completions are cut before they reach it; set it to None to "
            "follow the budget"
        )
    if not 1 <= cache <= max(limit, 1):
        problems.append(
            f"soft_overlong.soft_punish_cache must be 1 to max_completion_len = {limit}, not "
            f"{cache}; None is {SOFT_TOKENS}, or half of a shorter budget"
        )
    return problems


def _fit_cosine(values: dict[str, Any], budget: int) -> list[str]:
    characters = _pop_none(values, "max_len", None)
    tokens = _pop_none(values, "max_tokens", budget if characters is None else None)
    values |= {"max_tokens": tokens} | ({} if characters is None else {"max_len": characters})
    if characters is not None and tokens is not None:
        return ["cosine_length takes max_len (characters) or max_tokens, not both"]
    if tokens is not None and not 1 <= tokens <= budget:
        return [
            f"cosine_length.max_tokens must be 1 to rollout.max_completion_tokens = {budget}, not "
            f"{tokens}; set it to None to follow the budget"
        ]
    if characters is not None and characters < 1:
        return [f"cosine_length.max_len must be ≥ 1, not {characters}"]
    return []


def _pop_none(values: dict[str, Any], name: str, default: Any) -> Any:
    value = values.pop(name, None)
    return default if value is None else value
