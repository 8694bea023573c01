"""The checked inputs of a kernel, its parts as arrays, and Γ by the chosen algorithm."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ntkrl import trees
from ntkrl.jaxpr import flops
from ntkrl.ntk import parts
from ntkrl.ntk.contexts import Contexts, GroupedContexts, group_by_sequence
from ntkrl.ntk.estimates import (
    ALGORITHMS,
    Estimate,
    choose,
    estimate_algorithms,
    estimate_lookup,
    estimate_traces,
)
from ntkrl.ntk.forms import HeadInputs, Operands, head_inputs, head_weights
from ntkrl.ntk.jacobian_gram import GramInputs, arrange, jacobian, jvp_vjp
from ntkrl.ntk.layerwise import layerwise
from ntkrl.ntk.network import FeatureFunction, Network
from ntkrl.ntk.taps import TapPlan, plan_taps
from ntkrl.ntk.traces import LeafTraces, block_size, leaf_traces
from ntkrl.numerics import GIB
from ntkrl.types import Array, Params


@dataclasses.dataclass(frozen=True, eq=False)
class KernelOptions:
    """Options of `ntkrl.ntk.kernel`.

    groups: ordered `(pattern, name)` list that covers the parameters, for instance
        `ntk.by_layer(model, params)`; each name is then a part. A stacked leaf is spelled once per
        layer (`layers/3/mlp/up/kernel`) or for all layers at once (`layers/mlp/up/kernel`).
    precondition: tree like params, the diagonal P of J P Jᵀ (for Adam 1 / (√ν + ε)).
    algorithm: contraction of the feature Jacobians: "jvp_vjp", "jacobian" or "layerwise"; "auto"
        for the cheapest of them by their estimates.
    forward_mode: False for networks without forward-mode derivatives (fused attention): every JVP
        becomes a VJP of a VJP.
    memory_gib: memory a call may use beyond the params (GiB, all devices together); chunks are
        chosen to fit, and larger results are refused.
    report: report the layers that are finished (see reports.py), for progress bars.
    """

    groups: trees.Patterns = ()
    precondition: Params | None = None
    algorithm: str = "auto"
    forward_mode: bool = True
    memory_gib: float = 8.0
    report: bool = False

    def __post_init__(self) -> None:
        if self.algorithm not in ("auto", *ALGORITHMS):
            known = ", ".join(("auto", *ALGORITHMS))
            raise ValueError(f"algorithm {self.algorithm!r} is unknown; known are {known}.")
        if not self.memory_gib > 0:
            raise ValueError(f"memory_gib must be positive, not {self.memory_gib}.")


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A network at observed and updated contexts.

    network, params, observed, updated: checked arguments of `ntkrl.ntk.kernel`.
    features: the features as a function of the leaves they depend on.
    groups: `{name: indices of its spelled parameter names}`.
    options: the KernelOptions.
    """

    network: Network
    params: Params
    observed: Contexts
    updated: Contexts
    features: FeatureFunction
    groups: Mapping[str, frozenset[int]]
    options: KernelOptions

    @property
    def budget(self) -> int:
        """Bytes a call may use beyond the params."""
        return int(self.options.memory_gib * GIB)

    @property
    def symmetric(self) -> bool:
        """True where observed and updated contexts are the same."""
        return self.updated is self.observed

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.network.weight(self.params).shape[0]

    @property
    def feature_size(self) -> int:
        """D."""
        return self.network.weight(self.params).shape[1]

    @property
    def capped(self) -> bool:
        """True where the head has a soft-cap, so that slopes differ over the vocabulary."""
        return self.network.head.soft_cap is not None

    @property
    def tied(self) -> bool:
        """True where features depend on the head's matrix."""
        return self.features.head_index is not None

    @functools.cached_property
    def head_inputs(self) -> tuple[HeadInputs, HeadInputs]:
        """Features and slopes of both sides."""
        left = head_inputs(self.network, self.params, self.observed)
        if self.symmetric:
            return left, left
        return left, head_inputs(self.network, self.params, self.updated)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of results."""
        return self.head_inputs[0].features.dtype

    def part(self, name: str) -> tuple[parts.Roles, parts.Weights]:
        """Return the terms of a part, and the weights of the params' leaves.

        Raises:
          ValueError: an unknown name.
        """
        roles, weights = parts.resolve(
            name, self.network, self.params, self.groups, self.options.precondition
        )
        if not self.tied:
            body = roles.body and name != "input"
            roles = roles._replace(body=body, output_input=False, input_output=False)
        return roles, weights

    def operands(self, part: str) -> tuple[parts.Roles, Operands]:
        """Return the terms and the arrays of a part."""
        roles, weights = self.part(part)
        head = head_weights(self.network, self.params, weights)
        left, right = self.head_inputs
        operands = Operands(self.params, self.observed, self.updated, left, right, weights, head)
        return roles, operands

    @functools.cached_property
    def _plans(self) -> tuple[TapPlan, TapPlan]:
        left = plan_taps(self.features, self.params, self.observed, None)
        if self.symmetric:
            return left, left
        return left, plan_taps(self.features, self.params, self.updated, None)

    @property
    def forward_flops(self) -> int:
        """FLOPs of the features of one observed sequence."""
        return flops(self._plans[0].traced)

    @property
    def layers(self) -> int:
        """Number of layers in scans, 0 without."""
        plan = self._plans[0]
        return sum(plan.traced.operations[i].eqn.params["length"] for i in plan.scans)

    def body_reports(self) -> int:
        """Number of layers that `body()` reports, 0 where its algorithm does not."""
        estimate = self.estimate(self.gram_inputs("body"), None)
        if estimate.algorithm != "layerwise":
            return 0
        counts = [
            -(-self.feature_size * side.count // estimate.chunk)
            for side in (self.observed, self.updated)
        ]
        pairs = counts[0] * (counts[0] + 1) // 2 if self.symmetric else counts[0] * counts[1]
        return self.layers * pairs

    def trace_reports(self) -> int:
        """Number of layers that the body's traces report."""
        chunk, width = self.estimate_traces().chunk, self.feature_size
        sequences = self.observed.count * (1 if self.symmetric else 2)
        return self.layers * -(-width // block_size(width, chunk, sequences))

    def estimate_traces(self) -> Estimate:
        """Return the Estimate of the body's traces, of all groups together."""
        sides = (self.observed, self.updated)
        return estimate_traces(self.features, self.params, *sides, self.budget)

    def estimate_cross(self, trace: bool) -> Estimate:
        """Return the Estimate of the cross terms of a tied head, or of their trace."""
        tied, total = self.features.of_head(), []
        for side in (self.updated,) if self.symmetric else (self.updated, self.observed):
            length = side.mask.shape[1] if side.mask is not None else 0
            count = length if trace else self.feature_size
            total.append(estimate_lookup(tied, self.params, side, count, self.budget))
        work = sum(estimate.flops for estimate in total)
        return dataclasses.replace(total[0], flops=work)

    @property
    def is_traceable(self) -> bool:
        """True where `traces.leaf_traces` applies: M is not needed for traces."""
        layerwise = self.options.algorithm in ("auto", "layerwise")
        if self.capped or self.options.precondition is not None or not layerwise:
            return False
        return self._plans[0].signature() == self._plans[1].signature()

    @functools.cached_property
    def _leaf_traces(self) -> LeafTraces:
        """Return the traces of WᵀMW by leaf."""
        other = None if self.symmetric else self.updated
        chunk = self.estimate_traces().chunk
        report = self.options.report
        return leaf_traces(self.features, self.params, self.observed, other, chunk, report)

    def body_trace(self, part: str) -> Array | None:
        """Return the trace of a part's body `[O, U]` without M; None where only M gives it."""
        if not self.is_traceable:
            return None
        traces = self._leaf_traces
        weights = parts.used_weights(self.part(part)[1], self.features.used)
        total = jnp.zeros((self.observed.count, self.updated.count), self.dtype)
        for leaf, by_layer in traces.items():
            weight = jnp.ones(1) if weights is None else weights[leaf].reshape(-1)
            if weight.size not in (1, by_layer.shape[0]):
                return None
            total += jnp.sum(by_layer * weight[:, None, None], axis=0)
        return self.network.head.scale**2 * total

    @functools.cached_property
    def _grouped(self) -> tuple[GroupedContexts, GroupedContexts]:
        left = group_by_sequence(self.observed)
        return left, left if self.symmetric else group_by_sequence(self.updated)

    def gram_inputs(
        self, part: str, left: Array | None = None, right: Array | None = None, summed: bool = False
    ) -> GramInputs:
        """Return the inputs of Γ for feature cotangents `[O, B, D]` and `[U, B, D]`.

        Args:
          part: a part or group.
          left, right: cotangents; None for unit vectors, the same object for a symmetric Γ.
          summed: sum over the contexts of each sequence.
        """
        observed = arrange(self._grouped[0], left, self.feature_size, summed)
        updated = None
        if not self.symmetric or left is not right:
            updated = arrange(self._grouped[1], right, self.feature_size, summed)
        weights = parts.used_weights(self.part(part)[1], self.features.used)
        return GramInputs(self.params, observed, updated, weights)

    def estimates(self, inputs: GramInputs, chunk: int | None = None) -> dict[str, Estimate]:
        """Return the Estimate of every algorithm that applies to Γ.

        Raises:
          ValueError: a chunk below 1.
        """
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1, not {chunk}.")
        return estimate_algorithms(self.features, inputs, self.budget, chunk)

    def estimate(self, inputs: GramInputs, chunk: int | None) -> Estimate:
        """Return the Estimate of the chosen algorithm."""
        return choose(self.estimates(inputs, chunk), self.options.algorithm, self.budget)

    def jacobian_gram(self, inputs: GramInputs, chunk: int | None) -> Array:
        """Return Γ: `[O, B_o, U, B_u]`, or `[S_o, S_u]` of summed cotangents."""
        estimate = self.estimate(inputs, chunk)
        if estimate.algorithm == "jvp_vjp":
            flat = jvp_vjp(self.features, inputs, estimate.chunk, self.options.forward_mode)
        elif estimate.algorithm == "jacobian":
            flat = jacobian(self.features, inputs, estimate.chunk)
        else:
            flat = layerwise(self.features, inputs, estimate.chunk, self.options.report)
        rows, columns = inputs.observed, inputs.columns
        if rows.summed:
            return flat
        contexts = columns.sequences * columns.positions.shape[1]
        shape = (-1, rows.per_position, contexts, columns.per_position)
        slots_o, slots_u = (side.slots for side in self._grouped)
        return flat.reshape(shape)[slots_o][:, :, slots_u]

    def sum_sequences(self, values: Array) -> Array:
        """Sum `[O, U]` over the contexts of each pair of sequences."""
        for axis, side in enumerate(self._grouped):
            sequence = side.slots // side.positions.shape[1]
            moved = jnp.moveaxis(values, axis, 0)
            summed = jax.ops.segment_sum(moved, sequence, side.positions.shape[0])
            values = jnp.moveaxis(summed, 0, axis)
        return values

    def check_cotangents(self, array: Array, count: int, name: str) -> Array:
        """Return an array of shape `[count, V]` in the dtype of results.

        Raises:
          ValueError: another shape, or integers.
        """
        expected, array = (count, self.vocab_size), jnp.asarray(array)
        if array.shape != expected:
            raise ValueError(f"{name} must have shape {expected}, not {array.shape}.")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, not {array.dtype}.")
        return array.astype(self.dtype)

    def check_size(self, shape: tuple[int, ...], call: str, instead: str) -> None:
        """Check that a result fits the memory budget.

        Raises:
          ValueError: it does not.
        """
        size = self.dtype.itemsize
        for length in shape:
            size *= length
        if size > self.budget:
            raise ValueError(
                f"{call} would be {size / GIB:.3g} GiB, above memory_gib="
                f"{self.budget / GIB:.3g}; use {instead}, or raise memory_gib."
            )
