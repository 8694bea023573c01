"""Arguments of the functions of a step: each is a value that another function returned."""

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax

from ntkrl import training
from ntkrl.generate import RewardedRollout, SampledTexts
from ntkrl.messages import quoted
from ntkrl.types import UpdateBatch
from ntkrl.update import StepResult

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
SOURCES: dict[type, str] = {
    training.RunPosition: "the position that start, begin, advantages, update or end returned",
    SampledTexts: "what sample returned",
    RewardedRollout: "what reward returned",
    training.StepBatches: "the second value that advantages returned",
    UpdateBatch: "one of data.batches",
    training.StepSnapshot: "what snapshot returned",
    StepResult: "the second value that update returned",
    training.StepReading: "what probe returned",
}
"""Functions that return a value, by its type."""
IN_A_STEP = ("sample", "reward", "advantages")
"""Functions that draw by the PRNG key of a step that has begun."""


def checked(method: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Return a method that refuses values which no function of a step returned for its argument."""
    hints, signature = typing.get_type_hints(method), inspect.signature(method)
    begun = method.__name__ in IN_A_STEP
    several = {name: _members(hint) for name, hint in hints.items() if name != "return"}
    kinds = {name: members for name, members in several.items() if set(members) & SOURCES.keys()}

    @functools.wraps(method)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        problems = [
            problem
            for name, value in signature.bind(*args, **kwargs).arguments.items()
            if name in kinds and (problem := _problem(name, value, kinds[name], begun))
        ]
        if problems:
            raise ValueError(f"{method.__name__}: {'; '.join(problems)}.")
        return method(*args, **kwargs)

    return call


def _members(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, or a type alone."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _problem(name: str, value: Any, kinds: tuple[Any, ...], begun: bool) -> str | None:
    """Return what is wrong with the value of an argument, or None."""
    if not isinstance(value, kinds):
        source = next(SOURCES[kind] for kind in kinds if kind in SOURCES)
        shown = "None" if value is None else f"{quoted(value)} ({type(value).__name__})"
        return f"{name} is {shown}; pass {source}"
    if not isinstance(value, training.RunPosition):
        return None
    arrays = jax.tree.leaves(value.state)
    if any(isinstance(each, jax.Array) and each.is_deleted() for each in arrays):
        return f"{name} was donated to update; pass the position that update returned"
    if begun and value.key is None:
        return f"{name} has begun no rollout step; pass the position that begin returned"
    return None
