"""Measures of the kernel of some contexts, computed in steps, the cheap ones first.

With O contexts, the parts P = head, body and, where the head is tied, cross (see `ntk.PARTS`):

    head [O, O]                 ⟨φ, φ'⟩; the head kernel is this times I_V
    cosines [O, O]              of the features φ
    trace_P, trace_full [O, O]  tr K_P(o, u) over the vocabulary
    share_P [2]                 Σ tr K_P / Σ tr K over pairs o = u and over pairs o ≠ u; the shares
                                add up to 1, and off the diagonal may lie outside [0, 1] (NaN for
                                a single context)
    frobenius_P, frobenius_full ‖K_P‖_F over contexts and vocabulary
    eigenvalues_head [O]        of `head`, largest first; each is V-fold in the head kernel
    eigenvalues_body, eigenvalues_full [n]  the n largest, repeated by multiplicity
    layers [G], trace_layers [G, O, O]      on demand: groups of parameters, adding up to full

A soft-capped head has slopes that vary over the vocabulary: its norms need O²V² numbers and are
left out where these do not fit the memory, and eigenvalues_head are the n largest of the head
kernel. So are norms of a tied head whose table is used otherwise than by one lookup of rows.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ntkrl import ntk
from ntkrl.numerics import einsum
from ntkrl.types import Array, Params, Policy

Arrays = dict[str, np.ndarray]
Progress = Callable[[int, str], None]
"""Called with the number of steps done and the name of the next."""

MEASURES = ("head", "traces", "norms", "eigenvalues")
"""Measures by rising cost; norms and eigenvalues need M, traces do not."""
BODY_FRACTION = 0.25
"""Fraction of the memory for a block of M `[O, U, D, D]`, of which about three copies exist."""
LANCZOS_PRODUCTS = 150
"""Products with the kernel that a search for a few eigenvalues takes, about."""


@dataclasses.dataclass(frozen=True, eq=False)
class KernelPlan:
    """A kernel on contexts, split in blocks of contexts whose M fits the memory.

    kernel: of all contexts. between: the kernel of two blocks. pairs: of blocks, o ≥ u.
    """

    kernel: ntk.Kernel
    between: Callable[[slice, slice], ntk.Kernel]
    pairs: tuple[tuple[slice, slice], ...]

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that add up to the full kernel."""
        return ("head", "body", "cross") if self.kernel.problem.tied else ("head", "body")

    @functools.cached_property
    def factors(self) -> dict[str, ntk.Factored]:
        """Factors of every part of the only block."""
        return _factors(self.kernel)


class KernelStep(NamedTuple):
    """A step of the computation.

    measure: one of MEASURES.
    name: what it computes.
    flops: of its matrix products.
    run: returns its arrays; reads those of earlier steps.
    reports: layers that it reports (see `ntk.listening`), 0 for none.
    """

    measure: str
    name: str
    flops: float
    run: Callable[[Mapping[str, Any]], dict[str, Any]]
    reports: int = 0


def plan_kernel(
    model: Policy | ntk.Network,
    params: Params,
    contexts: ntk.Contexts,
    layers: bool = False,
    memory_gib: float = 8.0,
    report: bool = False,
) -> KernelPlan:
    """Plan the computation of a kernel.

    Args:
      model, params: as in `ntk.kernel`.
      contexts: O contexts.
      layers: with a group per layer.
      memory_gib: what a call may use beyond the params (GiB).
      report: as in `ntk.KernelOptions`.

    Raises:
      ValueError: what `ntk.kernel` raises.
    """
    groups = ntk.by_layer(model, params) if layers else ()
    make = functools.partial(
        ntk.kernel, model, params, groups=groups, memory_gib=memory_gib, report=report
    )
    kernel = make(contexts)
    contexts = kernel.problem.observed  # with rows and mask filled in

    def between(a: slice, b: slice) -> ntk.Kernel:
        return make(select(contexts, a), None if a == b else select(contexts, b))

    blocks = _blocks(kernel)
    pairs = tuple((a, b) for i, a in enumerate(blocks) for b in blocks[: i + 1])
    if len(pairs) == 1:
        return KernelPlan(kernel, lambda a, b: kernel, pairs)
    return KernelPlan(kernel, between, pairs)


