"""The step ledger: contributions of samples, momentum and decay to one real optimizer step.

With every factor of the optimizer at its realised value, the change θ → θ' of a step is a sum over
training samples, terms of the loss, momentum, weight decay and a remainder of the optimizer (see
ntkrl.attribution.optimizer_maps). At the probe tokens,

    Δ log π(o) = Σ_i Σ_terms + momentum + decay + optimizer + curvature

where all but the curvature are first order, and the curvature is the measured change less their
sum. The change of entropy, ΔH = −Cov_{a∼π}(log π(a), Δz(a)) to first order, splits in the same way.
Each column is split by group of parameters: "head", the head's role, and groups in the features'
role (a tied matrix counts in both, as in `ntk.predict`).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from ntkrl import ntk, trees
from ntkrl.attribution.costs import ALGORITHMS, LedgerEstimate, estimates
from ntkrl.attribution.decomposition import (
    COLUMNS,
    AttributionInputs,
    AttributionResult,
    AttributionSpec,
    OptimizerStep,
    Terms,
    attribute,
)
from ntkrl.attribution.linear_maps import MEASURES, parameter_groups
from ntkrl.numerics import GIB
from ntkrl.probe import LEDGER_BY, GradientNoise
from ntkrl.types import Array, Params, Policy


class Account(NamedTuple):
    """Attribution of a step.

    arrays: by name, see `Ledger.read`.
    noise: of the samples' gradients before clipping; None by group.
    """

    arrays: dict[str, np.ndarray]
    noise: GradientNoise | None


@dataclasses.dataclass(frozen=True)
class Ledger:
    """A step ledger bound to a stage.

    policy: the network's functions.
    terms: `(params, rows of a batch, reference) -> ({name: Total}, measures)`, the terms of the
        loss that the step minimised, each divided by its own count; they add up over rows. Measures
        are not read. Keep one function object: compiled programs are cached by it.
    optimizer: transformation of the trained leaves' gradients.
    trained: one bool per leaf of the params, in leaf order.
    groups: `(pattern, name)` tuples over the parameters in the features' role, as in `ntk.kernel`.
    by: "group" for the samples of a batch together, "sample" for each of them.
    algorithm: of the samples' contributions: "jvp", one JVP over the probe set for each, "vjp",
        inner products with the gradients of all probe tokens, or "auto" for the fastest that fits
        in `memory_gib` by estimate.
    memory_gib: what the samples' contributions may use beyond params and state (GiB).
    microbatches: equal parts of the rows that the batch's gradient is accumulated over.
    mesh: over which params and batch are sharded, or None.
    """

    policy: Policy
    terms: Terms
    optimizer: optax.GradientTransformation
    trained: tuple[bool, ...]
    groups: trees.Patterns = ntk.BODY_GROUP
    by: str = "sample"
    algorithm: str = "auto"
    memory_gib: float = 2.0
    microbatches: int = 1
    mesh: Mesh | None = None

    def __post_init__(self):
        problems = []
        if self.by not in LEDGER_BY:
            problems.append(f"by must be one of {', '.join(LEDGER_BY)}, not {self.by!r}")
        if self.algorithm not in (*ALGORITHMS, "auto"):
            problems.append(
                f"algorithm must be one of {', '.join(ALGORITHMS)}, auto, not {self.algorithm!r}"
            )
        if not self.memory_gib > 0:
            problems.append(f"memory_gib must be > 0, not {self.memory_gib}")
        if problems:
            raise ValueError("ledger: " + "; ".join(problems) + ".")

    def check(self, params: Params) -> None:
        """Check that the groups fit the params, as `read` does.

        Raises:
          ValueError: they do not.
        """
        parameter_groups(self.groups, self.policy, params, self.trained)

    def read(
        self,
        step: OptimizerStep,
        contexts: ntk.Contexts,
        targets: Array,
        actual: Array | None = None,
    ) -> Account:
        """Attribute the change that one optimizer step made at the probe tokens.

        Args:
          step: the optimizer step.
          contexts: O probe contexts.
          targets: `[O]` the probe tokens.
          actual: `[2, O]` measured change of log π and entropy, where it is known; None to
            measure it.

        Returns:
          Account. Its arrays are, for "log_prob" and "entropy" (nats): `log_prob/<column>/<group>`,
          with columns the terms (`[O, B]` by sample, else `[O]`), "momentum", "decay" and
          "optimizer" (`[O]`), groups "head" and those of `groups`; `log_prob/actual` and
          `log_prob/curvature` (`[O]`). Columns and curvature add up to the actual change.

        Raises:
          ValueError: contexts that do not fit, groups that do not cover the params, a term named
            like a column, rows that `microbatches` does not divide.
        """
        function, (spec, inputs) = self.bind(step, contexts, targets, actual)
        result = jax.device_get(function(spec, inputs))
        return Account(_named_arrays(spec, result), result.noise)

    def bind(
        self,
        step: OptimizerStep,
        contexts: ntk.Contexts,
        targets: Array,
        actual: Array | None = None,
    ) -> tuple[jax.stages.Wrapped, tuple[AttributionSpec, AttributionInputs]]:
        """Return the call that `read` makes: a jitted function and its positional arguments.

        The first argument is static. Arrays of all but the contexts may be `jax.ShapeDtypeStruct`,
        for `function.lower(*arguments)`; arguments and errors are those of `read`.
        """
        network, params = ntk.as_network(self.policy), step.before.params
        contexts = ntk.check_contexts(contexts, "contexts", network, params, is_policy=True)
        rows = jax.tree.leaves(step.batch)[0].shape[0]
        if rows % self.microbatches:
            raise ValueError(
                f"ledger: {rows} rows cannot be cut in {self.microbatches} equal parts; choose a "
                "divisor of the rows as microbatches."
            )
        sequences = ntk.group_by_sequence(contexts)
        inputs = AttributionInputs(step, contexts, sequences, targets, actual)
        leaves, treedef = jax.tree.flatten(inputs)
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        return attribute, (_spec(self, treedef, *shapes), inputs)

    def estimates(
        self, step: OptimizerStep, contexts: ntk.Contexts, targets: Array
    ) -> dict[str, LedgerEstimate]:
        """Return the cost of each algorithm for the samples; arguments as for `read`."""
        _, (spec, inputs) = self.bind(step, contexts, targets)
        return estimates(spec, inputs, self.memory_gib)


@functools.lru_cache(maxsize=16)
def _spec(ledger: Ledger, treedef: Any, *shapes: Any) -> AttributionSpec:
    """Return the static part of the attribution of a step of these shapes."""
    inputs = jax.tree.unflatten(treedef, shapes)
    step, params = inputs.step, inputs.step.before.params
    names = tuple(jax.eval_shape(ledger.terms, params, step.batch, step.reference)[0])
    reserved = sorted({*COLUMNS, "actual", "curvature"} & {*names})
    if reserved:
        raise ValueError(f"ledger: terms may not be called {', '.join(reserved)}; rename them.")
    spec = AttributionSpec(
        *(ledger.policy, ledger.terms, ledger.optimizer, ledger.trained),
        *(ledger.microbatches, ledger.mesh),
        groups=parameter_groups(ledger.groups, ledger.policy, params, ledger.trained),
        names=names,
        by=ledger.by,
    )
    costs = estimates(spec, inputs, ledger.memory_gib)
    spec = dataclasses.replace(spec, columns=costs["jvp"].chunk * len(names))
    if ledger.by == "group":
        return spec
    best = costs.get(ledger.algorithm) or ntk.cheapest(costs.values(), ledger.memory_gib * GIB)
    return dataclasses.replace(spec, algorithm=best.algorithm, chunk=best.chunk, block=best.block)


def _named_arrays(spec: AttributionSpec, result: AttributionResult) -> dict[str, np.ndarray]:
    """Arrange a result by the names of `Ledger.read`."""
    arrays: dict[str, np.ndarray] = {}
    terms = () if spec.by == "sample" else spec.names
    for m, measure in enumerate(MEASURES):
        named: dict[str, Any] = {}
        for g, group in enumerate(("head", *spec.groups.names)):
            if result.samples is not None:
                for t, term in enumerate(spec.names):
                    named[f"{term}/{group}"] = result.samples[g, m, :, t]
            for k, column in enumerate((*terms, *COLUMNS)):
                named[f"{column}/{group}"] = result.columns[g, m, :, k]
        first_order = sum(_sum_samples(value) for value in named.values())
        actual = result.actual[m]
        named |= {"actual": actual, "curvature": actual - first_order}
        arrays |= {f"{measure}/{name}": value for name, value in named.items()}
    return arrays


def _sum_samples(values: np.ndarray) -> np.ndarray:
    """Sum over samples where there are any."""
    return values if values.ndim == 1 else values.sum(axis=1, dtype=np.float64)


def split_kl(arrays: dict[str, np.ndarray], shares: np.ndarray) -> dict[str, np.ndarray]:
    """Split the columns "kl", of `[B]` shares in each sample's contribution, off "policy"."""
    split: dict[str, np.ndarray] = {}
    for name, value in arrays.items():
        measure, column, *group = name.split("/", 2)
        if column == "policy":
            kl = value * shares
            split |= {f"{measure}/kl/{group[0]}": kl, name: value - kl}
        else:
            split[name] = value
    return split


