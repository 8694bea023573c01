"""The terms of a loss apart: what a step ledger accounts for one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from ntkrl.scoring import completion_features, head_of
from ntkrl.types import Params, Policy, Total, UpdateBatch
from ntkrl.update.loss import policy_loss, supervised_loss
from ntkrl.update.objective import Objective
from ntkrl.update.step import TILE_VOCABULARY
from ntkrl.vocabulary import Head, TokenStatistics, token_statistics

Terms = Callable[[Params, UpdateBatch, Head | None], dict[str, Total]]


def policy_terms(
    policy: Policy,
    objective: Objective,
    budget: int,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> Terms:
    """Return the terms of `policy_loss`, each with the others at zero; together they are it.

    Args:
      policy: the network's functions.
      objective, budget: as in `policy_loss`.
      temperature, chunk_tokens: as in `policy_objective`.

    Returns:
      `(params, batch, reference) -> {"policy": Total}`, with "kl" where the KL stands in the loss
      and "bonus" where entropy is rewarded; `reference` as in `policy_objective`.
    """
    bare = dataclasses.replace(objective, kl_coefficient=0.0, kl_place="off", entropy_coefficient=0)
    parts = {"policy": bare}
    if objective.kl_place == "loss":
        parts["kl"] = dataclasses.replace(objective, entropy_coefficient=0.0)
    if objective.entropy_coefficient:
        weight = objective.entropy_coefficient
        parts["bonus"] = dataclasses.replace(bare, entropy_coefficient=weight)
    read = _reading(policy, temperature, chunk_tokens)

    def terms(
        params: Params, batch: UpdateBatch, reference: Head | None = None
    ) -> dict[str, Total]:
        statistics = read(params, batch, reference)
        still = batch.replace(advantages=jnp.zeros_like(batch.advantages), penalties=None)
        given = {name: batch if name == "policy" else still for name in parts}
        return {
            name: policy_loss(own, budget, statistics, given[name])[0]
            for name, own in parts.items()
        }

    return terms


def supervised_terms(policy: Policy, chunk_tokens: int = 1024) -> Terms:
    """Return the one term of `supervised_loss`, as `policy_terms` does: "likelihood"."""
    read = _reading(policy, 1.0, chunk_tokens)

    def terms(
        params: Params, batch: UpdateBatch, reference: Head | None = None
    ) -> dict[str, Total]:
        return {"likelihood": supervised_loss(read(params, batch, reference), batch)[0]}

    return terms


def _reading(
    policy: Policy, temperature: float, chunk_tokens: int
) -> Callable[[Params, UpdateBatch, Head | None], TokenStatistics]:
    def read(params: Params, batch: UpdateBatch, reference: Head | None) -> TokenStatistics:
        length, features = batch.completion_mask.shape[1], batch.features
        if features is None:
            features = completion_features(policy, params, batch.tokens, batch.mask, length)
        beside = None if reference is None else (reference, batch.ref_features)
        tiles = (temperature, chunk_tokens, TILE_VOCABULARY, beside)
        return token_statistics(
            head_of(policy, params), features, batch.tokens[:, -length:], *tiles
        )

    return read
