"""A kernel as one (O·V) × (O·V) matrix that is never formed: factors, norms, alignment, eigenpairs.

Where a part is H ⊗ I + W M Wᵀ (plain heads, R + G) all follow from H, M and W: outside the range
of W the matrix is H ⊗ I, so each eigenvalue of H has multiplicity V − D there; inside, it is a
problem of O·D numbers. The cross terms of a tied head have this form as well, with unit vectors
of the K tokens that the contexts read beside W's columns (see tied.py).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse.linalg import LinearOperator, eigsh

from ntkrl.ntk.factors import Factored, can_factor, factor_weights, factored
from ntkrl.ntk.forms import inner_products
from ntkrl.ntk.kernel import Kernel
from ntkrl.numerics import einsum
from ntkrl.types import Array

EigenPairs = tuple[np.ndarray, np.ndarray]
"""Values `[n]`, largest first, and vectors `[size, n]`."""

MISSED = 1e-3
"""Eigenvalues above the last one by more than this, relative, are searched for again."""


def frobenius(kernel: Kernel | Factored, part: str = "full") -> Array:
    """Return ‖K‖_F = (Σ over contexts and vocabulary of K²)^½, a scalar.

    Args:
      kernel: a kernel, or the factors of a part (without a cap), which need no network.
      part: a part of the kernel.
    """
    if isinstance(kernel, Factored):
        return jnp.sqrt(_inner_of_factors(kernel, kernel))
    return jnp.sqrt(_inner(kernel, kernel, part, False))


def alignment(first: Kernel, second: Kernel, part: str = "full") -> Array:
    """Return ⟨K₁, K₂⟩_F / (‖K₁‖_F ‖K₂‖_F), a scalar in [−1, 1].

    Args:
      first, second: kernels of equal contexts and vocabulary (the same network at two moments, or
        two networks).
      part: a part of both.

    Raises:
      ValueError: different numbers of contexts or vocabularies.

    Source: Cristianini et al. 2001 (kernel alignment).
    """
    return _cosine(first, second, part, False)


def cka(first: Kernel, second: Kernel, part: str = "full") -> Array:
    """Return the alignment after centring both kernels over contexts, a scalar in [−1, 1].

    K(o, u) loses its means over o and over u: (H ⊗ I_V) K (H ⊗ I_V) with H = I − 11ᵀ/O.

    Args:
      first, second, part: as in `alignment`; at least two contexts on either side.

    Raises:
      ValueError: different numbers of contexts or vocabularies, or a single context.

    Source: Cortes et al. 2012; Kornblith et al. 1905.00414 (linear CKA).
    """
    if min(first.problem.observed.count, first.problem.updated.count) < 2:
        raise ValueError("cka needs at least two contexts on either side; use alignment.")
    return _cosine(first, second, part, True)


def _cosine(first: Kernel, second: Kernel, part: str, centred: bool) -> Array:
    product = _inner(first, second, part, centred)
    squares = [_inner(kernel, kernel, part, centred) for kernel in (first, second)]
    return product / jnp.sqrt(squares[0] * squares[1])


def _inner(first: Kernel, second: Kernel, part: str, centred: bool) -> Array:
    """Return ⟨K₁, K₂⟩_F; from D×D factors, ⟨G₁, G₂⟩ = ⟨M₁, C M₂ Cᵀ⟩ with C = W₁ᵀW₂, or by rows."""
    shapes = [
        (k.problem.observed.count, k.problem.updated.count, k.problem.vocab_size)
        for k in (first, second)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"kernels differ in contexts or vocabulary: (O, U, V) is {shapes[0]} and {shapes[1]}."
        )
    if not (_is_factored(first, part) and _is_factored(second, part)):
        return _inner_of_rows(first, second, part, centred)
    factors = _factors(first, part, centred)
    others = factors if second is first else _factors(second, part, centred)
    return _inner_of_factors(factors, others)


@jax.jit
def _inner_of_factors(first: Factored, second: Factored) -> Array:
    """Return ⟨K₁, K₂⟩_F of factors without a cap, a pair of contexts at a time."""
    weight_1, weight_2 = first.weight, second.weight
    across_CE = einsum("vc,ve->ce", weight_1, weight_2)
    gram_1, gram_2 = (einsum("vd,ve->de", w, w) for w in (weight_1, weight_2))

    def pair(arrays: tuple[Array, Array, Array, Array]) -> Array:
        head_1, body_1, head_2, body_2 = arrays
        moved_CC = einsum("ce,ef,df->cd", across_CE, body_2, across_CE)
        mixed = head_1 * jnp.sum(body_2 * gram_2) + head_2 * jnp.sum(body_1 * gram_1)
        return jnp.sum(body_1 * moved_CC) + mixed + weight_1.shape[0] * head_1 * head_2

    pairs = first.head.size
    stacked = [
        array.reshape(pairs, *array.shape[2:])
        for array in (first.head, first.body, second.head, second.body)
    ]
    return jnp.sum(jax.lax.map(pair, tuple(stacked)))


def _is_factored(kernel: Kernel, part: str) -> bool:
    """Test whether the part is a multiple of I plus Z N Zᵀ."""
    return not kernel.problem.capped and can_factor(kernel, part)


def _factors(kernel: Kernel, part: str, centred: bool) -> Factored:
    factors = factored(kernel, part)
    if centred:
        factors = factors._replace(head=_centre(factors.head), body=_centre(factors.body))
    return factors


def _centre(values: Array) -> Array:
    values = values - jnp.mean(values, axis=0, keepdims=True)
    return values - jnp.mean(values, axis=1, keepdims=True)


def _inner_of_rows(first: Kernel, second: Kernel, part: str, centred: bool) -> Array:
    """Return ⟨K₁, K₂⟩_F from dense rows, as many at a time as memory allows."""
    problem, vocab = first.problem, first.problem.vocab_size
    row_bytes = 2 * 8 * problem.observed.count * problem.updated.count * vocab
    budget = min(problem.budget, second.problem.budget)
    step = max(1, min(vocab, budget // row_bytes))
    total = jnp.zeros(())
    for start in range(0, vocab, step):
        rows = range(start, min(start + step, vocab))
        blocks = [kernel.dense(part, rows=rows) for kernel in (first, second)]
        if centred:
            blocks = [_centre(block) for block in blocks]
        total += jnp.sum(blocks[0] * blocks[1])
    return total


def eigenpairs(
    kernel: Kernel | Factored,
    count: int = 8,
    part: str = "full",
    tolerance: float = 0.0,
    seed: int = 0,
) -> tuple[Array, Array]:
    """Return the largest eigenvalues and their eigenvectors, by Lanczos on `apply`.

    Each iteration is one VJP and one JVP, or with factors a product with M. Implicitly restarted
    Lanczos is scipy's (ARPACK); vectors of O·C numbers (see Factored; O·V for capped or
    preconditioned heads) pass through the host. Computed
    pairs are deflated and the search is repeated until nothing above the last is left, so repeated
    eigenvalues are returned with their multiplicity.

    >>> kernel = ntk.kernel(policy, params, ntk.last_positions(tokens))
    >>> values, vectors = ntk.eigenpairs(kernel, count=3)
    >>> bool(values[0] >= values[1]), vectors.shape[:2]
    (True, (3, 2))

    Args:
      kernel: a symmetric kernel (without `updated`), or the factors of a part of one (without a
        cap), which need no network.
      count: number of eigenpairs, in [1, O·V).
      part: a symmetric part: not "output_input" or "input_output".
      tolerance: relative accuracy of the eigenvalues; 0 for machine precision.
      seed: of the start vector.

    Returns:
      Values `[count]`, largest first, and vectors `[count, O, V]` of norm 1.

    Raises:
      ValueError: a kernel between different contexts, a part that is not symmetric, or `count` out
        of range.
    """
    if isinstance(kernel, Factored):
        return _pairs_of_factors(kernel, count, tolerance, np.random.default_rng(seed))
    problem = kernel.problem
    if not problem.symmetric:
        raise ValueError("eigenpairs need ntk.kernel(model, params, observed) without updated.")
    if part in ("output_input", "input_output"):
        raise ValueError(f"part {part!r} is not symmetric; use 'cross', their sum.")
    shape = (problem.observed.count, problem.vocab_size)
    size = shape[0] * shape[1]
    _check_count(count, *shape)
    rng = np.random.default_rng(seed)
    if _is_factored(kernel, part):
        values, vectors = _factored_pairs(kernel, part, count, tolerance, rng)
    else:
        product = lambda flat: _apply(kernel, flat.reshape(shape), part).ravel()  # noqa: E731
        values, flat = _largest(product, size, count, tolerance, rng, problem.dtype)
        vectors = flat.T.reshape(count, *shape)
    return jnp.asarray(values), jnp.asarray(vectors)


def _apply(kernel: Kernel, logits_OV: np.ndarray, part: str) -> np.ndarray:
    return np.asarray(kernel.apply(jnp.asarray(logits_OV), part))


def _check_count(count: int, contexts: int, vocab: int) -> None:
    size = contexts * vocab
    if not 1 <= count < size:
        raise ValueError(f"count must be in [1, {size}) for {contexts} contexts, not {count}.")


def _factored_pairs(
    kernel: Kernel, part: str, count: int, tolerance: float, rng: np.random.Generator
) -> EigenPairs:
    """Return the largest eigenpairs of H ⊗ I + Z N Zᵀ by `apply`, in the range of Z."""
    roles, operands = kernel.problem.operands(part)
    head_OO = kernel.problem.network.head.scale**2 * inner_products(operands, roles)
    weight_VC = np.asarray(factor_weights(kernel, roles)[1])
    crossed = roles.body or roles.output_input or roles.input_output
    basis_VC = _orthonormal(weight_VC if crossed else weight_VC[:, :0])[0]
    shape = (kernel.problem.observed.count, basis_VC.shape[1])

    def reduced(flat: np.ndarray) -> np.ndarray:
        logits_OV = flat.reshape(shape) @ basis_VC.T
        return (_apply(kernel, logits_OV, part) @ basis_VC).ravel()

    return _inside_and_outside(reduced, np.asarray(head_OO), basis_VC, count, tolerance, rng)


def _pairs_of_factors(
    factors: Factored, count: int, tolerance: float, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Return the largest eigenpairs of factors.

    Raises:
      ValueError: factors with a cap, or `count` out of range.
    """
    if factors.left is not None:
        raise ValueError("eigenpairs of a capped head need the kernel, not its factors.")
    head_OO, weight_VC = np.asarray(factors.head), np.asarray(factors.weight)
    contexts, columns = len(head_OO), weight_VC.shape[1]
    _check_count(count, contexts, len(weight_VC))
    basis_VC, mixing_CC = _orthonormal(weight_VC)
    matrix = jnp.transpose(factors.body, (0, 2, 1, 3)).reshape(contexts * columns, -1)
    inner = np.asarray(matrix)

    def reduced(flat: np.ndarray) -> np.ndarray:
        x_OC = flat.reshape(contexts, -1)
        product_OC = (inner @ (x_OC @ mixing_CC).ravel()).reshape(contexts, columns)
        return (head_OO @ x_OC + product_OC @ mixing_CC.T).ravel()

    values, vectors = _inside_and_outside(reduced, head_OO, basis_VC, count, tolerance, rng)
    return jnp.asarray(values), jnp.asarray(vectors)


