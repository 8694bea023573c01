"""The probe set under changing params, and one real step against its first-order prediction."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import ntk
from ntkrl.probe.distributions import confidence_measures, divergences
from ntkrl.probe.exact_kernels import select
from ntkrl.probe.features import (
    completion_cosines,
    cosine_variances,
    feature_drift,
    feature_measures,
)
from ntkrl.probe.parameters import classifier_measures
from ntkrl.scoring import head_of
from ntkrl.softmax import OutputHead, SoftmaxOptions, TokenStatistics, token_statistics
from ntkrl.types import Array, Params, Policy, ProbeSet

LOGIT_BYTES = 48
"""Peak memory per logit of a block: the logit, its statistics and their tangents."""

PREDICTED = ("predicted_", "entropy_change_", "arg_max_change_")
"""Prefixes of the arrays of predicted changes, in the order of `ntk.TokenChanges`."""


class ProbeReading(NamedTuple):
    """The probe set under one set of params.

    features: `[O, D]`.
    statistics: of the probe tokens, `[O]` each.
    """

    features: Array
    statistics: TokenStatistics


class Prober:
    """A probe set bound to a policy, with its features and head at the start of training."""

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
          start_params: params at the start of training.
          families: by name `[O]` bool, the tokens that belong to it; measures without a family's
            name are of the first. None for one family of all.
          memory_gib: what the logits of completions read together may take (GiB), at least those of
            one; None to read all together.
        """
        rows, columns = np.nonzero(np.asarray(probe_set.completion_mask))
        count, length = probe_set.completion_mask.shape
        columns = columns + probe_set.tokens.shape[1] - length
        self.policy = policy
        positions = jnp.asarray(columns - 1)
        self.contexts = ntk.Contexts(probe_set.tokens, positions, jnp.asarray(rows), probe_set.mask)
        self.targets = probe_set.tokens[rows, columns]
        if memory_gib is not None:
            count = completions_per_block(count, length, policy.vocab_size, memory_gib)
        self.blocks = tuple(_split(probe_set, positions, rows, count))
        self.rows, self.groups = jnp.asarray(rows), probe_set.groups[rows]
        self.families = {"own": np.ones(len(rows), bool)} if families is None else families
        self.first_family = np.nonzero(next(iter(self.families.values())))[0]
        self.start_features = self.read(start_params).features
        self.start_head = head_of(policy, start_params)

    def map_blocks(self, function: Callable[..., Any], *arrays: Array | np.ndarray) -> Any:
        """Apply a function to blocks of completions and concatenate the results.

        Args:
          function: `(contexts, targets, *arrays) -> tree of [O', …]`; all calls have one shape.
          arrays: further arguments `[O, …]`, one entry per probe token.
        """
        results = []
        for contexts, tokens, count in self.blocks:
            result = function(contexts, *(leaf[tokens] for leaf in (self.targets, *arrays)))
            results.append(jax.tree.map(lambda leaf, n=count: leaf[:n], result))
        if len(results) == 1:
            return results[0]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *results)

    def subset(self, count: int) -> ntk.Contexts:
        """Return `count` contexts (at most) of the first family, evenly spread."""
        indices = np.linspace(0, len(self.first_family) - 1, count).round().astype(int)
        return select(self.contexts, self.first_family[np.unique(indices)])

    def read(self, params: Params) -> ProbeReading:
        """Read every probe token under the params."""
        return self.map_blocks(functools.partial(_read, self.policy, params))

    def measures(self, params: Params, reading: ProbeReading | None = None) -> dict[str, float]:
        """Return the `probe/…` metrics of the params; reading: of the same params, if known."""
        if reading is None:
            reading = self.read(params)
        head, start = head_of(self.policy, params), (self.start_head, self.start_features)
        chosen = jnp.asarray(self.first_family)
        metrics = _measures((head, reading), start, chosen, self.rows, self.groups)
        metrics |= classifier_measures(head.weight, self.start_head.weight)
        if len(self.families) > 1:
            for family, mask in self.families.items():
                measures = confidence_measures(reading.statistics, jnp.asarray(mask))
                names = ("log_prob", "entropy", "confidence")
                metrics |= {f"{family}/{name}": measures[name] for name in names}
        numbers = {f"probe/{name}": float(value) for name, value in metrics.items()}
        # the change of a head that has not moved yet has no rank
        return {name: value for name, value in numbers.items() if math.isfinite(value)}

    def compare(
        self, before: Params, after: Params
    ) -> tuple[dict[str, float], dict[str, np.ndarray], tuple[ProbeReading, ProbeReading]]:
        """Compare the change of the probe tokens' log-probs with its first-order prediction.

        The direction is the realised change θ_after − θ_before.

        Args:
          before, after: params on either side of one optimizer step.

        Returns:
          `(metrics, arrays, readings)`: the `predict/…` metrics; `[O]` arrays `actual`,
          `predicted_head`, `predicted_body`, the same of the entropy and of the arg-max token's
          log π after the other prefixes of PREDICTED, `log_probs`, `entropy`, `max_prob` (nats),
          the last three as read before the step, and `cosines` `[S, S]` after it, see
          `completion_cosines`; and the readings before and after.
        """
        direction = jax.tree.map(jnp.subtract, after, before)
        predict = functools.partial(ntk.predict_changes, self.policy, before, direction)
        parts: dict[str, ntk.TokenChanges] = self.map_blocks(predict)
        old, new = self.read(before), self.read(after)
        arrays = {
            prefix + name: np.asarray(change)
            for name, changes in parts.items()
            for prefix, change in zip(PREDICTED, changes, strict=True)
        }
        arrays["actual"] = np.asarray(new.statistics.log_probs - old.statistics.log_probs)
        completions = self.contexts.tokens.shape[0]
        arrays["cosines"] = np.asarray(completion_cosines(new.features, self.rows, completions))
        for name in ("log_probs", "entropy", "max_prob"):
            arrays[name] = np.asarray(getattr(old.statistics, name))
        return comparison(arrays), arrays, (old, new)


