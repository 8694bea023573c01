"""Top eigenpairs of a kernel as one (O·V) × (O·V) matrix that never exists.

Where the kernel is H ⊗ I + W M Wᵀ (plain heads, R + G) it splits exactly: outside the range of W
it is H ⊗ I, so each eigenvalue of H stands V − D times; within, it is a problem of O·D numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from scipy.sparse.linalg import LinearOperator, eigsh

from ntkrl.ntk.heads import inner_products
from ntkrl.ntk.kernel import Kernel
from ntkrl.ntk.spectrum import factors
from ntkrl.numerics import at_least_float32
from ntkrl.types import Array

Pairs = tuple[np.ndarray, np.ndarray]
"""Values `[n]`, largest first, and vectors `[size, n]`."""

ABOVE = 1e-3
"""How far above the last eigenvalue, relative, one that was missed must be to be looked for."""


def eigenpairs(
    kernel: Kernel, count: int = 8, part: str = "full", tolerance: float = 0.0, seed: int = 0
) -> tuple[Array, Array]:
    """Return the largest eigenvalues and their eigenvectors, by Lanczos on `apply`.

    Each iteration is one VJP and one JVP. Implicitly restarted Lanczos is scipy's (ARPACK); vectors
    of O·D numbers (O·V for capped, tied or preconditioned heads) pass through the host. Found pairs
    are taken out and the search is repeated until nothing above the last is left, so repeated
    eigenvalues stand as often as they occur.

    >>> kernel = ntk.kernel(policy, params, ntk.last_positions(tokens))
    >>> values, vectors = ntk.eigenpairs(kernel, count=3)
    >>> bool(values[0] >= values[1]), vectors.shape[:2]
    (True, (3, 2))

    Args:
      kernel: a symmetric kernel (`updated` left out).
      count: eigenpairs wanted, in [1, O·V).
      part: a symmetric part: not "output_input" or "input_output".
      tolerance: relative accuracy of the eigenvalues; 0 for machine precision.
      seed: of the start vector.

    Returns:
      Values `[count]`, largest first, and vectors `[count, O, V]` of norm 1.

    Raises:
      ValueError: a kernel between different contexts, a part that is not symmetric, or `count` out
        of range.
    """
    if not kernel.symmetric:
        raise ValueError("eigenpairs need ntk.kernel(model, params, observed) without updated.")
    if part in ("output_input", "input_output"):
        raise ValueError(f"part {part!r} is not symmetric; ask for 'cross', their sum.")
    shape = (kernel.observed.count, kernel.vocab_size)
    size = shape[0] * shape[1]
    if not 1 <= count < size:
        raise ValueError(f"count must be in [1, {size}) for {shape[0]} contexts, not {count}.")
    dtype = np.dtype(kernel.readings[0].features.dtype)
    rng = np.random.default_rng(seed)

    def apply(logits_OV: np.ndarray) -> np.ndarray:
        return np.asarray(kernel.apply(jnp.asarray(logits_OV, dtype), part))

    if not factors(kernel, part):
        whole = lambda flat: apply(flat.reshape(shape)).ravel()  # noqa: E731
        values, vectors = _largest(whole, size, count, tolerance, rng, dtype)
        return jnp.asarray(values), jnp.asarray(vectors.T.reshape(count, *shape))
    basis_VD = _range_of_head(kernel, part)
    width = basis_VD.shape[1]
    inside = min(count, shape[0] * width)

    def reduced(flat: np.ndarray) -> np.ndarray:
        return (apply(flat.reshape(shape[0], width) @ basis_VD.T) @ basis_VD).ravel()

    values, flat = _largest(reduced, shape[0] * width, inside, tolerance, rng, dtype)
    vectors = flat.T.reshape(inside, shape[0], width) @ basis_VD.T
    more = _outside(kernel, part, basis_VD, count, rng)
    values, vectors = (np.concatenate(both) for both in zip((values, vectors), more, strict=True))
    order = np.argsort(-values, kind="stable")[:count]
    return jnp.asarray(values[order]), jnp.asarray(vectors[order])


def _range_of_head(kernel: Kernel, part: str) -> np.ndarray:
    """Return an orthonormal basis `[V, ≤ D]` of what holds W's range; empty without body."""
    weight_VD = np.asarray(at_least_float32(kernel.network.weight(kernel.params)))
    return np.linalg.qr(weight_VD if kernel.roles(part).body else weight_VD[:, :0])[0]


def _outside(
    kernel: Kernel, part: str, basis_VD: np.ndarray, count: int, rng: np.random.Generator
) -> Pairs:
    """Return the eigenpairs of H ⊗ I outside the basis, `[n]` and `[n, O, V]`, n ≤ count."""
    left, right = kernel.readings
    weights, roles = kernel.operands(part).head, kernel.roles(part)
    inner = inner_products(left, right, weights, roles, kernel.has_bias)
    values_O, vectors_OO = np.linalg.eigh(np.asarray(kernel.network.head.scale**2 * inner))
    vocab, width = basis_VD.shape
    copies = min(count, vocab - width)
    if not copies:
        return np.zeros(0, values_O.dtype), np.zeros((0, len(values_O), vocab), values_O.dtype)
    free_VC = rng.normal(size=(vocab, copies)).astype(basis_VD.dtype)
    for _ in range(2):  # once is not orthogonal to rounding
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
) -> Pairs:
    """Return the largest eigenpairs of a symmetric operator."""
    if count >= size - 1:  # more than Lanczos can
        columns = [product(unit) for unit in np.eye(size, dtype=dtype)]
        matrix = np.stack(columns, axis=1) if columns else np.zeros((0, 0), dtype)
        values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
        return values[::-1][:count], vectors[:, ::-1][:, :count]

    def search(wanted: int, known: Pairs, accuracy: float) -> Pairs:
        """Return eigenpairs of the operator without the known ones."""
        values, vectors = known
        matrix = LinearOperator(
            (size, size),
            matvec=lambda x: product(x) - vectors @ (values * (vectors.T @ x.ravel())),
            dtype=dtype,
        )
        start = rng.normal(size=size).astype(dtype)
        found, axes = eigsh(matrix, k=wanted, which="LA", tol=accuracy, v0=start)
        return found[::-1], axes[:, ::-1]

    values, vectors = search(count, (np.zeros(0, dtype), np.zeros((size, 0), dtype)), tolerance)
    while True:
        # one start vector meets one copy of a repeated eigenvalue
        missed = search(1, (values, vectors), ABOVE)
        if missed[0][0] <= values[-1] + ABOVE * abs(values[-1]):
            return values, vectors
        missed = search(1, (values, vectors), tolerance)
        order = np.argsort(-np.append(values, missed[0]), kind="stable")[:count]
        values = np.append(values, missed[0])[order]
        vectors = np.concatenate([vectors, missed[1]], axis=1)[:, order]
