"""The same function with features in other coordinates: whitened, or with a smaller mean."""

import dataclasses

import jax.numpy as jnp
from jax.sharding import Mesh

from ntkrl.models.policy import without
from ntkrl.numerics import einsum
from ntkrl.types import Array, Cache, Params, Policy

WHITENING = "whitening"
RIDGE = 1e-3
"""ρ of `whitened`, added to the spectrum of S, in units of its mean."""


def whitened(
    policy: Policy, params: Params, moments: Array, mean: Array | None = None
) -> tuple[Policy, Params]:
    """Return the same function with features in whitened coordinates.

    φ' = C φ and W' = W C⁻¹ with C = s (S + ρ (tr S/D) I)^(−1/2), and s such that ‖φ'‖² has the mean
    of ‖φ‖². As W'φ' = Wφ, the function and the body's kernel are unchanged; inner products
    ⟨φ', φ''⟩ of the head's kernel become small between contexts and of either sign. A control for
    the effect of features with little variation.

    With a mean, C = s (I + (1/r − 1) m mᵀ) along its direction m alone: r² is mᵀ S m over the mean
    second moment of the directions at right angles, which keep their proportions.

    Args:
      policy, params: of an untied model.
      moments: S `[D, D]`, mean of φ φᵀ over the contexts to whiten on.
      mean: `[D]` mean of φ over them, or None to whiten all directions.

    Returns:
      The policy, and params with `whitening/matrix` (C, to be frozen); `export` multiplies it into
      the head.

    Raises:
      ValueError: a tied model, whose head cannot change without its embedding.
    """
    if policy.tied:
        raise ValueError("features are whitened with an untied head; set model.untie=True.")
    moments = moments.astype(jnp.float32)
    matrix_DD, inverse_DD = _whitening(moments) if mean is None else _shrinkage(moments, mean)
    weight_VD = params["head"]["weight"]
    dtype = weight_VD.dtype
    weight_VD = einsum("vd,de->ve", weight_VD, inverse_DD).astype(dtype)
    params = {
        **params,
        "head": {**params["head"], "weight": weight_VD},
        WHITENING: {"matrix": matrix_DD.astype(dtype)},
    }
    return _whitened_policy(policy), params


def _whitening(moments: Array) -> tuple[Array, Array]:
    """Return C of all directions, and its inverse."""
    values_D, vectors_DD = jnp.linalg.eigh(moments)
    roots_D = jnp.sqrt(jnp.maximum(values_D, 0) + RIDGE * jnp.mean(values_D))
    # mean ‖C φ‖² is Σ values / roots²
    scale = jnp.sqrt(jnp.sum(values_D) / jnp.sum(values_D / roots_D**2))
    matrix_DD = einsum("dk,ek->de", vectors_DD * (scale / roots_D)[None], vectors_DD)
    return matrix_DD, einsum("dk,ek->de", vectors_DD * (roots_D / scale)[None], vectors_DD)


def _shrinkage(moments: Array, mean: Array) -> tuple[Array, Array]:
    """Return C along the mean's direction alone, and its inverse."""
    size, total = moments.shape[0], jnp.trace(moments)
    direction_D = mean.astype(jnp.float32) / jnp.linalg.norm(mean.astype(jnp.float32))
    along = einsum("d,de,e->", direction_D, moments, direction_D)
    across = (total - along) / (size - 1)
    root = jnp.sqrt(along / across)
    # mean ‖C φ‖² is s² (D across)
    scale = jnp.sqrt(total / (size * across))
    outer_DD = jnp.outer(direction_D, direction_D)
    matrix_DD = scale * (jnp.eye(size) + (1 / root - 1) * outer_DD)
    return matrix_DD, (jnp.eye(size) + (root - 1) * outer_DD) / scale


def _whitened_policy(policy: Policy) -> Policy:
    """Return a policy whose features the params' whitening matrix transforms."""

    def transform(params: Params, phi: Array) -> Array:
        return einsum("...d,ed->...e", phi, params[WHITENING]["matrix"]).astype(phi.dtype)

    def features(params: Params, tokens: Array, mask: Array | None = None) -> Array:
        return transform(params, policy.features(without(params, WHITENING), tokens, mask))

    def decode_params(params: Params) -> Params:
        copy = policy.decode_params(without(params, WHITENING))
        return {**copy, WHITENING: params[WHITENING]}

    def decode(copy: Params, cache: Cache, tokens: Array, mask: Array) -> tuple[Array, Cache]:
        phi, cache = policy.decode(without(copy, WHITENING), cache, tokens, mask)
        return transform(copy, phi), cache

    def on_mesh(mesh: Mesh | None) -> Policy:
        assert policy.on_mesh is not None  # as of every family's policy
        return _whitened_policy(policy.on_mesh(mesh))

    return dataclasses.replace(
        policy,
        features=features,
        decode_params=decode_params,
        decode=decode,
        rebuild=None,
        on_mesh=on_mesh,
    )


def unwhitened(params: Params) -> Params:
    """Return params with the whitening matrix, if any, multiplied into the head."""
    if WHITENING not in params:
        return params
    weight_VD, matrix_DD = params["head"]["weight"], params[WHITENING]["matrix"]
    weight_VD = einsum("vd,de->ve", weight_VD, matrix_DD).astype(weight_VD.dtype)
    return {**without(params, WHITENING), "head": {**params["head"], "weight": weight_VD}}
