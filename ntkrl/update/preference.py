"""Rewards from preferences: the Bradley–Terry loss of a reward model."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ntkrl.types import Array, Params, PreferenceBatch, Scorer, Total
from ntkrl.update.loss import Measures


def preference_loss(scores: Array, centering_coefficient: float) -> tuple[Total, dict[str, Total]]:
    """Return Σ −log σ(s⁺ − s⁻) + λ (s⁺ + s⁻)² over pairs, and what users read beside it.

    Args:
      scores: `[B, 2]` of the chosen and the rejected text.
      centering_coefficient: λ ≥ 0, keeps the mean score near zero (Eisenstein et al. 2312.09244;
        TRL's center_rewards_coefficient).

    Returns:
      `(Total, metrics)`: Totals over pairs; metrics `accuracy`, `margin` (s⁺ − s⁻) and
      `mean_reward` ((s⁺ + s⁻) / 2).
    """
    margin_B, sum_B = scores[:, 0] - scores[:, 1], scores[:, 0] + scores[:, 1]
    loss_B = -jax.nn.log_sigmoid(margin_B) + centering_coefficient * jnp.square(sum_B)
    totals = {"accuracy": (margin_B > 0) * 1.0, "margin": margin_B, "mean_reward": sum_B / 2}
    count = jnp.asarray(len(margin_B))
    return (
        Total(jnp.sum(loss_B), count),
        {name: Total(jnp.sum(values), count) for name, values in totals.items()},
    )


def preference_loss_fn(
    scorer: Scorer, centering_coefficient: float
) -> Callable[[Params, PreferenceBatch, None], tuple[Total, Measures]]:
    """Return `(params, batch, None) -> (Total, Measures)` of a reward model."""

    def loss_fn(
        params: Params, batch: PreferenceBatch, reference: None = None
    ) -> tuple[Total, Measures]:
        pairs, _, length = batch.tokens.shape
        tokens, mask = (x.reshape(2 * pairs, length) for x in (batch.tokens, batch.mask))
        gates = batch.gates.reshape(2 * pairs)
        scores = scorer.score(params, tokens, mask, gates)["score"].reshape(pairs, 2)
        total, totals = preference_loss(scores, centering_coefficient)
        return total, Measures(totals, {})

    return loss_fn