def _orthonormal(weight_VC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return an orthonormal basis Q `[V, r]` of the range of Z, and QᵀZ `[r, C]`.

    From ZᵀZ in float64, twice, at a tenth of the time of a QR decomposition.
    """
    wide_VC = weight_VC.astype(np.float64)
    basis_VC = wide_VC
    for _ in range(2):  # a single pass is not orthogonal to rounding
        values, axes = np.linalg.eigh(basis_VC.T @ basis_VC)
        spanned = values > len(values) * np.finfo(float).eps * values.max(initial=0.0)
        basis_VC = basis_VC @ (axes[:, spanned] / np.sqrt(values[spanned]))
    mixing_CC = basis_VC.T @ wide_VC
    return basis_VC.astype(weight_VC.dtype), mixing_CC.astype(weight_VC.dtype)


def _inside_and_outside(
    reduced: Callable[[np.ndarray], np.ndarray],
    head_OO: np.ndarray,
    basis_VC: np.ndarray,
    count: int,
    tolerance: float,
    rng: np.random.Generator,
) -> EigenPairs:
    """Return the largest eigenpairs inside the span of a basis and outside, where K is H ⊗ I."""
    contexts, width = len(head_OO), basis_VC.shape[1]
    inside, dtype = min(count, contexts * width), basis_VC.dtype
    values, flat = _largest(reduced, contexts * width, inside, tolerance, rng, dtype)
    vectors = flat.T.reshape(inside, contexts, width) @ basis_VC.T
    more = _outside(head_OO, basis_VC, count, rng)
    values, vectors = (np.concatenate(both) for both in zip((values, vectors), more, strict=True))
    order = np.argsort(-values, kind="stable")[:count]
    return values[order], vectors[order]


def _outside(
    head_OO: np.ndarray, basis_VD: np.ndarray, count: int, rng: np.random.Generator
) -> EigenPairs:
    """Return the eigenpairs of H ⊗ I outside the basis, `[n]` and `[n, O, V]`, n ≤ count."""
    values_O, vectors_OO = np.linalg.eigh(head_OO)
    vocab, width = basis_VD.shape
    copies = min(count, vocab - width)
    if not copies:
        return np.zeros(0, values_O.dtype), np.zeros((0, len(values_O), vocab), values_O.dtype)
    free_VC = rng.normal(size=(vocab, copies)).astype(basis_VD.dtype)
    for _ in range(2):  # a single pass is not orthogonal to rounding
        free_VC = np.linalg.qr(free_VC - basis_VD @ (basis_VD.T @ free_VC))[0]
    places = np.arange(min(count, copies * len(values_O)))
    chosen = len(values_O) - 1 - places // copies
    vectors = vectors_OO.T[chosen][:, :, None] * free_VC.T[places % copies][:, None, :]
    return values_O[chosen], vectors


def _largest(
    product: Callable[[np.ndarray], np.ndarray],
    size: int,
    count: int,
    tolerance: float,
    rng: np.random.Generator,
    dtype: np.dtype,
) -> EigenPairs:
    """Return the largest eigenpairs of a symmetric operator."""
    if count >= size - 1:  # more than Lanczos can
        columns = [product(unit) for unit in np.eye(size, dtype=dtype)]
        matrix = np.stack(columns, axis=1) if columns else np.zeros((0, 0), dtype)
        values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
        return values[::-1][:count], vectors[:, ::-1][:, :count]

    def search(number: int, known: EigenPairs, accuracy: float) -> EigenPairs:
        """Return eigenpairs of the operator with the known ones deflated."""
        values, vectors = known
        matrix = LinearOperator(
            (size, size),
            matvec=lambda x: product(x) - vectors @ (values * (vectors.T @ x.ravel())),
            dtype=dtype,
        )
        start = rng.normal(size=size).astype(dtype)
        largest, axes = eigsh(matrix, k=number, which="LA", tol=accuracy, v0=start)
        return largest[::-1], axes[:, ::-1]

    values, vectors = search(count, (np.zeros(0, dtype), np.zeros((size, 0), dtype)), tolerance)
    while True:
        # Lanczos from one start vector returns one copy of a repeated eigenvalue
        missed = search(1, (values, vectors), MISSED)
        if missed[0][0] <= values[-1] + MISSED * abs(values[-1]):
            return values, vectors
        missed = search(1, (values, vectors), tolerance)
        order = np.argsort(-np.append(values, missed[0]), kind="stable")[:count]
        values = np.append(values, missed[0])[order]
        vectors = np.concatenate([vectors, missed[1]], axis=1)[:, order]
