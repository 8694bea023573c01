"""The empirical NTK K(o, u) = ∂z(o)/∂θ (∂z(u)/∂θ)ᵀ of next-token logits, never formed unasked.

Additive over any partition of θ (see parts.py). With φ the features, W the head and d its slopes:

    head   diag(d_o) (⟨φ, φ'⟩ + [bias]) diag(d_u)           (R of the theory)
    body   diag(d_o) W M Wᵀ diag(d_u), M = J_φ J_φ'ᵀ         (G)
    cross  what a tied head's two roles add
    full   their sum

A product with K is one VJP and one JVP of the features; M takes D directions a context, not V.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from ntkrl.ntk import estimates, forms, heads, parts
from ntkrl.ntk.problem import Problem, vocabulary_indices
from ntkrl.numerics import at_least_float32
from ntkrl.types import Array


class Factored(NamedTuple):
    """K(o, u) = diag(left_o) (head[o, u] I + weight M[o, u] weightᵀ) diag(right_u).

    head: `[O, U]`.
    body: M `[O, U, D, D]`.
    weight: `[V, D]`, W times the head's scale.
    left, right: `[O, V]` and `[U, V]` derivatives of the cap, or None without a cap.
    """

    head: Array
    body: Array
    weight: Array
    left: Array | None
    right: Array | None


class Kernel(Problem):
    """K(o, u) for O observed and U updated contexts, in forms that never hold V×V unasked.

    Made by `ntkrl.ntk.kernel`. Every `part` is a built-in name (see `ntkrl.ntk.parts`) or a group.
    """

    @property
    def head(self) -> Array:
        """`[O, U]` s² (⟨φ(o), φ(u)⟩ + 1 with a bias); the head kernel is this times I_V.

        With a soft-cap it stands between the cap's derivatives (see `factored`).

        Raises:
          ValueError: with a preconditioner the head kernel is no multiple of I.
        """
        weights = self.operands("head").head
        if not heads.is_scalar(weights):
            raise ValueError(
                "with a preconditioner the head kernel is diagonal but no multiple of I; "
                "ask for diagonal('head')."
            )
        left, right = self.readings
        roles = parts.BUILT_IN["head"]
        inner = heads.inner_products(left, right, weights, roles, self.has_bias)
        return self.network.head.scale**2 * inner

    def body(self, part: str = "body", chunk: int | None = None) -> Array:
        """Return M(o, u) = J_φ(o) P J_φ(u)ᵀ; the body kernel is W M Wᵀ up to slopes.

        Args:
          part: "body", "input" or a group (its parameters as the features read them).
          chunk: directions taken at a time; None for as many as memory allows.

        Returns:
          `[O, U, D, D]`.

        Raises:
          ValueError: unknown part, or a result above the memory budget.
        """
        size = self.observed.count * self.updated.count * self.feature_size**2
        self.afford(size, "body()", "bilinear(), apply() or fewer contexts")
        return jnp.swapaxes(self.gram(part, None, None, chunk), 1, 2)

    def factored(self) -> Factored:
        """Return the factors of R + G for every pair (untied heads: of the full kernel)."""
        capped = self.network.head.soft_cap is not None
        scale = self.network.head.scale
        left, right = self.readings
        return Factored(
            self.head,
            self.body(),
            scale * at_least_float32(self.network.weight(self.params)),
            left.slopes / scale if capped else None,
            right.slopes / scale if capped else None,
        )

    def dense(
        self,
        part: str = "full",
        rows: Sequence[int] | Array | None = None,
        columns: Sequence[int] | Array | None = None,
    ) -> Array:
        """Write out blocks of the kernel.

        Args:
          part: a part or group.
          rows: vocabulary rows wanted (observed side); None for all V.
          columns: vocabulary columns wanted (updated side); None for all V.

        Returns:
          `[O, U, |rows|, |columns|]`.

        Raises:
          ValueError: unknown part, rows or columns outside the vocabulary, or a result above the
            memory budget.
        """
        rows_R = vocabulary_indices(rows, self.vocab_size, "rows")
        columns_C = vocabulary_indices(columns, self.vocab_size, "columns")
        size = self.observed.count * self.updated.count * rows_R.shape[0] * columns_C.shape[0]
        self.afford(size, "dense()", "dense(rows=…, columns=…), factored() or apply()")
        operands, roles = self.operands(part), self.roles(part)
        blocks = []
        if roles.output or (roles.bias and self.has_bias):
            left, right = self.readings
            diagonal_OUR = heads.head_diagonal(
                left, right, operands.head, roles, self.has_bias, rows_R
            )
            same_RC = (rows_R[:, None] == columns_C[None, :]).astype(diagonal_OUR.dtype)
            blocks.append(diagonal_OUR[..., None] * same_RC[None, None])
        if roles.body:
            blocks.append(self._dense_body(part, rows_R, columns_C))
        if roles.output_input:
            blocks.append(forms.cross_dense(self.tied_body, operands, rows_R, columns_C))
        if roles.input_output:
            swapped = forms.cross_dense(self.tied_body, operands.swapped(), columns_C, rows_R)
            blocks.append(jnp.transpose(swapped, (1, 0, 3, 2)))
        shape = (self.observed.count, self.updated.count, rows_R.shape[0], columns_C.shape[0])
        return functools.reduce(jnp.add, blocks) if blocks else self.zeros(shape)

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
        cotangents = self.cotangents(cotangents, self.updated.count, "cotangents")
        operands, roles = self.operands(part), self.roles(part)
        left, right = self.readings
        terms = []
        if roles.output or (roles.bias and self.has_bias):
            terms.append(
                heads.head_apply(left, right, operands.head, roles, self.has_bias, cotangents)
            )
        if roles.body or roles.output_input or roles.input_output:
            arguments = (self.body_function, operands, cotangents, roles, self.forward_mode)
            terms.append(forms.body_apply(*arguments))
        shape = (self.observed.count, self.vocab_size)
        return functools.reduce(jnp.add, terms) if terms else self.zeros(shape)

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
          left: `[O, V]`; with weights of the contexts multiplied in where they are aggregated.
          right: `[U, V]`.
          part: a part or group.
          by: "context", or "sequence" for Σ over the contexts of each pair of sequences, at one
            direction per sequence.
          chunk: directions taken at a time; None for as many as memory allows.

        Returns:
          `[O, U]`, or `[N_o, N_u]` for the sequences that have contexts, in the order of rows.

        Raises:
          ValueError: unknown part or `by`, or wrong shapes.
        """
        if by not in ("context", "sequence"):
            raise ValueError(f"by must be 'context' or 'sequence', not {by!r}.")
        alike = self.symmetric and left is right
        left = self.cotangents(left, self.observed.count, "left")
        right = left if alike else self.cotangents(right, self.updated.count, "right")
        operands, roles = self.operands(part), self.roles(part)
        here, there = self.readings
        terms = []
        if roles.output or (roles.bias and self.has_bias):
            arguments = (here, there, operands.head, roles, self.has_bias, left, right)
            terms.append(heads.head_bilinear(*arguments))
        if roles.output_input:
            terms.append(forms.cross_bilinear(self.tied_body, operands, left, right))
        if roles.input_output:
            swapped = operands.swapped()
            terms.append(forms.cross_bilinear(self.tied_body, swapped, right, left).T)
        if by == "sequence":
            terms = [self.by_sequence(term) for term in terms]
        if roles.body:
            left_OD = forms.feature_cotangents(self.network, self.params, here, left)
            right_UD = left_OD
            if not alike:
                right_UD = forms.feature_cotangents(self.network, self.params, there, right)
            terms.append(self.scalar_gram(part, left_OD, right_UD, by == "sequence", chunk))
        shape = (self.observed.count, self.updated.count)
        zeros = self.zeros(shape)
        return (
            functools.reduce(jnp.add, terms)
            if terms
            else (self.by_sequence(zeros) if by == "sequence" else zeros)
        )

    def diagonal(self, part: str = "full") -> Array:
        """Return the entries K_vv(o, u): `[O, U, V]`.

        Raises:
          ValueError: unknown part, or a result above the memory budget.
        """
        size = self.observed.count * self.updated.count * self.vocab_size
        self.afford(size, "diagonal()", "trace(), or fewer contexts")
        operands, roles = self.operands(part), self.roles(part)
        left, right = self.readings
        terms = []
        if roles.output or (roles.bias and self.has_bias):
            every = jnp.arange(self.vocab_size)
            arguments = (left, right, operands.head, roles, self.has_bias, every)
            terms.append(heads.head_diagonal(*arguments))
        if roles.body:
            terms.append(forms.body_diagonal(self.network, operands, self.body(part)))
        if roles.output_input:
            terms.append(forms.cross_diagonal(self.tied_body, operands))
        if roles.input_output:
            swapped = forms.cross_diagonal(self.tied_body, operands.swapped())
            terms.append(jnp.swapaxes(swapped, 0, 1))
        shape = (self.observed.count, self.updated.count, self.vocab_size)
        return functools.reduce(jnp.add, terms) if terms else self.zeros(shape)

    def trace(self, part: str = "full") -> Array:
        """Return tr K(o, u): V⟨φ, φ'⟩ for a plain head, ⟨WᵀW, M⟩ for the body.

        Returns:
          `[O, U]`.

        Raises:
          ValueError: unknown part.
        """
        roles = self.roles(part)
        crossed = roles.output_input or roles.input_output
        if crossed or self.network.head.soft_cap is not None:
            return jnp.sum(self.diagonal(part), axis=-1)
        operands = self.operands(part)
        left, right = self.readings
        total = self.zeros((self.observed.count, self.updated.count))
        if roles.body:
            total += forms.body_trace(self.network, operands, self.body(part))
        if heads.is_scalar(operands.head):
            inner = heads.inner_products(left, right, operands.head, roles, self.has_bias)
            return total + self.network.head.scale**2 * self.vocab_size * inner
        every = jnp.arange(self.vocab_size)
        arguments = (left, right, operands.head, roles, self.has_bias, every)
        return total + jnp.sum(heads.head_diagonal(*arguments), axis=-1)

    def estimate(self, part: str = "body", chunk: int | None = None) -> estimates.Estimate:
        """Return algorithm, chunk, FLOPs and memory of `body(part, chunk)` before it runs."""
        found = self.estimates_of(part, *self.sides(None, None), chunk)
        return estimates.choose(found, self.algorithm, self.budget)

    def estimates(self, part: str = "body") -> dict[str, estimates.Estimate]:
        """Return the Estimate of every algorithm that can be taken to `body(part)`."""
        return self.estimates_of(part, *self.sides(None, None), None)

    def _dense_body(self, part: str, rows_R: Array, columns_C: Array) -> Array:
        weight_VD = at_least_float32(self.network.weight(self.params))
        width = weight_VD.shape[1]

        def vectors(chosen: Array, count: int) -> Array | None:
            if chosen.shape[0] >= width:
                return None
            return jnp.broadcast_to(weight_VD[chosen], (count, *chosen.shape, width))

        left = vectors(rows_R, self.observed.count)
        right = vectors(columns_C, self.updated.count)
        found = self.gram(part, left, right, None)
        return forms.body_dense(self.network, self.operands(part), found, rows_R, columns_C)
