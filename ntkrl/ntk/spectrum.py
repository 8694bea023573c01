"""A kernel as one (O·V) × (O·V) matrix: Frobenius norm, alignment, CKA."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from ntkrl.ntk.heads import inner_products, is_scalar
from ntkrl.ntk.kernel import Kernel
from ntkrl.numerics import at_least_float32, einsum
from ntkrl.types import Array


def frobenius(kernel: Kernel, part: str = "full") -> Array:
    """Return ‖K‖_F = (Σ over contexts and vocabulary of K²)^½, a scalar."""
    return jnp.sqrt(inner(kernel, kernel, part))


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
    if min(first.observed.count, first.updated.count) < 2:
        raise ValueError("cka needs at least two contexts on either side; take alignment.")
    return _cosine(first, second, part, True)


def inner(first: Kernel, second: Kernel, part: str = "full", centred: bool = False) -> Array:
    """Return ⟨K₁, K₂⟩_F, a scalar.

    Plain heads need the D×D factors alone:
    ⟨G₁, G₂⟩ = ⟨M₁, C M₂ Cᵀ⟩ with C = W₁ᵀW₂. Capped, tied and preconditioned ones go through dense
    rows, as many at a time as memory allows.

    Args:
      first, second, part: as in `alignment`.
      centred: centre both over contexts first, as in `cka`.

    Raises:
      ValueError: different numbers of contexts or vocabularies.
    """
    sizes = [(k.observed.count, k.updated.count, k.vocab_size) for k in (first, second)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"kernels differ in contexts or vocabulary: (O, U, V) is {sizes[0]} and {sizes[1]}."
        )
    if not (factors(first, part) and factors(second, part)):
        return _inner_of_rows(first, second, part, centred)
    head_1, body_1, weight_1 = found = pieces(first, part, centred)
    head_2, body_2, weight_2 = found if second is first else pieces(second, part, centred)
    across_DE = einsum("vd,ve->de", weight_1, weight_2)
    gram_1, gram_2 = (einsum("vd,ve->de", w, w) for w in (weight_1, weight_2))
    body = einsum("oude,df,oufg,eg->", body_1, across_DE, body_2, across_DE)
    mixed = einsum("ou,oude,de->", head_1, body_2, gram_2)
    mixed += einsum("ou,oude,de->", head_2, body_1, gram_1)
    return body + mixed + first.vocab_size * jnp.sum(head_1 * head_2)


def _cosine(first: Kernel, second: Kernel, part: str, centred: bool) -> Array:
    across = inner(first, second, part, centred)
    own = [inner(kernel, kernel, part, centred) for kernel in (first, second)]
    return across / jnp.sqrt(own[0] * own[1])


def factors(kernel: Kernel, part: str) -> bool:
    """Whether the part is a multiple of I plus W M Wᵀ."""
    plain = kernel.network.head.soft_cap is None
    scalar = is_scalar(kernel.operands(part).head)
    roles = kernel.roles(part)
    return plain and scalar and not (roles.output_input or roles.input_output)


def pieces(kernel: Kernel, part: str, centred: bool) -> tuple[Array, Array, Array]:
    """Return H `[O, U]`, M `[O, U, D, D]` and the scaled W of a part that is H ⊗ I + W M Wᵀ."""
    roles, operands = kernel.roles(part), kernel.operands(part)
    scale = kernel.network.head.scale
    head_OU = scale**2 * inner_products(
        operands.left, operands.right, operands.head, roles, kernel.has_bias
    )
    width = kernel.feature_size
    body_OUDD = kernel.body(part) if roles.body else kernel.zeros((*head_OU.shape, width, width))
    if centred:
        head_OU, body_OUDD = _centre(head_OU), _centre(body_OUDD)
    return head_OU, body_OUDD, scale * at_least_float32(kernel.network.weight(kernel.params))


def _centre(values: Array) -> Array:
    values = values - jnp.mean(values, axis=0, keepdims=True)
    return values - jnp.mean(values, axis=1, keepdims=True)


def _inner_of_rows(first: Kernel, second: Kernel, part: str, centred: bool) -> Array:
    pairs, vocab = first.observed.count * first.updated.count, first.vocab_size
    row_bytes = 2 * 8 * pairs * vocab
    step = max(1, min(vocab, min(first.budget, second.budget) // row_bytes))
    total = jnp.zeros(())
    for start in range(0, vocab, step):
        rows = np.arange(start, min(start + step, vocab))
        blocks = [kernel.dense(part, rows=rows) for kernel in (first, second)]
        if centred:
            blocks = [_centre(block) for block in blocks]
        total += jnp.sum(blocks[0] * blocks[1])
    return total
