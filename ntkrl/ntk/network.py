"""What a kernel needs to know of a network: its features as a function, its head in words.

    z = cap(s (W φ + b)),   cap(a) = κ tanh(a / κ)

The head is described and not called, since the forms of a kernel that avoid V×V need its pieces:
with slopes d = s (1 − (z/κ)²), ∂z/∂φ = diag(d) W and ∂z/∂W = diag(d) ⊗ φ.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import jaxpr, trees
from ntkrl.numerics import at_least_float32, einsum
from ntkrl.types import Array, Params, Policy


@dataclasses.dataclass(frozen=True)
class Head:
    """How logits follow from features: z = cap(scale · (W φ + b)).

    weight: name of W in the params tree, its path joined by "/".
    bias: name of b `[V]`, or None.
    scale: s.
    soft_cap: κ > 0, or None for no cap.
    transposed: True where W is stored `[D, V]`, as linen's Dense and nnx.Linear do.
    """

    weight: str
    bias: str | None = None
    scale: float = 1.0
    soft_cap: float | None = None
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of your own: any function of a params tree, with its head described.

    features: `(params, inputs) -> [N, T, D]` or `[N, D]`, the head's input; with `takes_mask`,
        `(params, inputs, mask)`. Rows must not look at each other. Keep one function object:
        compiled programs are found by it.
    head: the Head.
    takes_mask: whether features wants the `[N, T]` mask of the contexts.
    stacked: prefixes of parameter names whose leaves carry a leading layer axis, so that
        groups can name single layers.
    """

    features: Callable[..., Array]
    head: Head
    takes_mask: bool = False
    stacked: tuple[str, ...] = ()

    def read(self, params: Params, inputs: Any, mask: Array) -> Array:
        """Return the features of every position, `[N, T, D]`."""
        found = self.features(params, inputs, mask) if self.takes_mask else None
        found = self.features(params, inputs) if found is None else found
        return found if found.ndim == 3 else found[:, None]

    def weight(self, tree: Params) -> Array:
        """Return W `[V, D]` of a tree like the params (the params, a direction, …)."""
        stored = trees.named_leaves(tree)[self.head.weight]
        return jnp.swapaxes(stored, 0, 1) if self.head.transposed else stored

    def bias(self, tree: Params) -> Array | None:
        """Return b `[V]` of a tree like the params, or None."""
        return None if self.head.bias is None else trees.named_leaves(tree)[self.head.bias]

    def logits(self, params: Params, features: Array) -> Array:
        """Return z `[..., V]` of features `[..., D]`, float32 or better."""
        z = self._before_cap(params, features)
        cap = self.head.soft_cap
        return z if cap is None else cap * jnp.tanh(z / cap)

    def slopes(self, params: Params, features: Array) -> Array:
        """Return d `[O, V]` for features `[O, D]`; `[1, 1]` where all are equal (no cap)."""
        dtype = jnp.promote_types(features.dtype, jnp.float32)
        if self.head.soft_cap is None:
            return jnp.full((1, 1), self.head.scale, dtype)
        z = self._before_cap(params, features)
        return self.head.scale * (1 - jnp.tanh(z / self.head.soft_cap) ** 2)

    def _before_cap(self, params: Params, features: Array) -> Array:
        wide = at_least_float32(features)
        z = einsum("...d,vd->...v", wide, self.weight(params).astype(wide.dtype))
        bias = self.bias(params)
        if bias is not None:
            z = z + bias.astype(z.dtype).reshape((1,) * (z.ndim - 1) + (-1,))
        return self.head.scale * z


def as_network(model: Policy | Network) -> Network:
    """Return the Network of a Policy; a Network is returned as it is.

    Raises:
      ValueError: neither of the two.
    """
    if isinstance(model, Network):
        return model
    if not isinstance(model, Policy):
        raise ValueError(
            f"the model must be a Policy or an ntk.Network, not {type(model).__name__}; wrap your "
            "own function as ntk.Network(features, ntk.Head('path/of/W'))."
        )
    head = Head(model.head_weight, model.head_bias, model.head_scale, model.head_soft_cap)
    return Network(model.features, head, takes_mask=True, stacked=model.stacked)


