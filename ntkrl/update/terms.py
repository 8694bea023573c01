"""The terms of a loss apart: what a step ledger accounts for one by one."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from ntkrl.softmax import TokenStatistics
from ntkrl.types import Array, Total, UpdateBatch
from ntkrl.update.loss import Measures, policy_loss, supervised_loss
from ntkrl.update.microbatch import Loss
from ntkrl.update.objective import Objective


def policy_terms(objective: Objective, budget: int) -> Loss:
    """Return the terms of `policy_loss`, each with the others at zero; together they are it.

    Args:
      objective, budget: as in `policy_loss`.

    Returns:
      `(statistics, batch) -> ({name: Total}, Measures)`, for `policy_loss_fn`: "policy", with
      "kl" where the KL stands in the loss, or in the reward and the batch says which part of the
      advantages it makes; and "bonus" where entropy is rewarded.
    """
    bare = dataclasses.replace(objective, kl_coefficient=0.0, kl_place="off", entropy_coefficient=0)
    beside = {}
    if objective.kl_place == "loss":
        beside["kl"] = dataclasses.replace(objective, entropy_coefficient=0.0)
    if objective.entropy_coefficient:
        weight = objective.entropy_coefficient
        beside["bonus"] = dataclasses.replace(bare, entropy_coefficient=weight)

    def terms(statistics: TokenStatistics, batch: UpdateBatch) -> tuple[dict[str, Total], Measures]:
        _, measures = policy_loss(objective, budget, statistics, batch)
        found = {"policy": policy_loss(bare, budget, statistics, batch)[0]}
        if batch.kl_advantages is not None:
            whole, count = found["policy"]
            part = _of_part(bare, budget, statistics, batch, batch.kl_advantages)
            found = {"policy": Total(whole - part, count), "kl": Total(part, count)}
        still = batch.replace(advantages=jnp.zeros_like(batch.advantages), penalties=None)
        for name, own in beside.items():
            found[name] = policy_loss(own, budget, statistics, still)[0]
        return found, measures

    return terms


def _of_part(
    objective: Objective,
    budget: int,
    statistics: TokenStatistics,
    batch: UpdateBatch,
    part: Array,
) -> Array:
    """Return the share of a part of the advantages in the summed loss.

    The surrogate of a token grows in proportion to its advantage, and which of its branches counts
    (clipped or not) is for the whole advantage to say: so the share is the derivative along the
    part, and the shares of parts add up.
    """

    def summed(advantages: Array) -> Array:
        return policy_loss(objective, budget, statistics, batch.replace(advantages=advantages))[
            0
        ].total

    return jax.jvp(summed, (batch.advantages,), (part.astype(batch.advantages.dtype),))[1]


def supervised_terms(
    statistics: TokenStatistics, batch: UpdateBatch
) -> tuple[dict[str, Total], Measures]:
    """Return the one term of `supervised_loss`, as `policy_terms` does: "likelihood"."""
    total, measures = supervised_loss(statistics, batch)
    return {"likelihood": total}, measures