def kernel_steps(
    plan: KernelPlan, eigenpairs: int = 8, measures: Sequence[str] = MEASURES
) -> list[KernelStep]:
    """Return the steps that compute the arrays which this module lists, cheapest first.

    Args:
      plan: from `plan_kernel`.
      eigenpairs: n, in [1, O·V).
      measures: some of MEASURES.

    Raises:
      ValueError: n out of range, or unknown measures.
    """
    problem = plan.kernel.problem
    size = problem.observed.count * problem.vocab_size
    if not 1 <= eigenpairs < size:
        raise ValueError(f"eigenpairs must be in [1, {size}) for these contexts, not {eigenpairs}.")
    unknown = [measure for measure in measures if measure not in MEASURES]
    if unknown or not measures:
        raise ValueError(f"measures are some of {', '.join(MEASURES)}, not {', '.join(measures)}.")
    steps = []
    if "head" in measures:
        steps.append(KernelStep("head", "features", _forward(plan), lambda done: _head(plan)))
    if "traces" in measures:
        steps += _trace_steps(plan)
    if "norms" in measures:
        steps += _norm_steps(plan)
    if "eigenvalues" in measures:
        work = 0.0 if "norms" in measures or len(plan.pairs) > 1 else _body_flops(plan)
        for part in ("body", "full"):
            run = functools.partial(_eigenvalues, plan, eigenpairs, part)
            name = f"eigenvalues of {part}"
            reports = problem.body_reports() if work else 0
            work += _search_flops(plan, part)
            steps.append(KernelStep("eigenvalues", name, work, run, reports))
            work = 0.0
        if problem.capped:
            run = functools.partial(_eigenvalues, plan, eigenpairs, "head")
            steps.append(KernelStep("eigenvalues", "eigenvalues of head", 0.0, run))
    return steps


def kernel_measures(
    plan: KernelPlan,
    eigenpairs: int = 8,
    progress: Progress = lambda done, doing: None,
    measures: Sequence[str] = MEASURES,
) -> Arrays:
    """Compute the arrays of all steps.

    Args:
      plan, eigenpairs, measures: as for `kernel_steps`.
      progress: called before each step.

    Returns:
      Arrays by name, on the host.

    Raises:
      ValueError: n out of range, or unknown measures.
    """
    arrays: Arrays = {}
    for number, step in enumerate(kernel_steps(plan, eigenpairs, measures)):
        progress(number, step.name)
        arrays |= on_host(step.run(arrays))
    return arrays


def kernel_traces(plan: KernelPlan) -> Arrays:
    """Compute `head`, traces and shares of `kernel_measures` alone; on the host."""
    arrays = kernel_measures(plan, 1, measures=("traces",))
    return {"head": np.asarray(plan.kernel.head), **arrays}


def on_host(arrays: Mapping[str, Any]) -> Arrays:
    """Return arrays of NumPy."""
    return {name: np.asarray(value) for name, value in arrays.items()}


def select(contexts: ntk.Contexts, indices: slice | np.ndarray) -> ntk.Contexts:
    """Return some contexts of the same sequences."""
    positions = contexts.positions[indices]
    rows = None if contexts.rows is None else contexts.rows[indices]
    return dataclasses.replace(contexts, positions=positions, rows=rows)


def _blocks(kernel: ntk.Kernel) -> list[slice]:
    """Split the contexts in blocks whose M fits its fraction of the memory."""
    numbers = BODY_FRACTION * kernel.problem.budget / kernel.problem.dtype.itemsize
    step = max(1, int(numbers**0.5 / kernel.problem.feature_size))
    count = kernel.problem.observed.count
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _head(plan: KernelPlan) -> dict[str, Any]:
    """Return the measures of features and of the head kernel that need no body."""
    kernel = plan.kernel
    arrays: dict[str, Any] = {
        "head": kernel.head,
        "cosines": _cosines(kernel.problem.head_inputs[0].features),
        "trace_head": kernel.trace("head"),
    }
    if not kernel.problem.capped:
        head_OO = np.asarray(kernel.head)
        square = kernel.problem.vocab_size * np.sum(head_OO.astype(float) ** 2)
        arrays["frobenius_head"] = np.sqrt(square)
        arrays["eigenvalues_head"] = np.linalg.eigvalsh(head_OO)[::-1]
    return arrays


def _cosines(features_OD: Array) -> Array:
    unit_OD = features_OD / jnp.linalg.norm(features_OD, axis=1, keepdims=True)
    return einsum("od,ud->ou", unit_OD, unit_OD)


def _trace_steps(plan: KernelPlan) -> list[KernelStep]:
    kernel, groups = plan.kernel, tuple(plan.kernel.problem.groups)
    problem, steps = kernel.problem, []
    if problem.tied:
        work = problem.estimate_cross(trace=True).flops
        run = lambda done: {"trace_cross": kernel.trace("cross")}  # noqa: E731
        steps.append(KernelStep("traces", "traces of cross", work, run))
    traceable = problem.is_traceable
    work = problem.estimate_traces().flops if traceable else _body_flops(plan)
    run = lambda done: _shares(plan, {"trace_body": _blockwise(plan, "body")} | dict(done))  # noqa: E731
    reports = problem.trace_reports() if traceable else 0
    steps.append(KernelStep("traces", "traces of body", work, run, reports))
    if groups:
        work = 0.0 if traceable else len(groups) * _body_flops(plan)
        steps.append(KernelStep("traces", "traces of layers", work, lambda done: _layers(plan)))
    return steps


def _blockwise(plan: KernelPlan, part: str) -> np.ndarray:
    """Return the traces of a part `[O, O]`, block by block where M is needed."""
    if plan.kernel.problem.is_traceable:
        return np.asarray(plan.kernel.trace(part))
    count = plan.kernel.problem.observed.count
    trace_OO = np.zeros((count, count), plan.kernel.problem.dtype)
    for a, b in plan.pairs:
        trace_OO[a, b] = plan.between(a, b).trace(part)
        trace_OO[b, a] = trace_OO[a, b].T
    return trace_OO


