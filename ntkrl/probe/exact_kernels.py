"""Measures of the kernel of some contexts, and of its drift in training.

With O contexts, the parts P = head, body and, where the head is tied, cross (see `ntk.PARTS`):

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
eigenvalues_head are the n largest of the head kernel. Drift of the body kernel is measured on its
traces over the vocabulary: rotations within V×V blocks do not show (`ntk.alignment` and `ntk.cka`
show them).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import ntk
from ntkrl.numerics import einsum
from ntkrl.scoring import head_of
from ntkrl.softmax import token_statistics
from ntkrl.types import Array, Params, Policy

Progress = Callable[[int, str], None]
"""Called with the number of steps done and the name of the next."""

BODY_FRACTION = 0.25
"""Fraction of the memory for a block of M `[O, U, D, D]`, of which about three copies exist."""


@dataclasses.dataclass(frozen=True, eq=False)
class KernelPlan:
    """A kernel on contexts, split in blocks of contexts whose M fits the memory.

    kernel: of all contexts. between: the kernel of two blocks. pairs: of blocks, o ≥ u.
    """

    kernel: ntk.Kernel
    between: Callable[[slice, slice], ntk.Kernel]
    pairs: tuple[tuple[slice, slice], ...]

    @property
    def body_kernels(self) -> int:
        """Number of body kernels of pairs of blocks: one, and one for each group."""
        return len(self.pairs) * (1 + len(self.kernel.problem.groups))

    @property
    def steps(self) -> int:
        """Number of steps of `kernel_measures`."""
        return self.body_kernels + 3

    @property
    def estimate(self) -> ntk.Estimate:
        """Cost of the body kernel of the first pair of blocks."""
        return self.between(*self.pairs[0]).estimate()


def plan_kernel(
    model: Policy | ntk.Network,
    params: Params,
    contexts: ntk.Contexts,
    layers: bool = False,
    memory_gib: float = 8.0,
) -> KernelPlan:
    """Plan the computation of a kernel.

    Args:
      model, params: as in `ntk.kernel`.
      contexts: O contexts.
      layers: with a group per layer, each at the cost of another body kernel.
      memory_gib: what a call may use beyond the params (GiB).

    Raises:
      ValueError: what `ntk.kernel` raises.
    """
    groups = ntk.by_layer(model, params) if layers else ()
    make = functools.partial(ntk.kernel, model, params, groups=groups, memory_gib=memory_gib)
    kernel = make(contexts)
    contexts = kernel.problem.observed  # with rows and mask filled in

    def between(a: slice, b: slice) -> ntk.Kernel:
        return make(select(contexts, a), None if a == b else select(contexts, b))

    blocks = _blocks(kernel)
    pairs = tuple((a, b) for i, a in enumerate(blocks) for b in blocks[: i + 1])
    return KernelPlan(kernel, between, pairs)


def kernel_measures(
    plan: KernelPlan, eigenpairs: int = 8, progress: Progress = lambda done, doing: None
) -> dict[str, np.ndarray]:
    """Compute the arrays that this module lists.

    M is computed once per pair of blocks, for traces and norm of the body.

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
    arrays: dict[str, Any] = {
        "head": kernel.head,
        "cosines": _cosines(kernel.problem.head_inputs[0].features),
    }
    traces, body_square = _traces(plan, progress)
    arrays |= traces
    progress(plan.body_kernels, "norms")
    arrays |= _norms(kernel, arrays, body_square)
    for i, part in enumerate(("body", "full"), start=1):
        progress(plan.body_kernels + i, f"eigenvalues of {part}")
        arrays[f"eigenvalues_{part}"] = _largest(kernel, eigenpairs, part)
    if not kernel.problem.capped:
        arrays["eigenvalues_head"] = np.linalg.eigvalsh(np.asarray(kernel.head))[::-1]
    else:
        arrays["eigenvalues_head"] = _largest(kernel, eigenpairs, "head")
    return {name: np.asarray(value) for name, value in arrays.items()}


