"""Influence of one optimizer step's samples on the model some steps later.

With w_i the weight of sample i in the gradient of the first step, and the batches of later steps as
they were, the params θ_n after n steps are a function of w. `read` returns its derivative at w = 1
at the probe tokens, ∂m(θ_n)/∂w_i for a measure m: forward mode through the optimizer of the first
step, and through the gradients (products with their Hessians) and optimizers of all later ones. To
first order, a run in which the samples in S have weight 0 (and the divisors of the full batch) ends
with m less Σ_{i∈S} ∂m/∂w_i.

What this neglects: all beyond first order in w; that another model would have sampled other
completions; and with `factors="realised"` that the factors of the optimizer that are not linear in
gradients and moments (1/√v, the clip factor) depend on w.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ntkrl import ntk, trees
from ntkrl.attribution import linear_maps, optimizer_maps
from ntkrl.attribution.decomposition import Terms
from ntkrl.types import Array, Params, Policy, TrainState

FACTORS = ("realised", "exact")


class Chain(NamedTuple):
    """Optimizer steps in a row, of one stage.

    before: params and optimizer state that the first step begins with.
    batches: of each step; all of the same shapes (see `data.widened`), B rows in the first.
    reference: the Head that the loss compares with, the same in all steps; or None.
    """

    before: TrainState
    batches: tuple[Any, ...]
    reference: Any = None


@dataclasses.dataclass(frozen=True)
class Influence:
    """The influence of samples, bound to a stage.

    policy, terms, optimizer, trained: as in Ledger.
    factors: of the optimizer that are not linear: "realised" for constants, as in the ledger,
        "exact" to differentiate them too.
    chunk: samples at a time.
    """

    policy: Policy
    terms: Terms
    optimizer: optax.GradientTransformation
    trained: tuple[bool, ...]
    factors: str = "realised"
    chunk: int = 8

    def __post_init__(self):
        if self.factors not in FACTORS:
            raise ValueError(
                f"influence: factors must be one of {', '.join(FACTORS)}, not {self.factors!r}."
            )
        if self.chunk < 1:
            raise ValueError(f"influence: chunk must be ≥ 1, not {self.chunk}.")

    def read(self, chain: Chain, contexts: ntk.Contexts, targets: Array) -> Array:
        """Return ∂m(θ_n)/∂w_i `[2, O, B]` for the measures `linear_maps.MEASURES` (nats).

        Args:
          chain: n ≥ 1 steps.
          contexts, targets: the O probe tokens.

        Raises:
          ValueError: contexts that do not fit, or batches of different shapes.
        """
        contexts = ntk.check_contexts(
            contexts, "contexts", ntk.as_network(self.policy), chain.before.params, is_policy=True
        )
        influence_B2O = _influence(self, *_split_first(chain), (contexts, targets))
        return jnp.moveaxis(influence_B2O, 0, -1)

    def retrain(self, chain: Chain, weights: Array) -> Params:
        """Return the params after the steps with other weights `[B]` of the first step's samples.

        Raises:
          ValueError: batches of different shapes.
        """
        return _retrain(self, *_split_first(chain), weights)


def _split_first(chain: Chain) -> tuple[Chain, Any]:
    """Return the chain of its first step alone, and the later batches in one tree."""
    if not chain.batches:
        raise ValueError("influence: a chain has one step or more.")
    first, *later = chain.batches
    shapes = [[leaf.shape for leaf in jax.tree.leaves(batch)] for batch in chain.batches]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            "influence: the batches have different shapes; pad them by data.widened first."
        )
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *later) if later else None
    return chain._replace(batches=(first,)), stacked


@functools.partial(jax.jit, static_argnames="spec")
def _influence(
    spec: Influence, chain: Chain, later: Any, probes: tuple[ntk.Contexts, Array]
) -> Array:
    """Return ∂m(θ_n)/∂w_i `[B, 2, O]`."""
    steps, (batch,) = _ChainSteps(spec, chain), chain.batches
    counts, grads = steps.counts(steps.trained, batch), steps.gradient(steps.trained, batch)

    def measured(grads: Params) -> Array:
        params = steps.run(grads, later)
        phi_OD = ntk.features_at(steps.network, params, probes[0])
        return linear_maps.token_cotangents(steps.network, params, phi_OD, probes[1]).values

    def of_sample(row: Any) -> Array:
        tangent = steps.row_gradient(row, counts)
        return jax.jvp(measured, (grads,), (tangent,))[1]

    return jax.lax.map(of_sample, batch, batch_size=spec.chunk)


@functools.partial(jax.jit, static_argnames="spec")
def _retrain(spec: Influence, chain: Chain, later: Any, weights: Array) -> Params:
    steps, (batch,) = _ChainSteps(dataclasses.replace(spec, factors="exact"), chain), chain.batches
    counts = steps.counts(steps.trained, batch)

    def add(total: Params, row: tuple[Any, Array]) -> tuple[Params, None]:
        gradient = steps.row_gradient(row[0], counts)
        return jax.tree.map(lambda t, g: (t + row[1] * g).astype(t.dtype), total, gradient), None

    zeros = jax.tree.map(jnp.zeros_like, steps.trained)
    grads, _ = jax.lax.scan(add, zeros, (batch, weights))
    return steps.run(grads, later)


class _ChainSteps:
    """The optimizer steps of a chain, as functions of trained leaves."""

    def __init__(self, spec: Influence, chain: Chain):
        self.spec, self.chain, self.network = spec, chain, ntk.as_network(spec.policy)
        self.trained, self.frozen = trees.partition(chain.before.params, spec.trained)
        convert = {
            "realised": optimizer_maps.with_realised_factors,
            "exact": optimizer_maps.with_finite_roots,
        }
        self.optimizer = convert[spec.factors](spec.optimizer)

    def counts(self, trained: Params, batch: Any) -> dict[str, Array]:
        """Return the divisors of the terms of a batch."""
        totals, _ = self.spec.terms(trees.merge(trained, self.frozen), batch, self.chain.reference)
        return {name: jnp.maximum(total.count, 1) for name, total in totals.items()}

    def gradient(
        self, trained: Params, rows: Any, counts: dict[str, Array] | None = None
    ) -> Params:
        """Return the gradient of the loss of some rows; counts: divisors, None for their own."""
        if counts is None:
            counts = self.counts(jax.lax.stop_gradient(trained), rows)

        def loss(trained: Params) -> Array:
            params = trees.merge(trained, self.frozen)
            totals, _ = self.spec.terms(params, rows, self.chain.reference)
            sums: Any = sum(total.total / counts[name] for name, total in totals.items())
            return sums

        return jax.grad(loss)(trained)

    def row_gradient(self, row: Any, counts: dict[str, Array]) -> Params:
        """Return the part of a row in the gradient of the first step."""
        return self.gradient(self.trained, jax.tree.map(lambda leaf: leaf[None], row), counts)

    def run(self, grads: Params, later: Any) -> Params:
        """Return the params after a step with this gradient and steps on the later batches."""
        state = self.chain.before.opt_state

        def apply(carry: tuple[Params, Any], grads: Params) -> tuple[Params, Any]:
            trained, opt_state = carry
            updates, opt_state = self.optimizer.update(grads, opt_state, trained)
            return optax.apply_updates(trained, updates), opt_state

        def step(carry: tuple[Params, Any], batch: Any) -> tuple[tuple[Params, Any], None]:
            return apply(carry, self.gradient(carry[0], batch)), None

        carry = apply((self.trained, state), grads)
        if later is not None:
            carry, _ = jax.lax.scan(step, carry, later)
        return trees.merge(carry[0], self.frozen)