def _layers(plan: KernelPlan) -> dict[str, Any]:
    groups = tuple(plan.kernel.problem.groups)
    traces = np.stack([_blockwise(plan, group) for group in groups])
    return {"layers": np.array(groups), "trace_layers": traces}


def _shares(plan: KernelPlan, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return the traces of all parts, and their shares in the sums on and off the diagonal."""
    traces = {"trace_head": plan.kernel.trace("head"), **arrays}
    parts = {part: np.asarray(traces[f"trace_{part}"]) for part in plan.parts}
    full_OO = functools.reduce(np.add, parts.values())
    single, sums = len(full_OO) == 1, []
    for values_OO in (*parts.values(), full_OO):
        diagonal = np.trace(values_OO)
        sums.append(np.array([diagonal, np.nan if single else np.sum(values_OO) - diagonal]))
    result = {f"trace_{part}": values_OO for part, values_OO in parts.items()}
    result |= {
        f"share_{part}": values / sums[-1] for part, values in zip(parts, sums, strict=False)
    }
    return {**result, "trace_full": full_OO}


def _factors(kernel: ntk.Kernel) -> dict[str, ntk.Factored]:
    """Return the factors of every part; `cross` and `full` share the tokens' columns."""
    width = kernel.problem.feature_size
    body = kernel.body()
    full = ntk.factored(kernel, "full", body)
    factors = {"full": full, "body": ntk.factored(kernel, "body", body)}
    if kernel.problem.tied:
        crossed = full.body.at[:, :, :width, :width].set(0)
        factors["cross"] = full._replace(head=jnp.zeros_like(full.head), body=crossed)
    return factors


def _factor(plan: KernelPlan) -> bool:
    """Test whether every part factors without slopes."""
    return not plan.kernel.problem.capped and ntk.can_factor(plan.kernel, "full")


def _norm_steps(plan: KernelPlan) -> list[KernelStep]:
    steps = []
    if _factor(plan):
        for number, (a, b) in enumerate(plan.pairs):
            run = functools.partial(_add_squares, plan, a, b)
            name = "norms" if len(plan.pairs) == 1 else f"norms {number + 1}/{len(plan.pairs)}"
            reports = plan.between(a, b).problem.body_reports()
            work = _body_flops(plan) / len(plan.pairs)
            steps.append(KernelStep("norms", name, work, run, reports))
        return steps
    problem = plan.kernel.problem
    numbers = (problem.observed.count * problem.vocab_size) ** 2
    if numbers * problem.dtype.itemsize > problem.budget:
        return []
    dense = lambda done: {  # noqa: E731
        f"frobenius_{part}": ntk.frobenius(plan.kernel, part) for part in (*plan.parts, "full")
    }
    return [KernelStep("norms", "norms", 2.0 * numbers, dense)]


def _add_squares(plan: KernelPlan, a: slice, b: slice, done: Mapping[str, Any]) -> dict[str, Any]:
    """Add the squares of a pair of blocks to norms."""
    factors = plan.factors if len(plan.pairs) == 1 else _factors(plan.between(a, b))
    result = {}
    for part, factor in factors.items():
        name = f"frobenius_{part}"
        norm = float(ntk.frobenius(factor))
        square = norm**2 * (1 if a == b else 2)
        result[name] = np.sqrt(float(done.get(name, 0.0)) ** 2 + square)
    return result


def _eigenvalues(
    plan: KernelPlan, count: int, part: str, done: Mapping[str, Any]
) -> dict[str, Any]:
    # the tolerance is of the vectors; errors of eigenvalues are quadratic in theirs
    tolerance = float(jnp.finfo(plan.kernel.problem.dtype).eps) ** 0.5
    kernel: ntk.Kernel | ntk.Factored = plan.kernel
    if len(plan.pairs) == 1 and part != "head" and _factor(plan):
        kernel = plan.factors[part]
    values, _ = ntk.eigenpairs(kernel, count, part, tolerance)
    return {f"eigenvalues_{part}": values}


def _forward(plan: KernelPlan) -> float:
    return plan.kernel.problem.forward_flops * plan.kernel.problem.observed.count


def _body_flops(plan: KernelPlan) -> float:
    """Return the FLOPs of M and, where the head is tied, of the cross terms, of all blocks."""
    total = 0.0
    for a, b in plan.pairs:
        kernel = plan.between(a, b)
        total += kernel.estimate().flops
        if kernel.problem.tied:
            total += kernel.problem.estimate_cross(trace=False).flops
    return total


def _search_flops(plan: KernelPlan, part: str) -> float:
    """Return the FLOPs of Lanczos on factors, or of VJPs and JVPs where there are none."""
    problem = plan.kernel.problem
    width = problem.observed.count * problem.feature_size
    if len(plan.pairs) == 1 and _factor(plan):
        basis = 4.0 * problem.vocab_size * problem.feature_size**2
        return basis + LANCZOS_PRODUCTS * 2.0 * width**2
    return LANCZOS_PRODUCTS * 6 * _forward(plan)
