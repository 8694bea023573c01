"""The empirical NTK K(o, u) = ∂z(o)/∂θ (∂z(u)/∂θ)ᵀ of next-token logits, in factored form.

Additive over any partition of θ (see parts.py). With φ the features, W the head and d its slopes:

    head   diag(d_o) (⟨φ, φ'⟩ + [bias]) diag(d_u)           (R of the theory)
    body   diag(d_o) W M Wᵀ diag(d_u), M = J_φ J_φ'ᵀ         (G)
    cross  the products of a tied head's two roles
    full   their sum

A product with K is one VJP and one JVP of the features; M needs D cotangents per context, not V.

>>> kernel = ntk.kernel(policy, params, ntk.last_positions(tokens))
>>> kernel.trace("head").shape  # [O, U]
(2, 2)
>>> change = kernel.apply(jnp.ones((2, policy.vocab_size)))  # one VJP, one JVP
>>> block = kernel.dense(rows=[5, 8], columns=[0, 1])  # [O, U, 2, 2]
>>> print(kernel.estimate().algorithm)  # of body(), before it runs
layerwise
"""

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from ntkrl.ntk import forms, tied
from ntkrl.ntk.estimates import Estimate
from ntkrl.ntk.parts import PARTS, Roles
from ntkrl.ntk.problem import Problem
from ntkrl.numerics import GIB, at_least_float32
from ntkrl.types import Array


