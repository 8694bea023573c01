"""Mixture of experts: each token goes through the MLPs of the experts that its router ranks first.

No token is dropped and none changes the result of another, so padding needs no mask. The
load-balancing term of pretraining belongs to no objective here: RL trains the router by its effect
on the log-probs alone.

Source: Shazeer et al. 1701.06538; arithmetic as in transformers' Qwen3MoeSparseMoeBlock.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ntkrl import trees
from ntkrl.models import layers as nn
from ntkrl.models.activations import ACTIVATIONS
from ntkrl.models.grouped import grouped_product
from ntkrl.numerics import at_least_float32
from ntkrl.types import Array

# mesh axes per dimension of layers' leaves; the experts are gathered over fsdp for each layer
SHARDING = (
    (r"layers/mlp/router/kernel", (None, "fsdp", None)),
    (r"layers/mlp/experts/(gate|up)/kernel", (None, "fsdp", None, "tensor")),
    (r"layers/mlp/experts/down/kernel", (None, "fsdp", "tensor", None)),
)


@dataclasses.dataclass(frozen=True)
class Routing:
    """Sizes of a mixture.

    experts: X.
    per_token: experts of each token, at most X.
    width: inner width of an expert, F.
    normalised: the weights of a token's experts are divided by their sum.
    """

    experts: int
    per_token: int
    width: int
    normalised: bool


class ExpertKernels(nnx.Module):
    """The matrices `[X, inputs, outputs]` of all experts."""

    def __init__(self, shape: tuple[int, int, int], deviation: float, rngs: nnx.Rngs, dtype: Any):
        init = nnx.initializers.normal(deviation)
        self.kernel = nnx.Param(init(rngs.params(), shape, dtype))


class Experts(nnx.Module):
    """Gated MLPs, weighted and summed per token."""

    def __init__(self, config: Any, rngs: nnx.Rngs, dtype: Any):
        width, routing = config.hidden_size, config.routing
        inward = (routing.experts, width, routing.width)
        deviation, self.activation = config.initializer_range, config.hidden_act
        self.gate = ExpertKernels(inward, deviation, rngs, dtype)
        self.up = ExpertKernels(inward, deviation, rngs, dtype)
        outward = (routing.experts, routing.width, width)
        self.down = ExpertKernels(outward, deviation, rngs, dtype)

    def __call__(
        self, x_BTD: Array, weights_BTK: Array, chosen_BTK: Array, mesh: Mesh | None
    ) -> Array:
        """Return Σ_k weight · expert(x), `[B, T, D]`."""
        kernels = tuple(part.kernel[...].astype(x_BTD.dtype) for part in self._parts())
        tokens = (x_BTD, weights_BTK, chosen_BTK)
        if mesh is None or trees.blocks(mesh, x_BTD.shape[0]) == 1:
            return self._mix(*tokens, *kernels)[0]
        # rows stay on their devices; a device sorts its tokens, and sees all experts
        inner = "tensor" if kernels[0].shape[2] % mesh.shape["tensor"] == 0 else None
        # kernels gathered and gradients scattered layer by layer, not for the stack
        axes = ((None, inner), (None, inner), (inner, None))
        gate, up, down = (
            trees.constrain(kernel, mesh, "fsdp", *inward)
            for kernel, inward in zip(kernels, axes, strict=True)
        )
        rows = P(trees.ROWS)
        local = jax.shard_map(
            self._mix,
            mesh=mesh,
            in_specs=(rows, rows, rows, *(P(None, None, inner),) * 2, P(None, inner)),
            out_specs=P(inner, trees.ROWS),
            check_vma=False,  # replicated inputs and no collective inside
        )
        return jnp.sum(local(*tokens, gate, up, down), axis=0)

    def _parts(self) -> tuple[ExpertKernels, ...]:
        return self.gate, self.up, self.down

    def _mix(self, x_BTD: Array, weights_BTK: Array, chosen_BTK: Array, *kernels: Array) -> Array:
        """Return `[1, B, T, D]`, a part of the sum where the inner width is sharded."""
        gate_XDF, up_XDF, down_XFD = kernels
        copies_MD = jnp.repeat(x_BTD.reshape(-1, x_BTD.shape[2]), chosen_BTK.shape[2], axis=0)
        groups_M = chosen_BTK.reshape(-1)
        gated_MF = ACTIVATIONS[self.activation](grouped_product(copies_MD, gate_XDF, groups_M))
        inner_MF = gated_MF * grouped_product(copies_MD, up_XDF, groups_M)
        # weighted before the last product, so that the backward pass does not need its result
        inner_MF *= weights_BTK.reshape(-1, 1)
        results_MD = grouped_product(inner_MF, down_XFD, groups_M)
        results_BTKD = results_MD.reshape(*chosen_BTK.shape, x_BTD.shape[2])
        return jnp.sum(results_BTKD, axis=2)[None]


class Mixture(nnx.Module):
    """A router and its experts, in place of a layer's MLP.

    The weights are the softmax over all experts, in float32 or better, at the largest entries.
    """

    def __init__(self, config: Any, rngs: nnx.Rngs, dtype: Any):
        self.routing = config.routing
        linear = nn.linear(config, rngs, dtype)
        self.router = linear("mlp/router", config.hidden_size, self.routing.experts, False)
        self.experts = Experts(config, rngs, dtype)

    def __call__(self, x_BTD: Array, mesh: Mesh | None) -> Array:
        probs_BTX = jax.nn.softmax(at_least_float32(self.router(x_BTD)), axis=-1)
        weights_BTK, chosen_BTK = jax.lax.top_k(probs_BTX, self.routing.per_token)
        if self.routing.normalised:
            weights_BTK /= jnp.sum(weights_BTK, axis=-1, keepdims=True)
        return self.experts(x_BTD, weights_BTK.astype(x_BTD.dtype), chosen_BTK, mesh)
