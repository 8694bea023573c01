"""Read the probe set, and compare one real optimizer step with its first-order prediction."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import ntk, trees
from ntkrl.probe.features import feature_measures
from ntkrl.scoring import head_of
from ntkrl.types import Array, Params, Policy, ProbeSet
from ntkrl.vocabulary import token_statistics


class ProbeReading(NamedTuple):
    """The probe set under one set of params.

    features: `[O, D]`.
    log_probs: `[O]` of the probe tokens (nats).
    entropy: `[O]` (nats).
    max_prob: `[O]`.
    """

    features: Array
    log_probs: Array
    entropy: Array
    max_prob: Array


class Prober:
    """A probe set bound to a policy; holds where training started from, to measure drift."""

    def __init__(self, policy: Policy, probe_set: ProbeSet, start_params: Params):
        rows, columns = np.nonzero(np.asarray(probe_set.completion_mask))
        completion_start = probe_set.tokens.shape[1] - probe_set.completion_mask.shape[1]
        self.policy = policy
        self.contexts = ntk.Contexts(
            probe_set.tokens,
            jnp.asarray(columns + completion_start - 1),
            jnp.asarray(rows),
            probe_set.mask,
        )
        self.targets = probe_set.tokens[rows, columns + completion_start]
        self.rows, self.groups = jnp.asarray(rows), probe_set.groups[rows]
        self.start_features = self.read(start_params).features
        self.start_head = trees.named_leaves(start_params)[policy.head_weight]

    def read(self, params: Params) -> ProbeReading:
        """Read every probe token under the params."""
        return _read(self.policy, params, self.contexts, self.targets)

    def measures(self, params: Params, reading: ProbeReading) -> dict[str, float]:
        """Return the `probe/…` metrics of a reading."""
        head = trees.named_leaves(params)[self.policy.head_weight]
        found = feature_measures(reading.features, self.start_features, self.rows, self.groups)
        found |= {
            "entropy": jnp.mean(reading.entropy),
            "confidence": jnp.mean(reading.max_prob),
            "log_prob": jnp.mean(reading.log_probs),
            "head_norm": jnp.linalg.norm(head),
            "head_distance": jnp.linalg.norm(head - self.start_head),
        }
        return {f"probe/{name}": float(value) for name, value in found.items()}

    def compare(
        self, before: Params, after: Params
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Compare the change of the probe tokens' log-probs with its first-order prediction.

        The direction is what the optimizer really did, θ_after − θ_before, whatever it is.

        Args:
          before, after: params on either side of one optimizer step.

        Returns:
          `(metrics, arrays)`: the `predict/…` metrics, and `[O]` arrays `actual`,
          `predicted_head`, `predicted_body`, `log_probs`, `entropy`, `max_prob` (nats), the
          last three as read before the step.
        """
        direction = jax.tree.map(jnp.subtract, after, before)
        parts = ntk.predict(self.policy, before, direction, self.contexts, self.targets)
        old, new = self.read(before), self.read(after)
        arrays = {f"predicted_{name}": np.asarray(value) for name, value in parts.items()}
        arrays["actual"] = np.asarray(new.log_probs - old.log_probs)
        for name in ("log_probs", "entropy", "max_prob"):
            arrays[name] = np.asarray(old._asdict()[name])
        return comparison(arrays), arrays


def comparison(arrays: dict[str, np.ndarray]) -> dict[str, float]:
    """Return shares, relative error and correlation of a step's arrays (see `Prober.compare`).

    The share of a part is ⟨Δ_part, Δ⟩/⟨Δ, Δ⟩ with Δ the whole prediction: shares add up to one
    and leave [0, 1] when parts oppose each other. A step that moved nothing gives NaN.
    """
    actual = arrays["actual"].astype(np.float64)
    parts = {
        name.removeprefix("predicted_"): value.astype(np.float64)
        for name, value in arrays.items()
        if name.startswith("predicted_")
    }
    whole = sum(parts.values())
    with np.errstate(invalid="ignore", divide="ignore"):
        metrics = {
            f"predict/{name}_share": float(part @ whole / (whole @ whole))
            for name, part in parts.items()
        }
        error = np.linalg.norm(actual - whole) / np.linalg.norm(actual)
        centred, predicted = actual - actual.mean(), whole - whole.mean()
        scale = np.linalg.norm(centred) * np.linalg.norm(predicted)
        metrics["predict/relative_error"] = float(error)
        metrics["predict/correlation"] = float(centred @ predicted / scale)
    return metrics


@functools.partial(jax.jit, static_argnames=("policy",))
def _read(policy: Policy, params: Params, contexts: ntk.Contexts, targets_O: Array) -> ProbeReading:
    features_NTD = policy.features(params, contexts.tokens, contexts.mask)
    phi_OD = features_NTD[contexts.rows, contexts.positions]
    statistics = token_statistics(head_of(policy, params), phi_OD, targets_O)
    return ProbeReading(phi_OD, statistics.log_probs, statistics.entropy, statistics.max_prob)
