"""Attention and its derivatives against the formula, and the passes that it compiles to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl.models.activations import softmax
from ntkrl.models.layers import attention
from ntkrl.models.rope import rotate


def plain(queries, keys, values, allowed, scale=None, soft_cap=None):
    """Attention by the definition, one query head at a time, with JAX's softmax."""
    group, width = queries.shape[2] // keys.shape[1], queries.shape[3]
    heads = []
    for head in range(queries.shape[2]):
        key, value = keys[:, head // group], values[:, head // group]
        scores = jnp.einsum("bte,bse->bts", queries[:, :, head], key)
        scores *= width**-0.5 if scale is None else scale
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
        heads.append(jnp.einsum("bts,bse->bte", jax.nn.softmax(scores, axis=-1), value))
    return jnp.stack(heads, axis=2)


@pytest.mark.parametrize(
    ("heads", "shared", "scale", "soft_cap"), [(2, 2, None, None), (4, 2, 0.3, 2.0)]
)
def test_attention_and_derivatives(x64, heads, shared, scale, soft_cap):
    """oracle: value, forward mode and reverse mode in float64; a row without a key is a mean."""
    draw = np.random.default_rng(0).normal
    shapes = [(2, 5, heads, 3), (2, shared, 5, 3), (2, shared, 5, 3)]
    arrays, moves = ([jnp.asarray(draw(size=shape)) for shape in shapes] for _ in range(2))
    allowed = jnp.tril(jnp.ones((5, 5), bool))[None].repeat(2, 0).at[0, 0].set(False)
    results = []
    for function in (attention, plain):

        def call(*arrays, function=function):
            return function(*arrays, allowed, scale, soft_cap)

        value, tangent = jax.jvp(call, arrays, moves)
        cotangents = jax.vjp(call, *arrays)[1](jnp.cos(value))
        results.append((value, tangent, *cotangents))
    for actual, wanted in zip(*results, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=1e-12)
    np.testing.assert_allclose(results[0][0][0, 0, 0], arrays[2][0, 0].mean(axis=0), atol=1e-12)


def test_softmax_is_differentiated_twice(x64):
    """oracle: Hessians of a function of probabilities."""
    x = jnp.asarray([0.3, -1.0, 2.0])
    hessians = [
        jax.hessian(lambda x, f=f: jnp.sum(jnp.sin(3 * f(x))))(x) for f in (softmax, jax.nn.softmax)
    ]
    np.testing.assert_allclose(*hessians, atol=1e-12)


def test_rotation_pads_nothing_in_the_backward_pass():
    """law: slices would be padded to the full width and added, a pass over the heads each."""
    heads, tables = jnp.ones((2, 3, 4, 8)), (jnp.ones((2, 3, 4)),) * 2
    text = str(jax.make_jaxpr(lambda x: jax.vjp(lambda x: rotate(x, tables), x)[1](x))(heads))
    assert " pad[" not in text and "add_any" in text