def kernel_traces(plan: KernelPlan) -> dict[str, np.ndarray]:
    """Compute `head`, traces and shares of `kernel_measures` alone; on the host."""
    traces, _ = _traces(plan, lambda done, doing: None)
    return {name: np.asarray(value) for name, value in {"head": plan.kernel.head, **traces}.items()}


def batch_alignment(
    policy: Policy,
    params: Params,
    contexts: ntk.Contexts,
    targets: Array,
    advantages: np.ndarray,
    memory_gib: float = 8.0,
) -> float:
    """Return `advantage_alignment` of the full kernel at some tokens of a batch.

    Args:
      policy, params: of the network.
      contexts: O contexts.
      targets, advantages: `[O]` tokens that follow, and their advantages, not all 0.
      memory_gib: what a kernel may use beyond the params (GiB).
    """
    gram = ntk.score_gram(policy, params, contexts, targets, memory_gib=memory_gib)
    head, diagonal = head_of(policy, params), []
    for number in range(contexts.count):  # pairs o = u alone
        context = select(contexts, slice(number, number + 1))
        kernel = ntk.kernel(policy, params, context, memory_gib=memory_gib)
        target = jnp.asarray(targets[number : number + 1])
        statistics = token_statistics(head, kernel.problem.head_inputs[0].features, target)
        square = 1 - 2 * jnp.exp(statistics.log_probs[0]) + statistics.sum_squares[0]
        diagonal.append((float(kernel.trace()[0, 0]), float(square)))
    traces, squares = np.asarray(diagonal).T
    return advantage_alignment(np.asarray(gram), np.diag(traces), advantages, squares)


def select(contexts: ntk.Contexts, indices: slice | np.ndarray) -> ntk.Contexts:
    """Return some contexts of the same sequences."""
    positions = contexts.positions[indices]
    rows = None if contexts.rows is None else contexts.rows[indices]
    return dataclasses.replace(contexts, positions=positions, rows=rows)


def _blocks(kernel: ntk.Kernel) -> list[slice]:
    """Split the contexts in blocks whose M fits its fraction of the memory."""
    numbers = BODY_FRACTION * kernel.problem.budget / kernel.head.dtype.itemsize
    step = max(1, int(numbers**0.5 / kernel.problem.feature_size))
    count = kernel.problem.observed.count
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _cosines(features_OD: Array) -> Array:
    unit_OD = features_OD / jnp.linalg.norm(features_OD, axis=1, keepdims=True)
    return einsum("od,ud->ou", unit_OD, unit_OD)


def _traces(plan: KernelPlan, progress: Progress) -> tuple[dict[str, Any], float]:
    """Return traces of parts and groups with shares, and ‖G‖², computed block by block."""
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
    parts = {"head": np.asarray(kernel.trace("head")), "body": traces[0]}
    if kernel.problem.tied:
        parts["cross"] = np.asarray(kernel.trace("cross"))
    full = sum(parts.values())
    arrays = {f"trace_{part}": values for part, values in parts.items()} | {"trace_full": full}
    arrays |= {f"share_{part}": _shares(values, full) for part, values in parts.items()}
    if groups:
        arrays |= {"layers": np.array(groups), "trace_layers": traces[1:]}
    return arrays, square


def _shares(part_OO: np.ndarray, full_OO: np.ndarray) -> np.ndarray:
    """Return the shares of a part in the summed traces, on and off the diagonal."""
    diagonal = [np.trace(values) for values in (part_OO, full_OO)]
    others = [np.sum(values) - np.trace(values) for values in (part_OO, full_OO)]
    single = len(part_OO) == 1
    return np.array([diagonal[0] / diagonal[1], np.nan if single else others[0] / others[1]])


def _body_sums(kernel: ntk.Kernel) -> tuple[Array, Array | float]:
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


