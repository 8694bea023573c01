"""The GELU against scipy in float64, its slope against the formula, and what it compiles to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from ntkrl.models.activations import gelu

ULP = np.finfo(np.float32).eps
GRID = np.concatenate([np.linspace(-12, 12, 400_001), np.geomspace(1e-30, 1e30, 1001)])


def expected(x):
    """Return x Φ(x) and its slope Φ(x) + x φ(x) in float64."""
    x = np.asarray(x, np.float64)
    density = np.exp(-np.minimum(x * x, 1400) / 2) / np.sqrt(2 * np.pi)
    return x * scipy.special.ndtr(x), scipy.special.ndtr(x) + x * density


@pytest.mark.parametrize("sign", [1, -1])
def test_gelu_is_exact_to_float32(sign):
    """Oracle: value and slope within three ulps of max(1, |x|), on a dense grid and far out."""
    x = (sign * GRID).astype(np.float32)
    value, slope = jax.jvp(gelu, (x,), (jnp.ones_like(x),))
    for actual, wanted in zip((value, slope), expected(x), strict=True):
        assert actual.dtype == jnp.float32
        # the tanh form is off by 4e-4 here
        assert np.max(np.abs(actual - wanted) / np.maximum(1, np.abs(x))) < 3 * ULP


def test_reverse_mode_agrees_with_forward_mode():
    """Law: the gradient is the slope; zero and one beyond the rational function's range."""
    x = jnp.asarray([-1e30, -7.0, -0.3, 0.0, 0.3, 7.0, 1e30], jnp.float32)
    slope = jax.vmap(jax.grad(gelu))(x)
    np.testing.assert_allclose(slope, jax.jvp(gelu, (x,), (jnp.ones_like(x),))[1], rtol=0, atol=0)
    np.testing.assert_allclose(slope[jnp.asarray([0, 1, 3, 5, 6])], [0, 0, 0.5, 1, 1], atol=ULP)


def test_float64_is_exact():
    """Oracle: kernels in float64 get the exact function and slope."""
    with jax.enable_x64(True):
        x = jnp.asarray(np.linspace(-8, 8, 4001), jnp.float64)
        value, slope = jax.jvp(gelu, (x,), (jnp.ones_like(x),))
    for actual, wanted in zip((value, slope), expected(x), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-13, atol=1e-15)


def test_half_precision_is_computed_in_float32():
    """By hand: bfloat16 results are the float32 ones, rounded once."""
    x = jnp.linspace(-6, 6, 1001, dtype=jnp.bfloat16)
    assert gelu(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(gelu(x), gelu(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_no_exponential_is_compiled():
    """Law: one division each for value and slope, no exponential, on arrays as they are."""

    def both(x):
        value, pullback = jax.vjp(gelu, x)
        return value, pullback(jnp.ones_like(x))

    text = jax.jit(both).lower(jnp.ones((8, 8))).compile().as_text()
    # jax.nn.gelu(approximate=False) has three exponentials and six divisions
    assert "exponential(" not in text
    assert text.count(" divide(") <= 2
