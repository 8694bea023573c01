"""Optimizers by optax, one state per parameter, and what a stage hands to the next of it.

The update of a parameter is  rate × schedule(n) × direction,  where the direction is optax's update
at rate 1 (decay included) and n counts the stage's optimizer steps. Each parameter has moments and
a count of its own, so a stage can hand them to the next for some parameters and not for others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ntkrl import trees
from ntkrl.types import Array, Params

SCHEDULES = ("constant", "linear", "cosine")
MUON_MOMENTUM, MUON_RMS = 0.95, 0.2
"""Momentum of Jordan's modded-nanogpt; RMS of an update at rate 1 of Liu et al. 2502.16982, which
is AdamW's, so that one rate suits the matrices and what is left to Adam."""


class Optimizer(NamedTuple):
    """A row of OPTIMIZERS.

    make: `(decay, **options) -> transformation` at rate 1.
    options: the fields of Stage it reads; weight_decay and decay arrive as `decay`.
    by_layer: it looks at whole matrices, so every layer of a stacked parameter is one of its own.
    rest: row for what is no matrix of a layer, or None where all parameters are alike.
    """

    make: Callable[..., optax.GradientTransformation]
    options: tuple[str, ...]
    by_layer: bool = False
    rest: str | None = None


def _adam(decay: float, b1: float, b2: float, epsilon: float) -> optax.GradientTransformation:
    return optax.adamw(1.0, b1, b2, epsilon, weight_decay=decay)


def _sgd(decay: float, momentum: float | None) -> optax.GradientTransformation:
    return optax.sgd(1.0, momentum)


def _adafactor(decay: float) -> optax.GradientTransformation:
    # rates are absolute, as with transformers' adafactor, not relative to the parameter's size
    return optax.adafactor(1.0, multiply_by_parameter_scale=False, weight_decay_rate=decay)


def _muon(decay: float, momentum: float | None) -> optax.GradientTransformation:
    beta = MUON_MOMENTUM if momentum is None else momentum
    return optax.contrib.muon(1.0, beta=beta, weight_decay=decay, consistent_rms=MUON_RMS)


ADAM = ("b1", "b2", "epsilon")
DECAY = ("weight_decay", "decay")
OPTIMIZERS: dict[str, Optimizer] = {
    "adam": Optimizer(_adam, ADAM),
    "adamw": Optimizer(_adam, (*ADAM, *DECAY)),
    "sgd": Optimizer(_sgd, ("momentum",)),
    "adafactor": Optimizer(_adafactor, DECAY, by_layer=True),
    "muon": Optimizer(_muon, ("momentum", *DECAY), by_layer=True, rest="adamw"),
}
OPTIONS = (*ADAM, "momentum", *DECAY)


def accepted(name: str) -> tuple[str, ...]:
    """Return which OPTIONS an optimizer of OPTIMIZERS reads."""
    row = OPTIMIZERS[name]
    return row.options if row.rest is None else (*row.options, *OPTIMIZERS[row.rest].options)


class Treatment(NamedTuple):
    """What a stage does to one parameter: rate > 0, decay ≥ 0, stacked: it has a layer axis."""

    rate: float
    decay: float
    stacked: bool


def make_optimizer(
    name: str,
    options: Mapping[str, Any],
    treatments: Mapping[str, Treatment],
    chosen: Params,
    schedule: optax.Schedule,
    max_grad_norm: float | None,
) -> optax.GradientTransformation:
    """Return the transformation of a stage's trained leaves.

    It clips by their global norm, updates each by its own transformation and applies the schedule.

    Args:
      name: key of OPTIMIZERS. "muon" orthogonalises matrices of layers and leaves the rest
        (embedding, head, norms, biases) to AdamW.
      options: values of OPTIONS.
      treatments: by parameter name.
      chosen: the trained leaves, None in place of others.
      schedule: factor on the rates by count of optimizer steps.
      max_grad_norm: or None.
    """
    leaves = trees.named_leaves(chosen)
    transforms = {
        leaf: _of_parameter(name, options, treatments[leaf], leaves[leaf].ndim) for leaf in leaves
    }
    labels = jax.tree.unflatten(jax.tree.structure(chosen), list(leaves))
    clip = optax.identity() if max_grad_norm is None else optax.clip_by_global_norm(max_grad_norm)
    return optax.named_chain(
        ("clip", clip),
        ("parameters", optax.partition(transforms, labels)),
        ("schedule", optax.scale_by_schedule(schedule)),
    )


