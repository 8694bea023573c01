"""Networks as kernels see them: the features as a function, the head as a description.

    z = cap(s (W φ + b)),   cap(a) = κ tanh(a / κ)

The head is described rather than called, since the forms of a kernel that avoid V×V need its
pieces: with slopes d = s (1 − (z/κ)²), ∂z/∂φ = diag(d) W and ∂z/∂W = diag(d) ⊗ φ.
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
from jax.sharding import NamedSharding, PartitionSpec

from ntkrl import jaxpr, trees
from ntkrl.numerics import at_least_float32, einsum
from ntkrl.types import Array, Params, Policy

Leaves = list[Array]
"""The params that features depend on, in leaf order; also gradients and changes of them."""
Mask = Array | np.ndarray | None
"""`[N, T]` bool, True on real tokens; None means all are."""


@dataclasses.dataclass(frozen=True)
class Head:
    """Logits as a function of features: z = cap(scale · (W φ + b)).

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
        `(params, inputs, mask)`. Sequences must be independent of each other. Pass the same
        function object every time: it is the key of the compiled programs.
    head: the Head.
    takes_mask: True where features takes the `[N, T]` mask of the contexts.
    stacked: prefixes of parameter names whose leaves have a leading layer axis, so that groups
        can name single layers.
    """

    features: Callable[..., Array]
    head: Head
    takes_mask: bool = False
    stacked: tuple[str, ...] = ()

    def read(self, params: Params, inputs: Any, mask: Mask) -> Array:
        """Return the features of every position, `[N, T, D]`."""
        arguments = (inputs, mask) if self.takes_mask else (inputs,)
        features = self.features(params, *arguments)
        return features if features.ndim == 3 else features[:, None]

    def weight(self, tree: Params) -> Array:
        """Return W `[V, D]` of the params or of a tree with their structure."""
        stored = trees.named_leaves(tree)[self.head.weight]
        return jnp.swapaxes(stored, 0, 1) if self.head.transposed else stored

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
        if self.head.bias is not None:
            bias = trees.named_leaves(params)[self.head.bias]
            z = z + bias.astype(z.dtype).reshape((1,) * (z.ndim - 1) + (-1,))
        return self.head.scale * z


def as_network(model: Policy | Network) -> Network:
    """Return the Network of a Policy; a Network is returned unchanged.

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


