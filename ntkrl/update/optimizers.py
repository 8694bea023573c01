"""Optax optimizers with one state per parameter, so that stages can transfer them separately.

The update of a parameter is  rate × schedule(n) × direction,  where the direction is optax's update
at rate 1 (decay included) and n counts the stage's optimizer steps. Each parameter has its moments
and count, which a stage may transfer to the next for the parameters that both train.
"""

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
is AdamW's, so that one rate suits both the matrices and the parameters left to AdamW."""


class Optimizer(NamedTuple):
    """An entry of OPTIMIZERS.

    make: `(decay, **options) -> transformation` at rate 1.
    options: the fields of Stage it reads; weight_decay and decay are passed as `decay`.
    by_layer: it treats a parameter as one matrix, so layers of a stacked parameter are separated.
    fallback: optimizer of parameters that are not matrices of a layer; None if it takes all.
    """

    make: Callable[..., optax.GradientTransformation]
    options: tuple[str, ...]
    by_layer: bool = False
    fallback: str | None = None


def _adam(decay: float, b1: float, b2: float, epsilon: float) -> optax.GradientTransformation:
    return optax.adamw(1.0, b1, b2, epsilon, weight_decay=decay)


def _sgd(decay: float, momentum: float | None) -> optax.GradientTransformation:
    return optax.sgd(1.0, momentum)


def _adafactor(decay: float) -> optax.GradientTransformation:
    # absolute rates, as in transformers, not relative to the parameter's scale
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
    "muon": Optimizer(_muon, ("momentum", *DECAY), by_layer=True, fallback="adamw"),
}
OPTIONS = (*ADAM, "momentum", *DECAY)


def accepted(name: str) -> tuple[str, ...]:
    """Return the OPTIONS that an optimizer reads."""
    optimizer = OPTIMIZERS[name]
    if optimizer.fallback is None:
        return optimizer.options
    return (*optimizer.options, *OPTIMIZERS[optimizer.fallback].options)


class Treatment(NamedTuple):
    """Settings of one parameter: rate > 0, decay ≥ 0; stacked: it has a layer axis."""

    rate: float
    decay: float
    stacked: bool


def make_optimizer(
    name: str,
    options: Mapping[str, Any],
    treatments: Mapping[str, Treatment],
    trained: Params,
    schedule: optax.Schedule,
    max_grad_norm: float | None,
) -> optax.GradientTransformation:
    """Return the transformation of a stage's trained leaves.

    It clips by their global norm, transforms each separately and applies the schedule.

    Args:
      name: key of OPTIMIZERS. "muon" orthogonalises matrices of layers and leaves other parameters
        (embedding, head, norms, biases) to AdamW.
      options: values of OPTIONS.
      treatments: by parameter name.
      trained: the trained leaves, None in place of others.
      schedule: factor on the rates by count of optimizer steps.
      max_grad_norm: or None.
    """
    leaves = trees.named_leaves(trained)
    transforms = {
        leaf: _of_parameter(name, options, treatments[leaf], leaves[leaf].ndim) for leaf in leaves
    }
    labels = jax.tree.unflatten(jax.tree.structure(trained), list(leaves))
    clip = optax.identity() if max_grad_norm is None else optax.clip_by_global_norm(max_grad_norm)
    return optax.named_chain(
        ("clip", clip),
        ("parameters", optax.partition(transforms, labels)),
        ("schedule", optax.scale_by_schedule(schedule)),
    )


def _of_parameter(
    name: str, options: Mapping[str, Any], treatment: Treatment, ndim: int
) -> optax.GradientTransformation:
    optimizer = OPTIMIZERS[name]
    if optimizer.fallback is not None and not (treatment.stacked and ndim == 3):
        optimizer = OPTIMIZERS[optimizer.fallback]
    kwargs = {option: options[option] for option in optimizer.options if option not in DECAY}
    direction = optimizer.make(treatment.decay, **kwargs)
    if optimizer.by_layer and treatment.stacked:
        direction = _by_layer(direction)
    return optax.chain(direction, optax.scale(treatment.rate))


def _by_layer(direction: optax.GradientTransformation) -> optax.GradientTransformation:
    """Apply a transformation to each layer of a stacked parameter."""

    def update(updates: Params, state: Any, params: Params) -> tuple[Params, Any]:
        return jax.vmap(direction.update)(updates, state, params)

    return optax.GradientTransformation(jax.vmap(direction.init), update)


def rate_schedule(
    kind: str, updates: int, warmup_steps: int, final_fraction: float
) -> optax.Schedule:
    """Return the factor on the learning rates as a function of past optimizer steps.

    It rises linearly to 1 at the `warmup_steps`-th step (from 1/warmup_steps, so that the first
    step counts), then stays or falls to `final_fraction` just after the last step.

    Args:
      kind: one of SCHEDULES.
      updates: optimizer steps of the stage.
      warmup_steps: 0 to `updates` (optimizer steps).
      final_fraction: in [0, 1]; unused by "constant".
    """
    remaining = max(updates - warmup_steps, 1)
    after = {
        "constant": lambda: optax.constant_schedule(1.0),
        "linear": lambda: optax.linear_schedule(1.0, final_fraction, remaining),
        "cosine": lambda: optax.cosine_decay_schedule(1.0, remaining, final_fraction),
    }[kind]()
    if warmup_steps == 0:
        return after
    warm = optax.linear_schedule(1 / warmup_steps, 1.0, warmup_steps - 1)
    return optax.join_schedules([warm, after], [warmup_steps])


def transfer_moments(before: Any, fresh: Any) -> Any:
    """Transfer moments and counts of parameters that both stages train.

    Args:
      before: optimizer state at the end of a stage.
      fresh: initial optimizer state of the next stage, of the same optimizer.

    Returns:
      `fresh` with the states of the shared parameters from `before`. The schedule starts anew.
    """
    old, new = before["parameters"].inner_states, fresh["parameters"].inner_states
    states = {
        name: jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(old.get(name, state)))
        for name, state in new.items()
    }
    # keeps the type of `fresh`, an OrderedDict: jit compares the structures of states
    return fresh | {"parameters": fresh["parameters"]._replace(inner_states=states)}


def steps_taken(state: Any) -> int:
    """Return the optimizer steps of the current stage, from its optimizer's state."""
    return int(state["schedule"].count)


def rounding_loss(leaf: Array, rate: float) -> float:
    """Return the fraction of entries that do not move under an update as large as the rate.

    θ + rate = θ in θ's dtype, because the rate is below half a unit in the last place of θ.
    """
    return float(_rounding_loss(leaf, rate))


@jax.jit
def _rounding_loss(leaf: Array, rate: float) -> Array:
    size, kind = jnp.abs(leaf), jnp.finfo(leaf.dtype)
    # without reduce_precision compilers may compute in more bits than the dtype has
    moved = jax.lax.reduce_precision(size + rate, kind.nexp, kind.nmant)
    # mean over rows first: a single float32 sum stops growing at 2²⁴
    return jnp.mean(jnp.mean(moved == size, axis=-1, dtype=jnp.float32))
