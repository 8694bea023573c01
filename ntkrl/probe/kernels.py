"""What the kernel of some contexts is made of: traces, shares, norms, eigenvalues by part.

With O contexts, the parts P = head, body and, where the head is tied, cross (see ntk.PARTS):

    head [O, O]                 ⟨φ, φ'⟩; the head kernel is this times I_V
    cosines [O, O]              of the features φ
    trace_P, trace_full [O, O]  tr K_P(o, u) over the vocabulary
    share_P [2]                 Σ tr K_P / Σ tr K over pairs o = u and over pairs o ≠ u; the shares
                                add up to 1, and off the diagonal may lie outside [0, 1] (NaN for
                                a single context)
    frobenius_P, frobenius_full ‖K_P‖_F over contexts and vocabulary; for cross and full of a tied
                                head only where O²V² numbers fit the memory
    eigenvalues_head [O]        of `head`, largest first; each is V-fold in the head kernel
    eigenvalues_body, eigenvalues_full [n]  the n largest, repeated by multiplicity
    layers [G], trace_layers [G, O, O]      on demand: groups of parameters, adding up to full

A soft-capped head has slopes that vary over the vocabulary: its norms all need O²V² numbers, and
eigenvalues_head are the n largest of the head kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import ntk
from ntkrl.numerics import einsum
from ntkrl.probe.drift import advantage_alignment
from ntkrl.scoring import head_of
from ntkrl.softmax import token_statistics
from ntkrl.types import Array, Params, Policy

Progress = Callable[[int, str], None]
"""Called with the number of steps done and the name of the next."""

BODY_FRACTION = 0.25
"""Of the memory, what a block of M `[O, U, D, D]` may take; it is held about three times."""


@dataclasses.dataclass(frozen=True, eq=False)
class KernelPlan:
    """A kernel on contexts, cut in blocks of contexts whose M fits the memory.

    kernel: of all contexts. between: the kernel of two blocks. pairs: of blocks, o ≥ u.
    """

    kernel: ntk.Kernel
    between: Callable[[slice, slice], ntk.Kernel]
    pairs: tuple[tuple[slice, slice], ...]

    @property
    def body_kernels(self) -> int:
        """How often M of a pair of blocks is computed: once, and once for each group."""
        return len(self.pairs) * (1 + len(self.kernel.problem.groups))

    @property
    def steps(self) -> int:
        """How many steps `kernel_measures` takes."""
        return self.body_kernels + 3

    @property
    def estimate(self) -> ntk.Estimate:
        """What the M of the first pair of blocks costs."""
        return self.between(*self.pairs[0]).estimate()


def plan_kernel(
    model: Policy | ntk.Network,
    params: Params,
    contexts: ntk.Contexts,
    layers: bool = False,
    memory_gib: float = 8.0,
) -> KernelPlan:
    """Say how a kernel is to be computed, before it is.

    Args:
      model, params: as in `ntk.kernel`.
      contexts: O contexts.
      layers: with a group per layer, each at the cost of another body kernel.
      memory_gib: what a call may use beyond the params (GiB).

    Raises:
      ValueError: what `ntk.kernel` raises.
    """
    groups = ntk.by_layer(model, params) if layers else ()
    given = {"groups": groups, "memory_gib": memory_gib}
    kernel = ntk.kernel(model, params, contexts, **given)
    seen = kernel.problem.observed  # with rows and mask filled in

    def between(a: slice, b: slice) -> ntk.Kernel:
        here, there = (
            dataclasses.replace(seen, positions=seen.positions[s], rows=seen.rows[s])
            for s in (a, b)
        )
        return ntk.kernel(model, params, here, None if a == b else there, **given)

    blocks = _blocks(kernel)
    pairs = tuple((a, b) for i, a in enumerate(blocks) for b in blocks[: i + 1])
    return KernelPlan(kernel, between, pairs)


def kernel_measures(
    plan: KernelPlan, eigenpairs: int = 8, progress: Progress = lambda done, doing: None
) -> dict[str, np.ndarray]:
    """Compute what this module lists.

    M is made once per pair of blocks, and traces and norm of the body are read off it.

    Args:
      plan: from `plan_kernel`.
      eigenpairs: n, in [1, O·V).
      progress: called before each step.

    Returns:
      Arrays by name, on the host.

    Raises:
      ValueError: n out of range.
    """
    kernel = plan.kernel
    size = kernel.problem.observed.count * kernel.problem.vocab_size
    if not 1 <= eigenpairs < size:
        raise ValueError(f"eigenpairs must be in [1, {size}) for these contexts, not {eigenpairs}.")
    found = {"head": kernel.head, "cosines": _cosines(kernel.problem.head_inputs[0].features)}
    traces, body_square = _traces(plan, progress)
    found |= traces
    progress(plan.body_kernels, "norms")
    found |= _norms(kernel, found, body_square)
    for i, part in enumerate(("body", "full"), start=1):
        progress(plan.body_kernels + i, f"eigenvalues of {part}")
        found[f"eigenvalues_{part}"] = _largest(kernel, eigenpairs, part)
    if not kernel.problem.capped:
        found["eigenvalues_head"] = np.linalg.eigvalsh(np.asarray(kernel.head))[::-1]
    else:
        found["eigenvalues_head"] = _largest(kernel, eigenpairs, "head")
    return {name: np.asarray(value) for name, value in found.items()}


def kernel_traces(plan: KernelPlan) -> dict[str, np.ndarray]:
    """Compute of what this module lists `head`, traces and shares alone; on the host."""
    found = {"head": plan.kernel.head} | _traces(plan, lambda done, doing: None)[0]
    return {name: np.asarray(value) for name, value in found.items()}


def batch_alignment(
    policy: Policy,
    params: Params,
    contexts: ntk.Contexts,
    targets: np.ndarray,
    advantages: np.ndarray,
    memory_gib: float = 8.0,
) -> float:
    """Return `drift.advantage_alignment` of the whole kernel at some tokens of a batch.

    Args:
      policy, params: of the network.
      contexts: O contexts.
      targets: `[O]` the tokens that follow.
      advantages: `[O]` of them, not all 0.
      memory_gib: what a kernel may use beyond the params (GiB).
    """
    gram = ntk.score_gram(policy, params, contexts, targets, memory_gib=memory_gib)
    found = []
    for number in range(contexts.count):  # of pairs o = u alone
        here = slice(number, number + 1)
        one = dataclasses.replace(
            contexts, positions=contexts.positions[here], rows=contexts.rows[here]
        )
        kernel = ntk.kernel(policy, params, one, memory_gib=memory_gib)
        read = kernel.problem.head_inputs[0].features, jnp.asarray(targets[here])
        statistics = token_statistics(head_of(policy, params), *read)
        square = 1 - 2 * jnp.exp(statistics.log_probs[0]) + statistics.sum_squares[0]
        found.append((float(kernel.trace()[0, 0]), float(square)))
    traces, squares = np.asarray(found).T
    return advantage_alignment(np.asarray(gram), np.diag(traces), advantages, squares)


def _blocks(kernel: ntk.Kernel) -> list[slice]:
    """Cut the contexts in blocks whose M fits its part of the memory."""
    numbers = BODY_FRACTION * kernel.problem.budget / kernel.head.dtype.itemsize
    step = max(1, int(numbers**0.5 / kernel.problem.feature_size))
    count = kernel.problem.observed.count
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _cosines(features_OD: Array) -> Array:
    unit_OD = features_OD / jnp.linalg.norm(features_OD, axis=1, keepdims=True)
    return einsum("od,ud->ou", unit_OD, unit_OD)


def _traces(plan: KernelPlan, progress: Progress) -> tuple[dict[str, Any], float]:
    """Return traces of parts and groups with shares, and ‖G‖², made block by block."""
    kernel, groups, done = plan.kernel, tuple(plan.kernel.problem.groups), 0
    count = kernel.problem.observed.count
    traces = np.zeros((1 + len(groups), count, count), kernel.head.dtype)
    square = 0.0
    for a, b in plan.pairs:
        block = plan.between(a, b)
        progress(done, "body")
        traces[0, a, b], part = jax.device_get(_body_sums(block))
        square += float(part) * (1 if a == b else 2)
        for i, group in enumerate(groups, start=1):
            progress(done + i, group)
            traces[i, a, b] = jax.device_get(block.trace(group))
        traces[:, b, a] = np.swapaxes(traces[:, a, b], 1, 2)
        done += 1 + len(groups)
    found = {"head": np.asarray(kernel.trace("head")), "body": traces[0]}
    if kernel.problem.tied:
        found["cross"] = np.asarray(kernel.trace("cross"))
    full = sum(found.values())
    sums = {f"trace_{part}": values for part, values in found.items()} | {"trace_full": full}
    sums |= {f"share_{part}": _shares(values, full) for part, values in found.items()}
    if groups:
        sums |= {"layers": np.array(groups), "trace_layers": traces[1:]}
    return sums, square


def _shares(part_OO: np.ndarray, full_OO: np.ndarray) -> np.ndarray:
    """Return the shares of a part in the summed traces, on and off the diagonal."""
    diagonal = [np.trace(values) for values in (part_OO, full_OO)]
    rest = [np.sum(values) - np.trace(values) for values in (part_OO, full_OO)]
    alone = len(part_OO) == 1
    return np.array([diagonal[0] / diagonal[1], np.nan if alone else rest[0] / rest[1]])


def _body_sums(kernel: ntk.Kernel) -> tuple[Array, Array]:
    """Return tr G(o, u) `[o, u]` and ‖G‖² of a block; the latter NaN under a soft-cap."""
    if kernel.problem.capped:  # slopes vary over the vocabulary
        return kernel.trace("body"), jnp.nan
    factored = ntk.factored(kernel, "body")
    return _trace_and_square(factored.weight, factored.body)


@jax.jit
def _trace_and_square(weight_VD: Array, body_OUDD: Array) -> tuple[Array, Array]:
    """Return tr W M Wᵀ = tr M C `[O, U]` and ‖W M Wᵀ‖² = ⟨C M, M C⟩ with C = WᵀW."""
    gram_DD = einsum("vd,ve->de", weight_VD, weight_VD)
    right_OUDD = einsum("oude,ef->oudf", body_OUDD, gram_DD)
    left_OUDD = einsum("de,ouef->oudf", gram_DD, body_OUDD)
    return einsum("oudd->ou", right_OUDD), jnp.sum(left_OUDD * right_OUDD)


def _norms(kernel: ntk.Kernel, found: Mapping[str, Any], body_square: float) -> dict[str, Any]:
    """Return ‖K_P‖_F: by ‖R + G‖² = ‖R‖² + 2 Σ head tr G + ‖G‖², or of what can be written out."""
    squares: dict[str, Any] = {}
    if not kernel.problem.capped:
        head_square = kernel.problem.vocab_size * np.sum(np.asarray(found["head"], float) ** 2)
        squares = {"head": head_square, "body": body_square}
        if not kernel.problem.tied:
            mixed = np.sum(np.asarray(found["head"] * found["trace_body"], float))
            squares["full"] = head_square + 2 * mixed + body_square
    numbers = (kernel.problem.observed.count * kernel.problem.vocab_size) ** 2
    if numbers * kernel.head.dtype.itemsize <= kernel.problem.budget:
        parts = (
            ("head", "body", "cross", "full") if kernel.problem.tied else ("head", "body", "full")
        )
        for part in parts:
            if part not in squares:
                squares[part] = ntk.frobenius(kernel, part) ** 2
    return {f"frobenius_{part}": np.sqrt(square) for part, square in squares.items()}


def _largest(kernel: ntk.Kernel, count: int, part: str) -> np.ndarray:
    # errors of eigenvalues are quadratic in those of the vectors, which the tolerance is about
    tolerance = float(jnp.finfo(kernel.head.dtype).eps) ** 0.5
    return np.asarray(ntk.eigenpairs(kernel, count, part, tolerance)[0])
