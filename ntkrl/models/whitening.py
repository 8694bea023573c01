"""Features made diverse: other coordinates for the head's input, every logit as it was.

φ' = C φ and W' = W C⁻¹ with C = s (S + ρ (tr S/D) I)^(−1/2), S the mean of φ φᵀ over some contexts
and s such that ‖φ'‖² has the mean that ‖φ‖² had. W'φ' = Wφ: the network is the same function, and
the body's kernel the same; what changes is R = ⟨φ', φ''⟩ I, whose inner products between other
contexts are now small and of either sign. A control for what features that vary little do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from ntkrl.numerics import einsum
from ntkrl.types import Array, Cache, Params, Policy

NAME = "whitening"
RIDGE = 1e-3
"""ρ, what is added to the spectrum of S, in units of its mean."""


def whitened(policy: Policy, params: Params, moments: Array) -> tuple[Policy, Params]:
    """Return the same function in coordinates in which features vary in all directions.

    Args:
      policy, params: of an untied model.
      moments: S `[D, D]`, mean of φ φᵀ over the contexts features are to be diverse on.

    Returns:
      The policy, and params with `whitening/matrix` (C, to be frozen) beside the others; `export`
      writes the head it stands for.

    Raises:
      ValueError: a tied model, whose head cannot be changed alone.
    """
    if policy.tied:
        raise ValueError("features are whitened with a head of its own; set model.untie=True.")
    values_D, vectors_DD = jnp.linalg.eigh(moments.astype(jnp.float32))
    roots_D = jnp.sqrt(jnp.maximum(values_D, 0) + RIDGE * jnp.mean(values_D))
    # mean ‖C φ‖² is Σ values / roots²
    scale = jnp.sqrt(jnp.sum(values_D) / jnp.sum(values_D / roots_D**2))
    matrix_DD = einsum("dk,ek->de", vectors_DD * (scale / roots_D)[None], vectors_DD)
    inverse_DD = einsum("dk,ek->de", vectors_DD * (roots_D / scale)[None], vectors_DD)
    weight_VD = params["head"]["weight"]
    head = {
        **params["head"],
        "weight": einsum("vd,de->ve", weight_VD, inverse_DD).astype(weight_VD.dtype),
    }
    own = {**params, "head": head, NAME: {"matrix": matrix_DD.astype(weight_VD.dtype)}}
    features, decode = _turned(policy)
    return dataclasses.replace(policy, features=features, decode=decode, rebuild=None), own


def unwhitened(params: Params) -> Params:
    """Return params without the matrix, multiplied into the head; others as they are."""
    if NAME not in params:
        return params
    plain, weight_VD = _plain(params), params["head"]["weight"]
    turned_VD = einsum("vd,de->ve", weight_VD, params[NAME]["matrix"]).astype(weight_VD.dtype)
    return {**plain, "head": {**params["head"], "weight": turned_VD}}


def _plain(params: Params) -> Params:
    return {name: leaves for name, leaves in params.items() if name != NAME}


def _turned(policy: Policy) -> tuple[Callable[..., Array], Callable[..., Any]]:
    """Return `features` and `decode` with C applied."""

    def turn(params: Params, phi: Array) -> Array:
        return einsum("...d,ed->...e", phi, params[NAME]["matrix"]).astype(phi.dtype)

    def features(params: Params, tokens: Array, mask: Array | None = None) -> Array:
        return turn(params, policy.features(_plain(params), tokens, mask))

    def decode(params: Params, cache: Cache, tokens: Array, mask: Array) -> tuple[Array, Cache]:
        phi, cache = policy.decode(_plain(params), cache, tokens, mask)
        return turn(params, phi), cache

    return features, decode
