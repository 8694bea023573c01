"""Stages as data: trained parameters, length, optimizer, learning rates and schedule.

A stage's parameters are an ordered `(pattern, learning rate or None)` list that covers the tree;
None freezes. Classifier-first RL has two stages: the head, then all parameters. Freezing is a
partition: frozen leaves are not differentiated and not part of the optimizer's state.

Of a model with low-rank adapters a pattern that matches any of them, such as ".*", trains adapters
alone; one that matches none, such as "head/.*", trains parameters of the base.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import optax

from ntkrl import models, trees
from ntkrl.messages import not_among
from ntkrl.types import Params, Policy, Scorer
from ntkrl.update import optimizers
from ntkrl.update.optimizers import OPTIMIZERS, OPTIONS, SCHEDULES

RATES = ("b1", "b2", "momentum")
OPTIMIZER_STATES = ("reset", "keep")
ROUNDING_LOSS_LIMIT = 0.1
HIGH_RATES = (0.1, 100.0)
"""Learning rates above which a stage is warned of: of normalised steps, and of sgd."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of the schedule.

    name: used in metrics and figures.
    steps: most rollout steps (RL) or batches (supervised), ≥ 1, or None.
    parameters: ordered `(pattern, learning rate > 0 or None for frozen)`; must cover all.
    epochs: most passes over the prompts, one batch of them per rollout step, > 0, or None. The
      shorter of steps and epochs applies, and one of them is required.
    optimizer: a key of OPTIMIZERS.
    optimizer_state: "reset", or "keep": moments and counts of parameters that the previous stage
      trained too, by the same optimizer, are transferred.
    max_grad_norm: clip the global norm over trained leaves, or None.
    b1, b2, epsilon: of Adam, also for the parameters that muon leaves to AdamW.
    momentum: factor of sgd and muon in [0, 1); None: 0 and 0.95.
    weight_decay: rate × weight_decay × θ is subtracted from every trained θ.
    decay: ordered `(pattern, weight_decay)` instead of weight_decay, or None; must cover all.
    schedule: "constant", "linear" or "cosine" decay over the stage's optimizer steps.
    warmup_steps: optimizer steps of linear warmup before, ≥ 0.
    final_fraction: final rate of linear and cosine relative to the peak, in [0, 1].
    plateau_window: stop when the mean reward of the last `plateau_window` rollout steps does not
      exceed that of as many before by more than `plateau_tolerance` (≥ 0); None: never.
    kl_budget: stop when a rollout step's `kl` exceeds it (nats per token, > 0); None: never.
    """

    name: str
    steps: int | None
    parameters: tuple[tuple[str, float | None], ...]
    epochs: float | None = None
    optimizer: str = "adam"
    optimizer_state: str = "reset"
    max_grad_norm: float | None = None
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    momentum: float | None = None
    weight_decay: float = 0.0
    decay: tuple[tuple[str, float], ...] | None = None
    schedule: str = "constant"
    warmup_steps: int = 0
    final_fraction: float = 0.0
    plateau_window: int | None = None
    plateau_tolerance: float = 0.0
    kl_budget: float | None = None

    def __post_init__(self):
        problems = [*_length(self), *_optimizer(self), *_schedule(self), *_rules(self)]
        if problems:
            raise ValueError(f"stage {self.name!r}: " + "; ".join(problems) + ".")

    @property
    def max_steps(self) -> int:
        """The most rollout steps; the length must be in steps (see `in_steps`)."""
        assert self.steps is not None
        return self.steps

    def in_steps(self, steps_per_epoch: int) -> Stage:
        """Return the stage with its length in rollout steps only, fractions rounded up."""
        if self.epochs is None:
            return self
        # 0.07 · 100 is a little more than 7
        steps = math.ceil(self.epochs * steps_per_epoch - 1e-9)
        steps = steps if self.steps is None else min(steps, self.steps)
        return dataclasses.replace(self, steps=steps, epochs=None)


def _length(stage: Stage) -> Iterator[str]:
    if stage.steps is None and stage.epochs is None:
        yield "give steps or epochs; rules may end a stage before, never after"
    if stage.steps is not None and stage.steps < 1:
        yield f"steps must be ≥ 1 or None, not {stage.steps}"
    if stage.epochs is not None and not stage.epochs > 0:
        yield f"epochs must be > 0 or None, not {stage.epochs}"


def _optimizer(stage: Stage) -> Iterator[str]:
    values = vars(stage)
    for pattern, rate in stage.parameters:
        if rate is not None and not 0 < rate < math.inf:
            yield f"learning rate of {pattern!r} must be > 0, or None to freeze, not {rate}"
    if stage.max_grad_norm is not None and not stage.max_grad_norm > 0:
        yield f"max_grad_norm must be > 0 or None, not {stage.max_grad_norm}"
    for name in RATES:
        if values[name] is not None and not 0 <= values[name] < 1:
            yield f"{name} must be in [0, 1), not {values[name]}"
    if not stage.epsilon > 0:
        yield f"epsilon must be > 0, not {stage.epsilon}"
    rows = () if stage.decay is None else stage.decay
    for pattern, decay in (("weight_decay", stage.weight_decay), *rows):
        if not decay >= 0:
            yield f"decay of {pattern!r} must be ≥ 0, not {decay}"
    if stage.decay is not None and stage.weight_decay != 0:
        yield "give weight_decay or decay, not both"
    if stage.optimizer_state not in OPTIMIZER_STATES:
        yield f"optimizer_state {stage.optimizer_state!r} is not among reset, keep"
    if stage.optimizer not in OPTIMIZERS:
        yield not_among("optimizer", stage.optimizer, sorted(OPTIMIZERS))
        return
    defaults = {field.name: field.default for field in dataclasses.fields(stage)}
    read = optimizers.accepted(stage.optimizer)
    unread = [name for name in OPTIONS if name not in read and values[name] != defaults[name]]
    if unread:
        yield f"optimizer {stage.optimizer!r} has no {', '.join(unread)} (it has {', '.join(read)})"


def _schedule(stage: Stage) -> Iterator[str]:
    if stage.schedule not in SCHEDULES:
        yield not_among("schedule", stage.schedule, SCHEDULES)
    if stage.warmup_steps < 0:
        yield f"warmup_steps must be ≥ 0, not {stage.warmup_steps}"
    if not 0 <= stage.final_fraction <= 1:
        yield f"final_fraction must be in [0, 1], not {stage.final_fraction}"
    if stage.schedule == "constant" and stage.final_fraction != 0:
        yield "a constant schedule has no final_fraction; use linear or cosine"


def _rules(stage: Stage) -> Iterator[str]:
    if stage.plateau_window is not None and stage.plateau_window < 1:
        yield f"plateau_window must be ≥ 1 or None, not {stage.plateau_window}"
    if not stage.plateau_tolerance >= 0:
        yield f"plateau_tolerance must be ≥ 0, not {stage.plateau_tolerance}"
    if stage.plateau_window is None and stage.plateau_tolerance != 0:
        yield "plateau_tolerance needs a plateau_window"
    if stage.kl_budget is not None and not stage.kl_budget > 0:
        yield f"kl_budget must be > 0 or None, not {stage.kl_budget}"


def rate_warnings(stages: Sequence[Stage]) -> list[str]:
    """Return a warning for each learning rate with which nothing is known to train."""
    return [
        f"warning: stage {stage.name!r}: the learning rate of {pattern!r} is {rate:g}; "
        f"{stage.optimizer} usually has less than {limit:g}"
        for stage in stages
        for limit in (HIGH_RATES[stage.optimizer == "sgd"],)
        for pattern, rate in stage.parameters
        if rate is not None and rate > limit
    ]


def check_stages(stages: Sequence[Stage]) -> None:
    """Check the optimizer states that stages keep from the previous one.

    Raises:
      ValueError: the first stage keeps a state, or a stage keeps that of a different optimizer, or
        of different decay rates of its moments.
    """
    problems = []
    for before, stage in zip((None, *stages), stages, strict=False):
        if stage.optimizer_state != "keep":
            continue
        if before is None:
            problems.append(f"stage {stage.name!r} is the first and has no optimizer_state to keep")
            continue
        # moments and counts are only consistent under the same decay rates
        for name in ("optimizer", *RATES):
            value, other = vars(stage)[name], vars(before)[name]
            if value != other:
                problems.append(
                    f"stage {stage.name!r} cannot keep the optimizer_state of stage "
                    f"{before.name!r}: its {name} is {value!r}, the other's {other!r}; use one for "
                    "both, or optimizer_state 'reset'"
                )
    if problems:
        raise ValueError("; ".join(problems) + ".")


@dataclasses.dataclass(frozen=True, eq=False)
class BoundStage:
    """A stage bound to a params tree.

    stage: its settings.
    rates: learning rate or None per leaf, in leaf order.
    optimizer: transforms gradients of the trained leaves only.
    head_alone: only the head is trained, so that features stored by the sampler stay valid.
    learning_rate: rate of the first trained pattern, by the stage's past optimizer steps.
    """

    stage: Stage
    rates: tuple[float | None, ...]
    optimizer: optax.GradientTransformation
    head_alone: bool
    learning_rate: Callable[[int], float]

    @property
    def trained(self) -> tuple[bool, ...]:
        """One bool per leaf, in leaf order."""
        return tuple(rate is not None for rate in self.rates)

    def warning(self, params: Params) -> str | None:
        """Return a warning if rounding loses the updates of a tenth of the trained entries.

        Updates of all optimizers but sgd are at most about the learning rate: so a lower bound on
        the loss is known before the first rollout, at no cost to the step.

        Args:
          params: at the start of the stage.
        """
        if self.stage.optimizer == "sgd":
            return None
        trained, _ = trees.partition(params, self.trained)
        leaves, rates = jax.tree.leaves(trained), [rate for rate in self.rates if rate is not None]
        lost = sum(
            optimizers.rounding_loss(leaf, rate) * leaf.size
            for leaf, rate in zip(leaves, rates, strict=True)
        ) / sum(leaf.size for leaf in leaves)
        if lost <= ROUNDING_LOSS_LIMIT:
            return None
        dtypes = ", ".join(sorted({str(leaf.dtype) for leaf in leaves}))
        return (
            f"warning: stage {self.stage.name!r}: {lost:.0%} of the trained {dtypes} entries "
            f"cannot move: updates as large as the learning rate ({max(rates):.3g}) are below half "
            "a unit in their last place. Keep the masters in float32 (model.dtype=float32; "
            "model.compute_dtype may be bfloat16), or raise the rate."
        )


def bind_stage(
    stage: Stage, network: Policy | Scorer, params: Params, updates_per_step: int = 1
) -> BoundStage:
    """Bind a stage to a model.

    Args:
      stage: its settings, the length in steps.
      network: declares stacked parameters and whether the head is tied.
      params: the params tree (arrays or shapes).
      updates_per_step: optimizer steps per rollout step, ≥ 1.

    Raises:
      ValueError: patterns that do not cover the parameters or match none, a stage that trains
        nothing, a head that is tied to the embedding, or a warm-up longer than the stage.
    """
    _refuse_tied_head(stage, network, params)
    label = f"stage {stage.name!r}"
    rates = _rates(stage, params, label)
    rows = ((".*", stage.weight_decay),) if stage.decay is None else stage.decay
    decays = trees.match(rows, params, f"{label}, decay")
    trained = tuple(rate is not None for rate in rates)
    if not any(trained):
        raise ValueError(f"{label} freezes every parameter; give one a learning rate.")
    updates = stage.max_steps * updates_per_step
    if stage.warmup_steps > updates:
        raise ValueError(
            f"{label} lasts {updates} optimizer steps, fewer than its warmup_steps = "
            f"{stage.warmup_steps}."
        )
    schedule = optimizers.rate_schedule(
        stage.schedule, updates, stage.warmup_steps, stage.final_fraction
    )
    treatments = {
        name: optimizers.Treatment(rate, decay, name.startswith(_prefixes(network)))
        for name, rate, decay in zip(trees.names(params), rates, decays, strict=True)
    }
    leaves, _ = trees.partition(params, trained)
    options = {name: vars(stage)[name] for name in OPTIONS}
    first = next(rate for _, rate in stage.parameters if rate is not None)
    return BoundStage(
        stage,
        tuple(rates),
        optimizers.make_optimizer(
            stage.optimizer, options, treatments, leaves, schedule, stage.max_grad_norm
        ),
        head_alone=isinstance(network, Policy) and _is_head(network, leaves),
        learning_rate=lambda count: first * float(schedule(count)),
    )


def _rates(stage: Stage, params: Params, label: str) -> list[Any]:
    """Return the rate of every leaf; a row that matches adapters freezes the base's leaves."""
    rows = [(pattern, (pattern, rate)) for pattern, rate in stage.parameters]
    matched, names = trees.match(rows, params, label), trees.names(params)
    adapters = [name for name in names if models.is_adapter(name)]
    general = {
        pattern
        for pattern, _ in stage.parameters
        if any(re.fullmatch(pattern, name) for name in adapters)
    }
    return [
        rate if pattern not in general or models.is_adapter(name) else None
        for name, (pattern, rate) in zip(names, matched, strict=True)
    ]


