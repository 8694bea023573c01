"""Weights on the samples of a step that keep the predicted change of entropy above a budget.

With h_i the first-order change of the mean entropy of some tokens by sample i, and h_0 that by
momentum and decay, the change by a step whose samples have weights w_i is h_0 + Σ_i w_i h_i. The
weights are the nearest to one that keep it above −ε:

    min ½ Σ_i (w_i − 1)²   subject to   h_0 + Σ_i w_i h_i ≥ −ε   and   w_i ≥ 0.

Its solution is w_i = max(0, 1 + λ h_i), with the smallest λ ≥ 0 that meets the budget: the change
is linear in λ between the values −1/h_i at which a sample's weight becomes zero.

`EntropyShares` computes all h_i exactly, for the tokens of the batch itself, without a ledger. With
P the realised linear map of the optimizer (see optimizer_maps) and g_i the gradient of sample i,
h_i = ⟨∇H, P g_i⟩ = ⟨Pᵀ∇H, g_i⟩: a backward pass for ∇H, and the transpose of the backward pass of
the samples' losses, since those have no forward-mode derivative.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ntkrl import trees
from ntkrl.attribution import optimizer_maps
from ntkrl.attribution.decomposition import Terms
from ntkrl.types import Array, Params, TrainState

Entropy = Callable[[Params, Any], Array]
"""`(params, batch) -> ` mean entropy of the batch's completion tokens (nats)."""


class BudgetWeights(NamedTuple):
    """Weights of a step's samples.

    weights: `[B]` ≥ 0; of the least fall of entropy where no weights meet the budget.
    change: predicted change of the mean entropy with them (nats).
    least: the smallest ε that some weights meet (nats); −∞ where any is met.
    """

    weights: Array
    change: Array
    least: Array


@jax.jit
def budget_weights(shares: Array, rest: Array, budget: Array) -> BudgetWeights:
    """Return the weights nearest to one that meet an entropy budget.

    Args:
      shares: `[B]` h_i, of each sample at weight one (nats).
      rest: h_0, of momentum and decay (nats).
      budget: ε ≥ 0 (nats).
    """
    missing = -budget - rest
    vanish_B = jnp.where(shares < 0, -1 / jnp.where(shares < 0, shares, -1), jnp.inf)
    order_B = jnp.argsort(vanish_B)
    falling_B = jnp.where(jnp.isfinite(vanish_B), shares, 0)[order_B]
    # sums over the samples that are left before the k-th one vanishes
    left_B = jnp.sum(shares) - jnp.cumsum(falling_B) + falling_B
    squares_B = jnp.sum(shares**2) - jnp.cumsum(falling_B**2) + falling_B**2
    lambdas_B = (missing - left_B) / jnp.where(squares_B > 0, squares_B, 1)
    ends_B = vanish_B[order_B]
    reached_B = (squares_B > 0) & (lambdas_B <= ends_B)
    # after the last has vanished: those that rise
    risers = jnp.sum(jnp.where(shares > 0, shares, 0))
    rising = jnp.sum(jnp.where(shares > 0, shares**2, 0))
    last = (missing - risers) / jnp.where(rising > 0, rising, 1)
    chosen = jnp.where(jnp.any(reached_B), lambdas_B[jnp.argmax(reached_B)], last)
    scaled_B = jnp.maximum(1 + jnp.maximum(chosen, 0) * shares, 0)
    feasible = (rising > 0) | (missing <= 0)
    weights_B = jnp.where(feasible, scaled_B, jnp.where(shares < 0, 0.0, 1.0))
    weights_B = jnp.where(rest + jnp.sum(shares) >= -budget, 1.0, weights_B)
    change = rest + jnp.sum(weights_B * shares)
    return BudgetWeights(weights_B, change, jnp.where(rising > 0, -jnp.inf, -rest))


@dataclasses.dataclass(frozen=True)
class EntropyShares:
    """The change of the entropy of a batch's tokens by its samples, bound to a stage.

    terms, optimizer, trained: as in Ledger.
    entropy: of the batch's tokens.
    """

    terms: Terms
    entropy: Entropy
    optimizer: optax.GradientTransformation
    trained: tuple[bool, ...]

    def read(self, before: TrainState, batch: Any, reference: Any = None) -> tuple[Array, Array]:
        """Return h_i `[B]` of the samples, and h_0 of momentum and decay (nats).

        Args:
          before: params and optimizer state that the step begins with.
          batch: of the step, B rows.
          reference: passed to the terms.
        """
        trained, frozen = trees.partition(before.params, self.trained)

        def totals(trained: Params, rows: Any) -> Any:
            return self.terms(trees.merge(trained, frozen), rows, reference)[0]

        counts = {n: jnp.maximum(t.count, 1) for n, t in totals(trained, batch).items()}

        def losses(trained: Params) -> Array:
            def of_row(row: Any) -> Any:
                alone = totals(trained, jax.tree.map(lambda leaf: leaf[None], row))
                return sum(total.total / counts[name] for name, total in alone.items())

            return jax.vmap(of_row)(batch)

        losses_B, pull = jax.vjp(losses, trained)
        (grads,) = pull(jnp.ones_like(losses_B))
        update = optimizer_maps.linearize_update(self.optimizer, grads, before.opt_state, trained)
        rises = jax.grad(lambda t: self.entropy(trees.merge(t, frozen), batch))(trained)
        (direction,) = jax.linear_transpose(update.from_gradient, grads)(rises)
        (shares_B,) = jax.linear_transpose(lambda weights: pull(weights)[0], losses_B)(direction)
        rest = optax.tree.vdot(rises, optax.tree.add(update.momentum, update.decay))
        return shares_B, rest
