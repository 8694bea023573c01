"""Weights on the samples of a step that keep the predicted change of entropy above a budget.

With h_i the first-order change of the mean entropy of some tokens by the policy gradient of sample
i, and h_0 that by other terms of the loss, momentum and decay, the change by a step whose samples
have weights w_i is h_0 + Σ_i w_i h_i. The weights are the nearest to one that keep it above −ε:

    min ½ Σ_i (w_i − 1)²   subject to   h_0 + Σ_i w_i h_i ≥ −ε   and   0 ≤ w_i ≤ 2.

The solution is 1 + λ h_i, clipped to [0, 2], with the smallest λ ≥ 0 that meets the budget: the
change is linear in λ between the values 1/|h_i| at which a sample's weight reaches a bound.

`EntropyShares` computes all h_i for the tokens of the batch itself, without a ledger. With P the
linear map of the optimizer (see optimizer_maps) and g_i the gradient of sample i,
h_i = ⟨∇H, P g_i⟩ = ⟨Pᵀ∇H, g_i⟩: a backward pass for ∇H, one for the batch, and one for each sample.
The factors in P (1/√v, clipping) are those of the step with all weights one. Adam divides a
gradient among this step and later ones, and h_i counts this step alone.
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
from ntkrl.numerics import scan_microbatches, split_rows
from ntkrl.types import Array, Params, Total, TrainState

ENTROPY = "entropy"
"""Name of the entropy among the totals of a batch."""

Entropy = Callable[[Params, Any], Total]
"""`(params, rows of the batch) -> ` sum of the entropies of their completion tokens, and count."""


class BudgetWeights(NamedTuple):
    """Weights of a step's samples.

    weights: `[B]` in [0, 2]; where none meet the budget, those with the smallest predicted fall.
    change: predicted change of the mean entropy with them (nats).
    least: the smallest ε that weights in [0, 2] meet (nats).
    """

    weights: Array
    change: Array
    least: Array


@jax.jit
def budget_weights(shares: Array, rest: Array, budget: Array) -> BudgetWeights:
    """Return the weights nearest to one that meet an entropy budget.

    Args:
      shares: `[B]` h_i, of each sample at weight one (nats).
      rest: h_0, of all else (nats).
      budget: ε ≥ 0 (nats).
    """
    sizes_B = jnp.abs(shares)
    order_B = jnp.argsort(-sizes_B)  # in which samples reach their bounds
    sorted_B, ends_B = shares[order_B], 1 / sizes_B[order_B]
    bounds_B = jnp.maximum(2 * sorted_B, 0)  # their changes there
    # the change is fixed + λ slope until the k-th sample reaches its bound
    fixed_B = rest + jnp.cumsum(bounds_B) - bounds_B + _sum_from(sorted_B)
    slopes_B = _sum_from(sorted_B**2)
    lambdas_B = (-budget - fixed_B) / jnp.where(slopes_B > 0, slopes_B, 1)
    meets_B = (slopes_B > 0) & (lambdas_B <= ends_B)
    rate = jnp.maximum(lambdas_B[jnp.argmax(meets_B)], 0)
    bound_B = jnp.where(shares > 0, 2.0, jnp.where(shares < 0, 0.0, 1.0))
    weights_B = jnp.where(jnp.any(meets_B), jnp.clip(1 + rate * shares, 0, 2), bound_B)
    weights_B = jnp.where(rest + jnp.sum(shares) >= -budget, 1.0, weights_B)
    return BudgetWeights(weights_B, rest + weights_B @ shares, -rest - jnp.sum(bounds_B))


def _sum_from(values_B: Array) -> Array:
    """Return the sums from each entry to the last."""
    return jnp.cumsum(values_B[::-1])[::-1]


@dataclasses.dataclass(frozen=True)
class EntropyShares:
    """The change of the entropy of a batch's tokens by its samples, bound to a stage.

    terms, optimizer, trained, microbatches: as in Ledger; weights are of the term "policy".
    entropy: of the batch's tokens.
    """

    terms: Terms
    entropy: Entropy
    optimizer: optax.GradientTransformation
    trained: tuple[bool, ...]
    microbatches: int = 1

    def read(self, before: TrainState, batch: Any, reference: Any = None) -> tuple[Array, Array]:
        """Return h_i `[B]` of the samples, and h_0 (nats).

        Args:
          before: params and optimizer state that the step begins with.
          batch: of the step, B rows.
          reference: passed to the terms.
        """
        trained, frozen = trees.partition(before.params, self.trained)

        def totals(trained: Params, rows: Any) -> dict[str, Total]:
            params = trees.merge(trained, frozen)
            return {**self.terms(params, rows, reference)[0], ENTROPY: self.entropy(params, rows)}

        counts, gradients = self._gradients(totals, trained, batch)
        rises = gradients.pop(ENTROPY)
        total = jax.tree.map(lambda *leaves: sum(leaves), *gradients.values())
        update = optimizer_maps.linearize_update(self.optimizer, total, before.opt_state, trained)
        (direction,) = jax.linear_transpose(update.from_gradient, total)(rises)

        def share(row: Any) -> Array:
            alone = jax.tree.map(lambda leaf: leaf[None], row)
            gradient = jax.grad(lambda t: totals(t, alone)["policy"].total)(trained)
            return optax.tree.vdot(gradient, direction) / counts["policy"]

        shares_B = jax.lax.map(share, batch)
        others = optax.tree.vdot(total, direction) - jnp.sum(shares_B)
        kept = optax.tree.vdot(rises, optax.tree.add(update.momentum, update.decay))
        return shares_B, others + kept

    def _gradients(
        self, totals: Callable[[Params, Any], dict[str, Total]], trained: Params, batch: Any
    ) -> tuple[dict[str, Array], dict[str, Params]]:
        """Return the counts of the totals of a batch, and the gradient of the mean of each."""

        def part(rows: Any) -> tuple[Any, None]:
            def sums(trained: Params) -> tuple[dict[str, Array], dict[str, Array]]:
                named = totals(trained, rows)
                values = {name: total.total for name, total in named.items()}
                return values, {name: total.count for name, total in named.items()}

            gradients, counts = jax.jacrev(sums, has_aux=True)(trained)
            return (counts, gradients), None

        (counts, gradients), _ = scan_microbatches(
            part,
            split_rows(batch, self.microbatches),
            lambda left, right: jax.tree.map(jnp.add, left, right),
        )
        counts = {name: jnp.maximum(count, 1) for name, count in counts.items()}
        return counts, {
            name: jax.tree.map(lambda leaf, n=counts[name]: leaf / n, gradient)
            for name, gradient in gradients.items()
        }