@dataclasses.dataclass(frozen=True)
class FeatureFunction:
    """The features as a function of the leaves they depend on; static in compiled programs.

    network: the Network.
    used: per leaf of the params, whether features depend on it.
    head_index: index of the head's matrix among the used leaves; None for an untied head.
    shardings: NamedSharding per used leaf, or None on one device.
    """

    network: Network
    used: tuple[bool, ...]
    head_index: int | None = None
    shardings: tuple[NamedSharding, ...] | None = None

    def leaves(self, tree: Params) -> Leaves:
        """Return the used leaves of the params or of a tree with their structure."""
        return [x for x, used in zip(jax.tree.leaves(tree), self.used, strict=True) if used]

    def apply(self, params: Params, leaves: Leaves, tokens: Any, mask: Mask) -> Array:
        """Return features `[S, T, D]` with the used leaves of the params replaced."""
        remaining = iter(leaves)
        chosen = [next(remaining) if used else None for used in self.used]
        _, unused = trees.partition(params, self.used)
        replaced = jax.tree.unflatten(jax.tree.structure(params), chosen)
        return self.network.read(trees.merge(replaced, unused), tokens, mask)

    def vjp_fn(
        self, params: Params, tokens: Any, mask: Mask
    ) -> tuple[Array, Callable[[Array], Leaves]]:
        """Return features `[S, T, D]` and the map from their cotangents to gradients."""
        read = lambda leaves: self.apply(params, leaves, tokens, mask)  # noqa: E731
        phi, pull = jax.vjp(read, self.leaves(params))
        return phi, lambda c: self.constrain(pull(c.astype(phi.dtype))[0])

    def jvp_fn(
        self, params: Params, tokens: Any, mask: Mask, forward_mode: bool
    ) -> Callable[[Leaves], Array]:
        """Return the map from changes of the used leaves to changes of the features `[S, T, D]`.

        Without forward mode it is the VJP of a VJP.
        """
        read = lambda leaves: self.apply(params, leaves, tokens, mask)  # noqa: E731
        if forward_mode:
            return jax.linearize(read, self.leaves(params))[1]
        phi, pull = jax.vjp(read, self.leaves(params))
        _, push = jax.vjp(lambda c: pull(c)[0], jnp.zeros_like(phi))
        return lambda changes: push(changes)[0]

    def constrain(self, leaves: Leaves) -> Leaves:
        """Constrain parameter-sized intermediates to the parameters' shardings."""
        if self.shardings is None:
            return leaves
        pairs = zip(leaves, self.shardings, strict=True)
        return [jax.lax.with_sharding_constraint(leaf, sharding) for leaf, sharding in pairs]

    def shard_cotangents(self, cotangents: Array) -> Array:
        """Shard `[S, A, …]` over all devices of the params' mesh."""
        if self.shardings is None:
            return cotangents
        mesh = self.shardings[0].mesh
        if cotangents.shape[1] % mesh.size:
            return cotangents
        spec = PartitionSpec(None, mesh.axis_names)
        return jax.lax.with_sharding_constraint(cotangents, NamedSharding(mesh, spec))

    def head_matrix(self, leaves: Leaves) -> Array:
        """Return the tied matrix among used leaves as `[V, D]`."""
        stored = leaves[self._tied_index()]
        return stored.T if self.network.head.transposed else stored

    def head_direction(self, matrix_VD: Array, params: Params) -> Leaves:
        """Return used leaves that are zero except for the tied matrix."""
        stored = matrix_VD.T if self.network.head.transposed else matrix_VD
        leaves = [jnp.zeros_like(leaf) for leaf in self.leaves(params)]
        index = self._tied_index()
        leaves[index] = stored.astype(leaves[index].dtype)
        return leaves

    def of_head(self) -> FeatureFunction:
        """Return the features as a function of the tied matrix alone."""
        among_used = self._tied_index()
        position = [index for index, used in enumerate(self.used) if used][among_used]
        used = tuple(index == position for index in range(len(self.used)))
        shardings = None if self.shardings is None else (self.shardings[among_used],)
        return FeatureFunction(self.network, used, 0, shardings)

    def _tied_index(self) -> int:
        if self.head_index is None:
            raise ValueError("features do not depend on the head's matrix: the head is not tied.")
        return self.head_index


def feature_function(network: Network, params: Params, tokens: Any, mask: Mask) -> FeatureFunction:
    """Return the FeatureFunction of a network; params may be arrays, tracers or shapes."""
    traced, leaves = trace_features(network, params, tokens, mask), jax.tree.leaves(params)
    live = traced.live()
    used = tuple(slot in live for slot in traced.inputs[: len(leaves)])
    shardings = [
        None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
        for leaf, is_used in zip(leaves, used, strict=True)
        if is_used
    ]
    named = [sharding for sharding in shardings if isinstance(sharding, NamedSharding)]
    several = any(sharding.mesh.size > 1 for sharding in named) and len(named) == len(shardings)
    names = [name for name, is_used in zip(trees.names(params), used, strict=True) if is_used]
    tied = names.index(network.head.weight) if network.head.weight in names else None
    # heads that differ in bias, scale or cap share the compiled programs of their features
    plain = Head(network.head.weight, transposed=network.head.transposed)
    network = dataclasses.replace(network, head=plain)
    return FeatureFunction(network, used, tied, tuple(named) if several else None)


