"""A kernel between contexts as factors: head ⊗ I + Z N Zᵀ, of size O·U·C² instead of O·U·V².

For R + G, Z is W and N = M. The cross terms of a tied head add unit vectors of the K tokens that
the contexts read, with S their columns (see tied.py):

    S X Wᵀ + W Yᵀ Sᵀ = Z N Zᵀ,   Z = [W S],   N = [[M, Yᵀ], [X, 0]]
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl.jaxpr import is_traced
from ntkrl.ntk.forms import Operands, inner_products
from ntkrl.ntk.kernel import Kernel
from ntkrl.ntk.parts import Roles
from ntkrl.ntk.tied import is_lookup, lookup_ids, lookup_products
from ntkrl.numerics import at_least_float32, einsum
from ntkrl.types import Array


class Factored(NamedTuple):
    """K(o, u) = diag(left_o) (head[o, u] I + weight M[o, u] weightᵀ) diag(right_u).

    head: `[O, U]`.
    body: M `[O, U, C, C]`.
    weight: `[V, C]`, W times the head's scale, C = D; with the cross terms of a tied head followed
        by unit vectors of K tokens, C = D + K.
    left, right: `[O, V]` and `[U, V]` derivatives of the cap, or None without a cap.
    """

    head: Array
    body: Array
    weight: Array
    left: Array | None
    right: Array | None


def factored(kernel: Kernel, part: str = "full", body: Array | None = None) -> Factored:
    """Return the factors of a part for every pair of contexts.

    Args:
      kernel: the kernel.
      part: a part or group.
      body: `kernel.body(part)` where it is known; None to compute it.

    Raises:
      ValueError: a preconditioned head, or a tied table that is not only looked up, do not factor.
    """
    problem = kernel.problem
    roles, operands = problem.operands(part)
    if not can_factor(kernel, part):
        raise ValueError(
            f"part {part!r} does not factor (a preconditioned head, or a tied table in another "
            "use than one lookup of rows); take 'head' and 'body' of a tied head, or dense()."
        )
    scale, width = problem.network.head.scale, problem.feature_size
    head_OU = scale**2 * inner_products(operands, roles)
    tokens_K, weight_VC = factor_weights(kernel, roles)
    if roles.body:
        inner = kernel.body(part) if body is None else body
    else:
        inner = jnp.zeros((*head_OU.shape, width, width), head_OU.dtype)
    if tokens_K.size:
        blocks = [scale * block for block in _cross_blocks(kernel, part, roles, tokens_K)]
        inner = _join(inner, *blocks)
    if not problem.capped:
        return Factored(head_OU, inner, weight_VC, None, None)
    left, right = operands.left.slopes / scale, operands.right.slopes / scale
    return Factored(head_OU, inner, weight_VC, left, right)


def factor_weights(kernel: Kernel, roles: Roles) -> tuple[np.ndarray, Array]:
    """Return the tokens that cross terms need `[K]`, and W times the scale with them `[V, C]`."""
    problem = kernel.problem
    weight_VD = at_least_float32(problem.network.weight(problem.params))
    weight_VD = problem.network.head.scale * weight_VD
    if not (roles.output_input or roles.input_output):
        return np.zeros(0, int), weight_VD
    tied = problem.features.of_head()
    sides = (problem.observed,) if problem.symmetric else (problem.observed, problem.updated)
    ids = [np.ravel(lookup_ids(tied, problem.params, side)) for side in sides]
    tokens_K = np.unique(np.concatenate(ids))
    units_VK = jnp.asarray(tokens_K)[None] == jnp.arange(weight_VD.shape[0])[:, None]
    return tokens_K, jnp.concatenate([weight_VD, units_VK.astype(weight_VD.dtype)], axis=1)


def _cross_blocks(
    kernel: Kernel, part: str, roles: Roles, tokens_K: np.ndarray
) -> tuple[Array, Array]:
    """Return X and Y `[O, U, K, D]` of the cross terms S X Wᵀ and W Yᵀ Sᵀ, S the tokens' units."""
    problem = kernel.problem
    tied, operands = problem.features.of_head(), problem.operands(part)[1]
    tokens = jnp.asarray(tokens_K)

    def block(operands: Operands) -> Array:
        ids_UT, products_OUTD = lookup_products(tied, operands, None, problem.budget)
        same_UKT = (tokens[None, :, None] == ids_UT[:, None]).astype(products_OUTD.dtype)
        return einsum("ukt,outd->oukd", same_UKT, products_OUTD)

    shape = (problem.observed.count, problem.updated.count, len(tokens_K), problem.feature_size)
    empty = jnp.zeros(shape, problem.dtype)
    output_input = block(operands) if roles.output_input else empty
    if not roles.input_output:
        return output_input, empty
    same = problem.symmetric and roles.output_input
    return output_input, jnp.swapaxes(output_input if same else block(operands.swapped()), 0, 1)


@jax.jit
def _join(inner: Array, output_input: Array, input_output: Array) -> Array:
    """Return [[inner, input_outputᵀ], [output_input, 0]] `[O, U, D + K, D + K]`."""
    tokens = output_input.shape[2]
    upper = jnp.concatenate([inner, jnp.swapaxes(input_output, 2, 3)], axis=3)
    lower = jnp.pad(output_input, ((0, 0), (0, 0), (0, 0), (0, tokens)))
    return jnp.concatenate([upper, lower], axis=2)


def can_factor(kernel: Kernel, part: str) -> bool:
    """Test whether the part is a multiple of I plus Z N Zᵀ, up to slopes."""
    problem = kernel.problem
    roles, operands = problem.operands(part)
    if not operands.head.scalar:
        return False
    if not (roles.output_input or roles.input_output):
        return True
    sides = (problem.observed, problem.updated)
    tied = problem.features.of_head()
    return not is_traced((problem.params, sides)) and all(
        is_lookup(tied, problem.params, side) for side in sides
    )
