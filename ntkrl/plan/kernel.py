"""The product with a full kernel, K c, as a program of shapes: last positions of two sequences."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ntkrl import runtime
from ntkrl.ntk import forms, heads, parts
from ntkrl.ntk.body import Body, make_body
from ntkrl.ntk.contexts import Contexts
from ntkrl.ntk.network import Network, as_network
from ntkrl.types import Array, Params, Policy


class Setting(NamedTuple):
    """A sharded model and one context, described by shapes alone."""

    network: Network
    params: Params
    body: Body
    context: Contexts


def setting(policy: Policy, params: Params, mesh: Mesh, length: int) -> Setting:
    """Describe the last position of one sequence; tokens lie whole on every device.

    Args:
      policy: the network's functions.
      params: shapes, placed on the mesh.
      mesh: the device mesh.
      length: tokens of the sequence.
    """
    whole = runtime.replicated(mesh)
    row, place = (
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=whole) for shape in ((1, length), (1,))
    )
    context = Contexts(row, place, place, row.update(dtype=jnp.bool_))
    network = as_network(policy)
    body = make_body(network, params, context.tokens, context.mask)
    where = jax.tree.map(lambda leaf: leaf.sharding, params)
    body = dataclasses.replace(body, shardings=tuple(body.leaves(where)))
    return Setting(network, params, body, context)


def apply_call(s: Setting) -> tuple[Any, tuple[Any, ...]]:
    """Return `kernel.apply()` of the full kernel as a jitted function and its arguments."""
    tied, bias = s.body.head_index is not None, s.network.head.bias is not None
    roles = parts.BUILT_IN["full"]._replace(output_input=tied, input_output=tied)

    def apply(params: Params, cotangents_UV: Array, *contexts: Contexts) -> Array:
        left, right = (heads.reading(s.network, params, c) for c in contexts)
        head = heads.HeadWeights(None, None)
        operands = forms.Operands(params, *contexts, left, right, None, head)
        changes_OV = heads.head_apply(left, right, head, roles, bias, cotangents_UV)
        return changes_OV + forms.body_apply(s.body, operands, cotangents_UV, roles, True)

    shape, whole = (1, s.network.weight(s.params).shape[0]), s.context.positions.sharding
    cotangents_UV = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole)
    return jax.jit(apply), (s.params, cotangents_UV, s.context, s.context)
