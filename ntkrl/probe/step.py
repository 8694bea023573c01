"""Read the probe set, and compare one real optimizer step with its first-order prediction."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import ntk
from ntkrl.probe.classifier import classifier_measures
from ntkrl.probe.confidence import confidence_measures
from ntkrl.probe.divergence import divergences
from ntkrl.probe.features import completion_cosines, feature_measures
from ntkrl.probe.geometry import cosine_variances, feature_drift
from ntkrl.scoring import head_of
from ntkrl.softmax import OutputHead, TokenStatistics, token_statistics
from ntkrl.types import Array, Params, Policy, ProbeSet

BYTES = 48  # of a logit, what is made of it and how that changes


class ProbeReading(NamedTuple):
    """The probe set under one set of params.

    features: `[O, D]`.
    statistics: of the probe tokens, `[O]` each.
    """

    features: Array
    statistics: TokenStatistics


class Prober:
    """A probe set bound to a policy; holds where training started from, to measure drift."""

    def __init__(
        self,
        policy: Policy,
        probe_set: ProbeSet,
        start_params: Params,
        families: Mapping[str, np.ndarray] | None = None,
        memory_gib: float | None = None,
    ):
        """Read the probe set once.

        Args:
          policy: the network's functions.
          probe_set: the completions.
          start_params: where training starts from.
          families: by name `[O]` bool, which tokens belong to it; measures without a family's name
            are of the first. None for one family of all.
          memory_gib: what the logits of completions read together may take (GiB), at least those of
            one; None to read all together.
        """
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
        count, length = probe_set.completion_mask.shape
        if memory_gib is not None:
            each = BYTES * length * policy.vocab_size
            count = int(max(1, min(count, memory_gib * 2**30 // each)))
        self.blocks = tuple(_cut(self.contexts, count))
        self.rows, self.groups = jnp.asarray(rows), probe_set.groups[rows]
        self.families = {"own": np.ones(len(rows), bool)} if families is None else families
        first = np.nonzero(next(iter(self.families.values())))[0]
        self.places = (jnp.asarray(first), self.rows, self.groups)
        self.start_features = self.read(start_params).features
        self.start_head = head_of(policy, start_params)

    def each(self, call: Callable[..., Any], *beside: Array) -> Any:
        """Call for some completions at a time; join what comes, arrays with their tokens in front.

        Args:
          call: `(contexts, targets, *beside) -> tree of [O', …]`; one shape for all.
          beside: `[O, …]` arrays that the call is given its tokens of.
        """
        found = []
        for contexts, places, kept in self.blocks:
            given = (leaf[places] for leaf in (self.targets, *beside))
            found.append(jax.tree.map(lambda leaf: leaf[:kept], call(contexts, *given)))
        if len(found) == 1:
            return found[0]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)

    def some(self, count: int) -> ntk.Contexts:
        """Return so many contexts (at most) of the first family, evenly spread."""
        first = np.asarray(self.places[0])
        chosen = first[np.unique(np.linspace(0, len(first) - 1, count).round().astype(int))]
        whole = self.contexts
        return dataclasses.replace(
            whole, positions=whole.positions[chosen], rows=whole.rows[chosen]
        )

    def read(self, params: Params) -> ProbeReading:
        """Read every probe token under the params."""
        return self.each(functools.partial(_read, self.policy, params))

    def measures(self, params: Params, reading: ProbeReading | None = None) -> dict[str, float]:
        """Return the `probe/…` metrics of the params; reading: of them, where there is one."""
        if reading is None:
            reading = self.read(params)
        start = self.start_head, self.start_features
        found = _measures((head_of(self.policy, params), reading), start, *self.places)
        found |= classifier_measures(head_of(self.policy, params).weight, self.start_head.weight)[0]
        if len(self.families) > 1:
            for family, own in self.families.items():
                of = confidence_measures(reading.statistics, jnp.asarray(own))
                names = ("log_prob", "entropy", "confidence")
                found |= {f"{family}/{name}": of[name] for name in names}
        numbers = {f"probe/{name}": float(value) for name, value in found.items()}
        # before the head has moved its change has no rank
        return {name: value for name, value in numbers.items() if math.isfinite(value)}

    def compare(
        self, before: Params, after: Params
    ) -> tuple[dict[str, float], dict[str, np.ndarray], tuple[ProbeReading, ProbeReading]]:
        """Compare the change of the probe tokens' log-probs with its first-order prediction.

        The direction is what the optimizer really did, θ_after − θ_before, whatever it is.

        Args:
          before, after: params on either side of one optimizer step.

        Returns:
          `(metrics, arrays, readings)`: the `predict/…` metrics; `[O]` arrays `actual`,
          `predicted_head`, `predicted_body`, `log_probs`, `entropy`, `max_prob` (nats), the
          last three as read before the step, and `cosines` `[S, S]` after it, see
          `completion_cosines`; and the readings before and after.
        """
        direction = jax.tree.map(jnp.subtract, after, before)
        parts = self.each(functools.partial(ntk.predict, self.policy, before, direction))
        old, new = self.read(before), self.read(after)
        arrays = {f"predicted_{name}": np.asarray(value) for name, value in parts.items()}
        arrays["actual"] = np.asarray(new.statistics.log_probs - old.statistics.log_probs)
        places = self.rows, self.contexts.mask.shape[0]
        arrays["cosines"] = np.asarray(completion_cosines(new.features, *places))
        for name in ("log_probs", "entropy", "max_prob"):
            arrays[name] = np.asarray(old.statistics._asdict()[name])
        return comparison(arrays), arrays, (old, new)


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


def _cut(contexts: ntk.Contexts, count: int) -> Iterator[tuple[ntk.Contexts, np.ndarray, int]]:
    """Yield blocks of `count` completions, in one shape: contexts, their places, how many count."""
    rows, total = np.asarray(contexts.rows), contexts.tokens.shape[0]
    starts = range(0, total, count)
    own = [np.nonzero((start <= rows) & (rows < start + count))[0] for start in starts]
    widest = max(map(len, own))
    for start, places in zip(starts, own, strict=True):
        first = min(start, total - count)  # the last block reads some again
        filled = np.pad(places, (0, widest - len(places)), mode="edge")
        block = ntk.Contexts(
            contexts.tokens[first : first + count],
            contexts.positions[filled],
            contexts.rows[filled] - first,
            contexts.mask[first : first + count],
        )
        yield block, filled, len(places)


@functools.partial(jax.jit, static_argnames=("policy",))
def _read(policy: Policy, params: Params, contexts: ntk.Contexts, targets_O: Array) -> ProbeReading:
    features_NTD = policy.features(params, contexts.tokens, contexts.mask)
    phi_OD = features_NTD[contexts.rows, contexts.positions]
    return ProbeReading(phi_OD, token_statistics(head_of(policy, params), phi_OD, targets_O))


@jax.jit
def _measures(
    policy: tuple[OutputHead, ProbeReading],
    start: tuple[OutputHead, Array],
    chosen: Array,
    rows: Array,
    groups: Array,
) -> dict[str, Array]:
    """Return what is measured of the chosen probe tokens."""
    (head, reading), (start_head, start_OD) = policy, start
    phi_OD, start_OD = reading.features[chosen], start_OD[chosen]
    statistics = jax.tree.map(lambda leaf: leaf[chosen], reading.statistics)
    found = confidence_measures(statistics, jnp.ones(chosen.shape, bool))
    places = rows[chosen], groups[chosen]
    found |= feature_measures(phi_OD, start_OD, *places)
    found |= cosine_variances(phi_OD, *places) | feature_drift(phi_OD, start_OD)
    apart = divergences((head, phi_OD), (start_head, start_OD), chunk_vocabulary=8192)
    names = ("kl_to_start", "kl_from_start", "total_variation")
    return found | dict(zip(names, map(jnp.mean, apart), strict=True))