def check_params(network: Network, params: Params) -> None:
    """Raise if kernels of these params cannot be computed, all problems in one message.

    Raises:
      ValueError: leaves that are no arrays, integers, mixed dtypes, values that are not finite,
        a head that is not there or has the wrong shape.
    """
    leaves = trees.named_leaves(params)
    bare = [name for name, leaf in leaves.items() if not hasattr(leaf, "dtype")]
    if bare:
        raise ValueError(
            f"params hold leaves that are no arrays: {listed(bare)}; split them off first "
            "(equinox.partition(model, equinox.is_inexact_array), nnx.split(model, nnx.Param))."
        )
    integers = [f"{n} ({leaf.dtype})" for n, leaf in leaves.items() if not jaxpr.is_inexact(leaf)]
    if integers:
        raise ValueError(
            f"params must be floating point; these are not: {listed(integers)}. Cast them, or "
            "close over what is not trained."
        )
    dtypes = sorted({str(leaf.dtype) for leaf in leaves.values()})
    if len(dtypes) > 1:
        raise ValueError(
            f"params mix dtypes ({', '.join(dtypes)}); kernels need one: "
            "jax.tree.map(lambda leaf: leaf.astype(...), params)."
        )
    _check_head(network.head, leaves)
    if not jaxpr.is_traced(leaves):
        finite = jax.device_get(_finite(tuple(leaves.values())))
        broken = [name for name, fine in zip(leaves, finite, strict=True) if not fine]
        if broken:
            raise ValueError(f"params hold values that are not finite, in {listed(broken)}.")


def _check_head(head: Head, leaves: dict[str, Any]) -> None:
    for what, name in (("weight", head.weight), ("bias", head.bias)):
        if name is not None and name not in leaves:
            near = difflib.get_close_matches(name, leaves, n=1, cutoff=0.3)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"head {what} {name!r} is no parameter.{hint} Parameters are: {', '.join(leaves)}."
            )
    shape = leaves[head.weight].shape
    if len(shape) != 2:
        raise ValueError(f"head weight {head.weight!r} must be a matrix, not of shape {shape}.")
    vocab = shape[1] if head.transposed else shape[0]
    if head.bias is not None and leaves[head.bias].shape != (vocab,):
        raise ValueError(
            f"head bias {head.bias!r} has shape {leaves[head.bias].shape}; with the weight's "
            f"{shape} it must be ({vocab},)."
        )
    if head.soft_cap is not None and not head.soft_cap > 0:
        raise ValueError(f"head soft_cap must be positive or None, not {head.soft_cap}.")


def check_policy_head(policy: Policy, network: Network, params: Params) -> None:
    """Raise if a policy's head function is not what its head fields say.

    Raises:
      ValueError: the two differ on random features.
    """
    width = network.weight(params).shape[1]
    dtype = jax.tree.leaves(params)[0].dtype
    phi_OD = jnp.asarray(np.random.default_rng(0).normal(size=(3, width)), dtype)
    said, done = jax.device_get(_both_logits(policy.head, network, params, phi_OD))
    rounding = 64 * float(jnp.finfo(dtype).eps) * np.sqrt(width)
    if not np.allclose(said, done, rtol=rounding, atol=rounding * np.abs(done).max()):
        raise ValueError(
            "policy.head does not compute κ tanh(s (W φ + b) / κ) with the policy's head_weight, "
            "head_bias, head_scale and head_soft_cap, which kernels rely on; set those fields."
        )


@functools.partial(jax.jit, static_argnames=("head", "network"))
def _both_logits(
    head: Callable[..., Array], network: Network, params: Params, phi_OD: Array
) -> tuple[Array, Array]:
    return network.logits(params, phi_OD), at_least_float32(head(params, phi_OD))


@jax.jit
def _finite(leaves: tuple[Array, ...]) -> list[Array]:
    return [jnp.all(jnp.isfinite(leaf)) for leaf in leaves]


def listed(values: Sequence[Any], most: int = 8) -> str:
    """Write the first values of a list out, and how many more there are."""
    shown = ", ".join(map(str, values[:most]))
    return shown if len(values) <= most else f"{shown} and {len(values) - most} more"
