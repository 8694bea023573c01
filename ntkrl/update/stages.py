"""Stages as data: which parameters, how long, which optimizer and rate.

A stage's parameters are an ordered `(pattern, learning rate or None)` list over the whole tree;
None freezes. Classifier-first RL is two rows: the head alone, then everything. Freezing is a
partition: frozen leaves are not differentiated, and the optimizer (`optax.multi_transform` over
the trained leaves, one transform per distinct rate) never sees them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import jax
import optax

from ntkrl import trees
from ntkrl.types import Params, Policy

OPTIMIZERS: dict[str, Callable[[Stage, float], optax.GradientTransformation]] = {
    "adam": lambda stage, rate: optax.adam(rate, stage.b1, stage.b2, stage.epsilon),
    "adamw": lambda stage, rate: optax.adamw(
        rate, stage.b1, stage.b2, stage.epsilon, weight_decay=stage.weight_decay
    ),
    "sgd": lambda stage, rate: optax.sgd(rate),
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One row of the schedule.

    name: shown in metrics and figures.
    steps: rollout steps (RL) or batches (supervised) the stage lasts, ≥ 1.
    parameters: ordered `(pattern, learning rate > 0 or None for frozen)`; must cover all.
    optimizer: "adam", "adamw" or "sgd".
    max_grad_norm: clip the global norm over trained leaves, or None.
    b1, b2, epsilon, weight_decay: of the optimizer, where it has them.
    """

    name: str
    steps: int
    parameters: tuple[tuple[str, float | None], ...]
    optimizer: str = "adam"
    max_grad_norm: float | None = None
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self):
        problems = []
        if self.steps < 1:
            problems.append(f"steps must be ≥ 1, not {self.steps}")
        if self.optimizer not in OPTIMIZERS:
            problems.append(
                f"optimizer {self.optimizer!r} is not among {', '.join(sorted(OPTIMIZERS))}"
            )
        for pattern, rate in self.parameters:
            if rate is not None and not rate > 0:
                problems.append(
                    f"learning rate of {pattern!r} must be > 0, or None to freeze, not {rate}"
                )
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            problems.append(f"max_grad_norm must be > 0 or None, not {self.max_grad_norm}")
        if problems:
            raise ValueError(f"stage {self.name!r}: " + "; ".join(problems) + ".")


@dataclasses.dataclass(frozen=True, eq=False)
class StageProgram:
    """A stage bound to a params tree.

    stage: the row it came from.
    trained: one bool per leaf, in leaf order.
    optimizer: transforms gradients of the trained leaves only.
    head_alone: whether the features do not move, so that those the sampler read can be used.
    """

    stage: Stage
    trained: tuple[bool, ...]
    optimizer: optax.GradientTransformation
    head_alone: bool


def stage_program(stage: Stage, policy: Policy | None, params: Params) -> StageProgram:
    """Bind a stage to a model.

    Args:
      stage: the row.
      policy: says whether the head is tied; None for a reward model.
      params: the params tree (arrays or shapes).

    Raises:
      ValueError: patterns that do not cover the parameters or match none, a stage that trains
        nothing, or one that asks for the head of a tied model.
    """
    _refuse_tied_head(stage, policy, params)
    rates = trees.match(stage.parameters, params, f"stage {stage.name!r}")
    trained = tuple(rate is not None for rate in rates)
    if not any(trained):
        raise ValueError(f"stage {stage.name!r} freezes every parameter; give one a learning rate.")
    labels = jax.tree.unflatten(jax.tree.structure(params), [_label(rate) for rate in rates])
    labels, _ = trees.partition(labels, trained)
    make = OPTIMIZERS[stage.optimizer]
    grouped = optax.multi_transform(
        {_label(rate): make(stage, rate) for rate in set(rates) if rate is not None}, labels
    )
    head_alone = policy is not None and _moves_head_alone(policy, params, trained)
    if stage.max_grad_norm is None:
        return StageProgram(stage, trained, grouped, head_alone)
    clipped = optax.chain(optax.clip_by_global_norm(stage.max_grad_norm), grouped)
    return StageProgram(stage, trained, clipped, head_alone)


def _moves_head_alone(policy: Policy, params: Params, trained: tuple[bool, ...]) -> bool:
    moved = {name for name, moves in zip(trees.names(params), trained, strict=True) if moves}
    return not policy.tied and moved <= {policy.head_weight, policy.head_bias}


def _refuse_tied_head(stage: Stage, policy: Policy | None, params: Params) -> None:
    if policy is None or not policy.tied:
        return
    present = trees.names(params)
    for pattern, _ in stage.parameters:
        asks = re.fullmatch(pattern, "head/weight") is not None
        if asks and not any(re.fullmatch(pattern, name) for name in present):
            raise ValueError(
                f"stage {stage.name!r}: {pattern!r} asks for the head, but this model's head is "
                f"tied to the input embedding. Either train the shared matrix, by the pattern "
                f"{policy.head_weight!r} (its input role moves too), or give the head a copy of "
                "its own with --config.model.untie=true."
            )


def _label(rate: float | None) -> str:
    return f"rate {rate}"