class Kernel:
    """K(o, u) for O observed and U updated contexts, computed on request.

    Built by `ntkrl.ntk.kernel`. Every `part` is a built-in name (see `ntkrl.ntk.PARTS`) or a group.

    problem: the network, contexts and settings that the kernel was built from.
    """

    def __init__(self, problem: Problem):
        self.problem = problem

    def __repr__(self) -> str:
        p = self.problem
        parts = ", ".join((*PARTS, *p.groups))
        return (
            f"Kernel of {p.observed.count} × {p.updated.count} contexts, V = {p.vocab_size}, "
            f"D = {p.feature_size}\n"
            f"  parts: {parts}\n"
            f"  algorithm {p.options.algorithm}, at most {p.budget / GIB:.3g} GiB beyond the params"
        )

    @property
    def head(self) -> Array:
        """`[O, U]` s² (⟨φ(o), φ(u)⟩ + 1 with a bias); the head kernel is this times I_V.

        With a soft-cap the cap's derivatives multiply it on both sides (see `ntk.factored`).

        Raises:
          ValueError: with a preconditioner the head kernel is not a multiple of I.
        """
        roles, operands = self.problem.operands("head")
        if not operands.head.scalar:
            raise ValueError(
                "with a preconditioner the head kernel is diagonal but not a multiple of I; "
                "use diagonal('head')."
            )
        return self.problem.network.head.scale**2 * forms.inner_products(operands, roles)

    def body(self, part: str = "body", chunk: int | None = None) -> Array:
        """Return M(o, u) = J_φ(o) P J_φ(u)ᵀ; the body kernel is W M Wᵀ up to slopes.

        Args:
          part: "body", "input" or a group (its parameters in the features' role).
          chunk: cotangents computed at a time; None for as many as memory allows.

        Returns:
          `[O, U, D, D]`.

        Raises:
          ValueError: unknown part, or a result above the memory budget.
        """
        shape = self._shape(self.problem.feature_size, self.problem.feature_size)
        self.problem.check_size(shape, "body()", "bilinear(), apply() or fewer contexts")
        gram = self.problem.jacobian_gram(self.problem.gram_inputs(part), chunk)
        return jnp.swapaxes(gram, 1, 2)

    def dense(
        self,
        part: str = "full",
        rows: Sequence[int] | Array | None = None,
        columns: Sequence[int] | Array | None = None,
    ) -> Array:
        """Write out blocks of the kernel.

        Args:
          part: a part or group.
          rows: vocabulary rows (observed side); None for all V.
          columns: vocabulary columns (updated side); None for all V.

        Returns:
          `[O, U, |rows|, |columns|]`.

        Raises:
          ValueError: unknown part, rows or columns outside the vocabulary, or a result above the
            memory budget.
        """
        problem = self.problem
        rows_R = _vocabulary_indices(rows, problem.vocab_size, "rows")
        columns_C = _vocabulary_indices(columns, problem.vocab_size, "columns")
        shape = self._shape(rows_R.shape[0], columns_C.shape[0])
        problem.check_size(shape, "dense()", "dense(rows=…, columns=…), ntk.factored() or apply()")
        roles, operands = problem.operands(part)
        blocks = []
        if roles.output or roles.bias:
            diagonal_OUR = forms.head_diagonal(operands, roles, rows_R)
            same_RC = (rows_R[:, None] == columns_C[None, :]).astype(diagonal_OUR.dtype)
            blocks.append(diagonal_OUR[..., None] * same_RC[None, None])
        if roles.body:
            left = self._head_rows(rows_R, problem.observed.count)
            right = self._head_rows(columns_C, problem.updated.count)
            gram = problem.jacobian_gram(problem.gram_inputs(part, left, right), None)
            blocks.append(forms.body_dense(problem.network, operands, gram, rows_R, columns_C))
        if roles.output_input:
            form = functools.partial(tied.cross_dense, problem.features.of_head())
            blocks.append(form(operands, rows_R, columns_C, problem.budget))
        if roles.input_output:
            form = functools.partial(tied.cross_dense, problem.features.of_head())
            swapped = form(operands.swapped(), columns_C, rows_R, problem.budget)
            blocks.append(jnp.transpose(swapped, (1, 0, 3, 2)))
        return self._sum(blocks, shape)

    def apply(self, cotangents: Array, part: str = "full") -> Array:
        """Return Σ_u K(o, u) c_u: the logit change of each observed context.

        Args:
          cotangents: `[U, V]` direction in logit space per updated context (for a policy
            gradient, the advantage times e_y − π).
          part: a part or group.

        Returns:
          `[O, V]`.

        Raises:
          ValueError: unknown part or wrong shape.
        """
        problem = self.problem
        cotangents = problem.check_cotangents(cotangents, problem.updated.count, "cotangents")
        roles, operands = problem.operands(part)
        changes = []
        if roles.output or roles.bias:
            changes.append(forms.head_apply(operands, roles, cotangents))
        if roles.body or roles.output_input or roles.input_output:
            features, forward_mode = problem.features, problem.options.forward_mode
            changes.append(forms.body_apply(features, operands, roles, cotangents, forward_mode))
        return self._sum(changes, (problem.observed.count, problem.vocab_size))

    def bilinear(
        self,
        left: Array,
        right: Array,
        part: str = "full",
        by: str = "context",
        chunk: int | None = None,
    ) -> Array:
        """Return left_oᵀ K(o, u) right_u, for contexts or summed over those of a sequence.

        Args:
          left: `[O, V]`; for sums over a sequence, multiplied by the weights of the contexts.
          right: `[U, V]`.
          part: a part or group.
          by: "context", or "sequence" for Σ over the contexts of each pair of sequences, at one
            cotangent per sequence.
          chunk: cotangents computed at a time; None for as many as memory allows.

        Returns:
          `[O, U]`, or `[S_o, S_u]` for the sequences that have contexts, in the order of rows.

        Raises:
          ValueError: unknown part or `by`, or wrong shapes.
        """
        problem = self.problem
        if by not in ("context", "sequence"):
            raise ValueError(f"by must be 'context' or 'sequence', not {by!r}.")
        symmetric, summed = problem.symmetric and left is right, by == "sequence"
        left = problem.check_cotangents(left, problem.observed.count, "left")
        right = (
            left if symmetric else problem.check_cotangents(right, problem.updated.count, "right")
        )
        roles, operands = problem.operands(part)
        products = []
        if roles.output or roles.bias:
            products.append(forms.head_bilinear(operands, roles, left, right))
        if roles.output_input:
            form = functools.partial(tied.cross_bilinear, problem.features.of_head())
            products.append(form(operands, left, right, problem.budget))
        if roles.input_output:
            form = functools.partial(tied.cross_bilinear, problem.features.of_head())
            products.append(form(operands.swapped(), right, left, problem.budget).T)
        if summed:
            products = [problem.sum_sequences(product) for product in products]
        if roles.body:
            network, params = problem.network, problem.params
            left_OBD = forms.feature_cotangents(network, params, operands.left, left)[:, None]
            right_UBD = left_OBD
            if not symmetric:
                right_UBD = forms.feature_cotangents(network, params, operands.right, right)[
                    :, None
                ]
            inputs = problem.gram_inputs(part, left_OBD, right_UBD, summed)
            gram = problem.jacobian_gram(inputs, chunk)
            products.append(gram if summed else gram[:, 0, :, 0])
        if products:
            return functools.reduce(jnp.add, products)
        zeros = jnp.zeros(self._shape(), problem.dtype)
        return problem.sum_sequences(zeros) if summed else zeros

    def diagonal(self, part: str = "full") -> Array:
        """Return the entries K_vv(o, u): `[O, U, V]`.

        Raises:
          ValueError: unknown part, or a result above the memory budget.
        """
        problem = self.problem
        shape = self._shape(problem.vocab_size)
        problem.check_size(shape, "diagonal()", "trace(), or fewer contexts")
        roles, operands = problem.operands(part)
        diagonals = []
        if roles.output or roles.bias:
            every = jnp.arange(problem.vocab_size)
            diagonals.append(forms.head_diagonal(operands, roles, every))
        if roles.body:
            diagonals.append(forms.body_diagonal(problem.network, operands, self.body(part)))
        if roles.output_input or roles.input_output:
            diagonals.append(self._crossed(roles, operands, tied.cross_diagonal))
        return self._sum(diagonals, shape)

    def trace(self, part: str = "full") -> Array:
        """Return tr K(o, u): V⟨φ, φ'⟩ for a plain head, ⟨WᵀW, M⟩ for the body (see traces.py).

        The traces of all groups together cost one pass backward for D cotangents of each context;
        M is not computed, but for capped or preconditioned heads.

        Returns:
          `[O, U]`.

        Raises:
          ValueError: unknown part.
        """
        problem = self.problem
        roles, operands = problem.operands(part)
        total = jnp.zeros(self._shape(), problem.dtype)
        if roles.output_input or roles.input_output:
            total += self._crossed(roles, operands, tied.cross_trace)
        if roles.body:
            total += self._body_trace(part, operands)
        if not (roles.output or roles.bias):
            return total
        if operands.head.scalar and not problem.capped:
            inner = forms.inner_products(operands, roles)
            return total + problem.network.head.scale**2 * problem.vocab_size * inner
        every = jnp.arange(problem.vocab_size)
        return total + jnp.sum(forms.head_diagonal(operands, roles, every), axis=-1)

    def estimate(self, part: str = "body", chunk: int | None = None) -> Estimate:
        """Return algorithm, chunk, FLOPs and memory of `body(part, chunk)` before it runs."""
        return self.problem.estimate(self.problem.gram_inputs(part), chunk)

    def _body_trace(self, part: str, operands: forms.Operands) -> Array:
        trace = self.problem.body_trace(part)
        if trace is not None:
            return trace
        network, body = self.problem.network, self.body(part)
        if self.problem.capped:
            return jnp.sum(forms.body_diagonal(network, operands, body), axis=-1)
        return forms.body_trace(network, operands, body)

    def _crossed(self, roles: Roles, operands: forms.Operands, form: Callable[..., Array]) -> Array:
        """Return a diagonal form `[O, U, …]` of the cross terms, computed once where symmetric."""
        features, budget = self.problem.features.of_head(), self.problem.budget
        terms = []
        if roles.output_input:
            terms.append(form(features, operands, budget))
        if roles.input_output:
            same = self.problem.symmetric and bool(terms)
            swapped = terms[0] if same else form(features, operands.swapped(), budget)
            terms.append(jnp.swapaxes(swapped, 0, 1))
        return functools.reduce(jnp.add, terms)

    def _shape(self, *sizes: int) -> tuple[int, ...]:
        return (self.problem.observed.count, self.problem.updated.count, *sizes)

    def _sum(self, arrays: Sequence[Array], shape: tuple[int, ...]) -> Array:
        return functools.reduce(jnp.add, arrays) if arrays else jnp.zeros(shape, self.problem.dtype)

    def _head_rows(self, chosen: Array, count: int) -> Array | None:
        """Return rows of W as cotangents of every context; None where unit vectors are fewer."""
        weight_VD = at_least_float32(self.problem.network.weight(self.problem.params))
        width = weight_VD.shape[1]
        if chosen.shape[0] >= width:
            return None
        return jnp.broadcast_to(weight_VD[chosen], (count, *chosen.shape, width))


def _vocabulary_indices(chosen: Sequence[int] | Array | None, vocab: int, name: str) -> Array:
    """Return token ids as an array; None for all.

    Raises:
      ValueError: not a list of integers, or ids outside the vocabulary.
    """
    if chosen is None:
        return jnp.arange(vocab)
    indices = np.asarray(chosen)
    if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(
            f"{name} must be a list of token ids, not {indices.dtype} {indices.shape}."
        )
    if indices.size and (indices.min() < 0 or indices.max() >= vocab):
        raise ValueError(
            f"{name} has ids from {indices.min()} to {indices.max()}; the vocabulary is "
            f"[0, {vocab})."
        )
    return jnp.asarray(indices)