def _is_head(policy: Policy, trained: Params) -> bool:
    return not policy.tied and {*trees.names(trained)} <= {policy.head_weight, policy.head_bias}


def bind_stages(
    stages: Sequence[Stage], network: Policy | Scorer, params: Params, updates_per_step: int
) -> list[BoundStage]:
    """Bind every stage of a run (see `bind_stage`).

    Raises:
      ValueError: all problems of all stages, or a stage that keeps the optimizer_state of
        parameters that the stage before did not train, in one message.
    """
    bound_stages, problems = [], []
    for stage in stages:
        try:
            bound_stages.append(bind_stage(stage, network, params, updates_per_step))
        except ValueError as error:
            problems.append(str(error))
    if not problems:
        for before, after in itertools.pairwise(bound_stages):
            shared = any(map(operator.and_, before.trained, after.trained))
            if after.stage.optimizer_state == "keep" and not shared:
                problems.append(
                    f"stage {after.stage.name!r} keeps the optimizer_state of stage "
                    f"{before.stage.name!r}, which trains none of its parameters; use 'reset'."
                )
    if problems:
        raise ValueError("\n".join(problems))
    return bound_stages


def _prefixes(network: Policy | Scorer) -> tuple[str, ...]:
    return tuple(f"{prefix}/" for prefix in network.stacked)


def _refuse_tied_head(stage: Stage, network: Policy | Scorer, params: Params) -> None:
    if not isinstance(network, Policy) or not network.tied:
        return
    present = trees.names(params)
    for pattern, _ in stage.parameters:
        is_head = re.fullmatch(pattern, "head/weight") is not None
        if is_head and not any(re.fullmatch(pattern, name) for name in present):
            raise ValueError(
                f"stage {stage.name!r}: {pattern!r} asks for the head, but this model's head is "
                f"tied to the input embedding. Either train the shared matrix, by the pattern "
                f"{network.head_weight!r} (its input role moves too), or give the head a copy of "
                "its own with --config.model.untie=true."
            )