def trace_features(
    network: Network, params: Params, tokens: Any, mask: Mask
) -> jaxpr.TracedFunction:
    """Trace the features of one sequence, cached by shapes; inputs: all leaves, tokens, mask."""
    leaves, treedef = jax.tree.flatten(params)
    data, data_treedef = jax.tree.flatten((tokens, mask))
    shapes = [(leaf.shape, leaf.dtype) for leaf in leaves]
    shapes += [((1, *leaf.shape[1:]), leaf.dtype) for leaf in data]
    return _trace_features(network, treedef, data_treedef, tuple(shapes))


@functools.lru_cache(maxsize=128)
def _trace_features(
    network: Network, treedef: Any, data_treedef: Any, shapes: tuple[Any, ...]
) -> jaxpr.TracedFunction:
    count = treedef.num_leaves

    def read(*arrays: Array) -> Array:
        params = jax.tree.unflatten(treedef, arrays[:count])
        tokens, mask = jax.tree.unflatten(data_treedef, arrays[count:])
        return network.read(params, tokens, mask)

    return jaxpr.trace(read, *(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes))


def check_params(network: Network, params: Params) -> None:
    """Check that kernels of these params can be computed, all problems in one message.

    Raises:
      ValueError: leaves that are not arrays, integers, mixed dtypes, values that are not finite,
        a head that is missing or has the wrong shape.
    """
    leaves = trees.named_leaves(params)
    others = [name for name, leaf in leaves.items() if not hasattr(leaf, "dtype")]
    if others:
        raise ValueError(
            f"params contain leaves that are not arrays: {shorten(others)}; split them off first "
            "(equinox.partition(model, equinox.is_inexact_array), nnx.split(model, nnx.Param))."
        )
    integers = [f"{n} ({leaf.dtype})" for n, leaf in leaves.items() if not jaxpr.is_inexact(leaf)]
    if integers:
        raise ValueError(
            f"params must be floating point; these are not: {shorten(integers)}. Cast them, or "
            "close over leaves that are not trained."
        )
    dtypes = sorted({str(leaf.dtype) for leaf in leaves.values()})
    if len(dtypes) > 1:
        raise ValueError(
            f"params mix dtypes ({', '.join(dtypes)}); kernels need a single dtype: "
            "jax.tree.map(lambda leaf: leaf.astype(...), params)."
        )
    _check_head(network.head, leaves)
    if not jaxpr.is_traced(leaves):
        finite = jax.device_get(_finite(tuple(leaves.values())))
        broken = [name for name, fine in zip(leaves, finite, strict=True) if not fine]
        if broken:
            raise ValueError(f"params contain values that are not finite, in {shorten(broken)}.")


def _check_head(head: Head, leaves: dict[str, Any]) -> None:
    for role, name in (("weight", head.weight), ("bias", head.bias)):
        if name is not None and name not in leaves:
            near = difflib.get_close_matches(name, leaves, n=1, cutoff=0.3)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"head {role} {name!r} is not a parameter.{hint} Parameters are: "
                f"{', '.join(leaves)}."
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
    """Check that a policy's head function agrees with its head fields.

    Raises:
      ValueError: the two differ on random features.
    """
    width = network.weight(params).shape[1]
    dtype = jax.tree.leaves(params)[0].dtype
    phi_OD = jnp.asarray(np.random.default_rng(0).normal(size=(3, width)), dtype)
    described, actual = jax.device_get(_both_logits(policy.head, network, params, phi_OD))
    rounding = 64 * float(jnp.finfo(dtype).eps) * np.sqrt(width)
    if not np.allclose(described, actual, rtol=rounding, atol=rounding * np.abs(actual).max()):
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


def shorten(values: Sequence[Any] | np.ndarray) -> str:
    """Format the first values of a list, and how many more there are."""
    text = ", ".join(map(str, values[:8]))
    return text if len(values) <= 8 else f"{text} and {len(values) - 8} more"
