"""Activation functions by their Hugging Face names, and the softmax of attention."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from ntkrl.numerics import at_least_float32
from ntkrl.types import Array

SLOPE_LIMIT = 5.8
"""The slope of the GELU is 0 below −5.8 and 1 above 5.8, to less than an ulp of 1 in float32."""
SLOPE_NUMERATOR = (
    0.7978845238685608,
    -0.02600378356873989,
    0.014000391587615013,
    0.0001371876132907346,
    3.40738806698937e-05,
    7.502588914576336e-07,
    1.5829810351419837e-08,
)
SLOPE_DENOMINATOR = (
    1.0,
    0.3007422089576721,
    0.04279496148228645,
    0.003785111242905259,
    0.00022899165924172848,
    9.453018719796091e-06,
    2.924627153788606e-07,
    1.2864872500628621e-09,
)
"""Coefficients of x², rising, with gelu'(x) = 1/2 + x P(x²) / Q(x²) to 2.3e-9 (minimax fit)."""


def gelu(x: Array) -> Array:
    """Return x Φ(x) (Hendrycks & Gimpel 1606.08415), computed in float32 or better.

    In float32 by erf, as torch, to a few units in the last place of max(1, |x|), and its slope by
    a rational function to as much. `jax.nn.gelu`, which float64 uses, takes erfc, several times as
    slow on CPUs, and its derivative takes that and an exponential.
    """
    if x.dtype == jnp.float64:
        return jax.nn.gelu(x, approximate=False)
    return _gelu(at_least_float32(x)).astype(x.dtype)


@jax.custom_jvp
def _gelu(x: Array) -> Array:
    return x * 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))


@_gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    x = jnp.clip(primals[0], -SLOPE_LIMIT, SLOPE_LIMIT)
    square = jnp.square(x)
    slope = 0.5 + x * _polynomial(SLOPE_NUMERATOR, square) / _polynomial(SLOPE_DENOMINATOR, square)
    return _gelu(primals[0]), slope * tangents[0]


def _polynomial(coefficients: Sequence[float], x: Array) -> Array:
    """Return Σ_k coefficients[k] xᵏ by Horner's rule."""
    total = jnp.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total


@jax.custom_jvp
def softmax(scores: Array) -> Array:
    """Return the softmax over the last axis, with a derivative of one product and one sum."""
    shifted = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    return shifted / jnp.sum(shifted, axis=-1, keepdims=True)


@softmax.defjvp
def _softmax_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    probs = softmax(primals[0])
    return probs, probs * (tangents[0] - jnp.sum(probs * tangents[0], axis=-1, keepdims=True))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": jax.nn.gelu,
    "gelu_fast": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}
"""Supported activations."""