def _norms(kernel: ntk.Kernel, arrays: Mapping[str, Any], body_square: float) -> dict[str, Any]:
    """Return ‖K_P‖_F: by ‖R + G‖² = ‖R‖² + 2 Σ head tr G + ‖G‖², or dense where that fits."""
    squares: dict[str, Any] = {}
    if not kernel.problem.capped:
        head_square = kernel.problem.vocab_size * np.sum(np.asarray(arrays["head"], float) ** 2)
        squares = {"head": head_square, "body": body_square}
        if not kernel.problem.tied:
            mixed = np.sum(np.asarray(arrays["head"] * arrays["trace_body"], float))
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
    # the tolerance is of the vectors; errors of eigenvalues are quadratic in theirs
    tolerance = float(jnp.finfo(kernel.head.dtype).eps) ** 0.5
    return np.asarray(ntk.eigenpairs(kernel, count, part, tolerance)[0])


def laziness(now: np.ndarray, start: np.ndarray) -> float:
    """Return ‖K_t − K_0‖_F/‖K_0‖_F of `[O, O]` kernels, ≥ 0: how far training left the lazy regime.

    Source: Chizat et al. 1812.07956.
    """
    now, start = np.asarray(now, float), np.asarray(start, float)
    return float(np.linalg.norm(now - start) / np.linalg.norm(start))


def centred_alignment(now: np.ndarray, start: np.ndarray) -> float:
    """Return ⟨H K_t H, H K_0 H⟩/(‖H K_t H‖ ‖H K_0 H‖), H = I − 11ᵀ/O: CKA of `[O, O]` kernels.

    In [0, 1] for positive semi-definite kernels; blind to scale. NaN where centring leaves nothing,
    as with a single context.

    Source: Kornblith et al. 1905.00414.
    """
    first, second = (
        k - k.mean(0, keepdims=True) - k.mean(1, keepdims=True) + k.mean()
        for k in (np.asarray(now, float), np.asarray(start, float))
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.sum(first * second) / (np.linalg.norm(first) * np.linalg.norm(second)))


def kernel_drift(
    now: Mapping[str, np.ndarray], start: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Compare two results of `kernel_measures` or `kernel_traces` on the same contexts.

    Returns:
      `body_to_head` Σ_o tr G(o, o)/Σ_o tr R(o, o) now (≥ 0), and for P = head, body
      `laziness_P` and `cka_P`, of the body on traces (see this module).

    Source: body_to_head of Tomihari 2601.04670: it grows with ‖W‖².
    """
    ratio = np.trace(now["trace_body"]) / np.trace(now["trace_head"])
    measures = {"body_to_head": float(ratio)}
    for part, name in (("head", "head"), ("body", "trace_body")):
        measures[f"laziness_{part}"] = laziness(now[name], start[name])
        measures[f"cka_{part}"] = centred_alignment(now[name], start[name])
    return measures


def layer_shares(names: np.ndarray, traces: np.ndarray) -> dict[str, float]:
    """Return the share of each group of parameters in Σ_o tr K(o, o); shares add up to 1.

    Args:
      names, traces: `[G]` and `[G, O, O]`, `layers` and `trace_layers` of `kernel_measures`.
    """
    sums_G = np.einsum("goo->g", np.asarray(traces, float))
    return dict(zip(map(str, names), (sums_G / sums_G.sum()).tolist(), strict=True))


def advantage_alignment(
    gram: np.ndarray, traces: np.ndarray, advantages: np.ndarray, score_squares: np.ndarray
) -> float:
    """Return aᵀ K a/(tr K ‖a‖²) with a the stacked A_o g_o `[O·V]`, g = e_y − π.

    At most 1; 1/(O·V) for a multiple of the identity. Large where the kernel's leading directions
    are those of the policy gradient.

    Args:
      gram: `[O, O]` of `ntk.score_gram`, g_oᵀ K(o, u) g_u, without weights.
      traces: `[O, O]` of `ntk.Kernel.trace` of the same part.
      advantages: A `[O]`.
      score_squares: ‖g_o‖² = 1 − 2π(y) + Σ π² `[O]`.

    Source: ours, after Cristianini et al. 2001.
    """
    a_O = np.asarray(advantages, float)
    form = a_O @ np.asarray(gram, float) @ a_O
    return float(form / (np.trace(traces) * np.sum(a_O**2 * np.asarray(score_squares, float))))