def _of_parameter(
    name: str, options: Mapping[str, Any], treatment: Treatment, ndim: int
) -> optax.GradientTransformation:
    row = OPTIMIZERS[name]
    if row.rest is not None and not (treatment.stacked and ndim == 3):
        row = OPTIMIZERS[row.rest]
    own = {option: options[option] for option in row.options if option not in DECAY}
    direction = row.make(treatment.decay, **own)
    if row.by_layer and treatment.stacked:
        direction = _by_layer(direction)
    return optax.chain(direction, optax.scale(treatment.rate))


def _by_layer(direction: optax.GradientTransformation) -> optax.GradientTransformation:
    """Let a transformation see the layers of a stacked parameter one at a time."""

    def update(updates: Params, state: Any, params: Params) -> tuple[Params, Any]:
        return jax.vmap(direction.update)(updates, state, params)

    return optax.GradientTransformation(jax.vmap(direction.init), update)


def rate_schedule(
    kind: str, updates: int, warmup_steps: int, final_fraction: float
) -> optax.Schedule:
    """Return the factor on the learning rates as a function of optimizer steps taken.

    It rises linearly to 1 at the `warmup_steps`-th step (1/warmup_steps at the first, which is not
    wasted), then stays or falls to `final_fraction` just after the last step.

    Args:
      kind: one of SCHEDULES.
      updates: optimizer steps of the stage.
      warmup_steps: 0 to `updates` (optimizer steps).
      final_fraction: in [0, 1]; not read by "constant".
    """
    rest = max(updates - warmup_steps, 1)
    after = {
        "constant": lambda: optax.constant_schedule(1.0),
        "linear": lambda: optax.linear_schedule(1.0, final_fraction, rest),
        "cosine": lambda: optax.cosine_decay_schedule(1.0, rest, final_fraction),
    }[kind]()
    if warmup_steps == 0:
        return after
    warm = optax.linear_schedule(1 / warmup_steps, 1.0, warmup_steps - 1)
    return optax.join_schedules([warm, after], [warmup_steps])


def transfer_moments(before: Any, fresh: Any) -> Any:
    """Let parameters trained before keep their moments and counts; others start fresh.

    Args:
      before: optimizer state of the stage that ended.
      fresh: optimizer state of the next, of the same optimizer.

    Returns:
      `fresh` with the states of the parameters both stages train taken from `before`. The schedule
      starts anew.
    """
    held, states = before["parameters"].inner_states, fresh["parameters"].inner_states
    kept = {
        name: jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(held[name]))
        if name in held
        else state
        for name, state in states.items()
    }
    handed = fresh.copy()
    handed["parameters"] = fresh["parameters"]._replace(inner_states=kept)
    return handed


def steps_taken(state: Any) -> int:
    """Return how many optimizer steps a stage has taken, from its optimizer's state."""
    return int(state["schedule"].count)


def rounding_loss(leaf: Array, rate: float) -> float:
    """Return which fraction of a parameter an update as large as the learning rate cannot move.

    θ + rate = θ in θ's dtype, because the rate is below half a unit in the last place of θ.
    """
    return float(_rounding_loss(leaf, rate))


@jax.jit
def _rounding_loss(leaf: Array, rate: float) -> Array:
    size, kind = jnp.abs(leaf), jnp.finfo(leaf.dtype)
    # compilers may keep more bits than the dtype has unless told
    moved = jax.lax.reduce_precision(size + rate, kind.nexp, kind.nmant)
    # by rows first: one running sum in float32 would stand still at 2²⁴
    return jnp.mean(jnp.mean(moved == size, axis=-1, dtype=jnp.float32))