def ledger_measures(
    arrays: dict[str, np.ndarray],
    advantages: np.ndarray | None = None,
    same_prompt: np.ndarray | None = None,
) -> dict[str, float]:
    """Summarise a step's ledger.

    Parts are the terms and other columns, the curvature, "head" and "body" (all groups) of the
    terms; by sample also the terms' samples with A > 0 ("positive") and A < 0 ("negative"), and of
    the probe token's own prompt ("self") and other ones ("others").

    Args:
      arrays: from `Ledger.read`.
      advantages: `[B]` of the samples, or None; needs a ledger by sample.
      same_prompt: `[O, B]` bool, True where the sample answers the probe token's prompt, or None;
        likewise.

    Returns:
      `ledger/<part>_share`, ⟨Δ_part, Δ⟩/⟨Δ, Δ⟩ with Δ the actual change of log π: those of
      columns and curvature add up to one. `ledger/<part>_entropy`, mean change of the entropy
      (nats). `ledger/optimizer_size` and `ledger/curvature_size`, ‖Δ_part‖/‖Δ‖. A step that moved
      nothing gives NaN.
    """
    metrics: dict[str, float] = {}
    for measure in MEASURES:
        prefix = f"{measure}/"
        named = {
            name.removeprefix(prefix): value.astype(np.float64)
            for name, value in arrays.items()
            if name.startswith(prefix)
        }
        actual = named.pop("actual")
        parts = _parts(named, advantages, same_prompt)
        if measure == "entropy":
            metrics |= {f"ledger/{part}_entropy": float(v.mean()) for part, v in parts.items()}
            metrics["ledger/actual_entropy"] = float(actual.mean())
            continue
        with np.errstate(invalid="ignore", divide="ignore"):
            for part, value in parts.items():
                metrics[f"ledger/{part}_share"] = float(value @ actual / (actual @ actual))
            for part in ("optimizer", "curvature"):
                size = np.linalg.norm(parts[part]) / np.linalg.norm(actual)
                metrics[f"ledger/{part}_size"] = float(size)
    return metrics


def _parts(
    named: dict[str, np.ndarray], advantages: np.ndarray | None, same_prompt: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Return `[O]` per part; columns first, then parts of the terms."""
    parts: dict[str, Any] = {"curvature": named.pop("curvature")}
    samples: Any = 0.0
    roles: dict[str, Any] = {"head": 0.0, "body": 0.0}
    for name, value in named.items():
        column, group = name.split("/", 1)
        parts[column] = parts.setdefault(column, 0.0) + _sum_samples(value)
        if column not in COLUMNS:
            samples = samples + value
            roles["head" if group == "head" else "body"] += _sum_samples(value)
    parts |= roles
    if advantages is not None:
        parts["positive"] = samples @ (advantages > 0)
        parts["negative"] = samples @ (advantages < 0)
    if same_prompt is not None:
        parts["self"] = np.sum(samples * same_prompt, axis=1)
        parts["others"] = np.sum(samples * ~same_prompt, axis=1)
    return parts