def completions_per_block(total: int, length: int, vocab_size: int, memory_gib: float) -> int:
    """Return how many of `total` completions of `length` tokens a Prober reads together, ≥ 1."""
    fitting = memory_gib * 2**30 // (LOGIT_BYTES * length * vocab_size)
    return int(max(1, min(total, fitting)))


def comparison(arrays: dict[str, np.ndarray]) -> dict[str, float]:
    """Return shares, relative error and correlation of a step's arrays (see `Prober.compare`).

    The share of a part is ⟨Δ_part, Δ⟩/⟨Δ, Δ⟩ with Δ the full prediction: shares add up to one
    and leave [0, 1] when parts oppose each other. A step that moved nothing gives NaN.
    """
    actual = arrays["actual"].astype(np.float64)
    parts, *others = (
        {
            name.removeprefix(prefix): value.astype(np.float64)
            for name, value in arrays.items()
            if name.startswith(prefix)
        }
        for prefix in PREDICTED
    )
    total = functools.reduce(np.add, parts.values())
    with np.errstate(invalid="ignore", divide="ignore"):
        metrics = {
            f"predict/{name}_share": float(part @ total / (total @ total))
            for name, part in parts.items()
        }
        for kind, changes in zip(("entropy_", "arg_max_"), others, strict=True):
            change = functools.reduce(np.add, changes.values(), np.zeros_like(total))
            metrics |= {
                f"predict/{kind}{name}_share": float(part @ change / (change @ change))
                for name, part in changes.items()
            }
        error = np.linalg.norm(actual - total) / np.linalg.norm(actual)
        centred, predicted = actual - actual.mean(), total - total.mean()
        scale = np.linalg.norm(centred) * np.linalg.norm(predicted)
        metrics["predict/relative_error"] = float(error)
        metrics["predict/correlation"] = float(centred @ predicted / scale)
    return metrics


def _split(
    probe_set: ProbeSet, positions: Array, rows: np.ndarray, count: int
) -> Iterator[tuple[ntk.Contexts, np.ndarray, int]]:
    """Yield blocks of `count` completions of one shape: contexts, their indices, how many count."""
    total = probe_set.tokens.shape[0]
    starts = range(0, total, count)
    blocks = [np.nonzero((start <= rows) & (rows < start + count))[0] for start in starts]
    widest = max(map(len, blocks))
    for start, indices in zip(starts, blocks, strict=True):
        first = min(start, total - count)  # the last block overlaps the one before
        padded = np.pad(indices, (0, widest - len(indices)), mode="edge")
        block = ntk.Contexts(
            probe_set.tokens[first : first + count],
            positions[padded],
            jnp.asarray(rows[padded] - first),
            probe_set.mask[first : first + count],
        )
        yield block, padded, len(indices)


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
    """Measure the chosen probe tokens, now and against the start."""
    (head, reading), (start_head, start_OD) = policy, start
    phi_OD, start_OD = reading.features[chosen], start_OD[chosen]
    statistics = jax.tree.map(lambda leaf: leaf[chosen], reading.statistics)
    rows, groups = rows[chosen], groups[chosen]
    metrics = confidence_measures(statistics, jnp.ones(chosen.shape, bool))
    metrics |= feature_measures(phi_OD, start_OD, rows, groups)
    metrics |= cosine_variances(phi_OD, rows, groups) | feature_drift(phi_OD, start_OD)
    options = SoftmaxOptions(chunk_vocabulary=8192)
    apart = divergences((head, phi_OD), (start_head, start_OD), options)
    names = ("kl_to_start", "kl_from_start", "total_variation")
    return metrics | dict(zip(names, map(jnp.mean, apart), strict=True))
