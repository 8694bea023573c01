"""The product with a full kernel, K c, as a program of shapes: last positions of two sequences."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ntkrl import ntk, runtime
from ntkrl.types import Params, Policy


class Setting(NamedTuple):
    """A sharded model and one context, described by shapes alone."""

    policy: Policy
    params: Params
    context: ntk.Contexts


def setting(policy: Policy, params: Params, mesh: Mesh, length: int) -> Setting:
    """Describe the last position of one sequence, tokens replicated on every device.

    Args:
      policy: the network's functions.
      params: shapes, placed on the mesh.
      mesh: the device mesh.
      length: tokens of the sequence.
    """
    replicated = runtime.replicated(mesh)
    row, position = (
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=replicated) for shape in ((1, length), (1,))
    )
    context = ntk.Contexts(row, position, position, row.update(dtype=jnp.bool_))
    return Setting(policy, params, context)


def apply_call(s: Setting) -> tuple[Any, tuple[Any, ...]]:
    """Return `kernel.apply()` of the full kernel as a jitted function and its arguments."""
    apply = ntk.kernel_program(s.policy, s.params, s.context, lambda kernel, c: kernel.apply(c))
    shape, sharding = (1, s.policy.vocab_size), s.context.positions.sharding
    cotangents_UV = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    return apply, (s.params, s.context, s.context, cotangents_UV)
