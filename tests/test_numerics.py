"""Totals and token statistics against numpy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl import numerics, scoring
from ntkrl.types import Total
from tests.oracles import log_softmax
from tests.toys import toy_params, toy_policy


def test_masked_total_and_mean():
    """by hand: sum 1 + 4 over two items; an empty mean is 0, not NaN."""
    total = numerics.masked_total(jnp.array([1.0, 2.0, 4.0]), jnp.array([True, False, True]))
    assert (float(total.total), int(total.count), float(numerics.mean(total))) == (5.0, 2, 2.5)
    assert float(numerics.mean(Total(jnp.float32(0), jnp.int32(0)))) == 0.0


def test_score_reads_the_column_before():
    """by hand: completion token c is predicted by the features one column earlier."""
    policy = toy_policy()
    params = toy_params(policy)
    tokens = jnp.array([[1, 2, 3, 4, 5]])
    result = scoring.score(policy, params, tokens, jnp.ones((1, 5), bool), 2)
    logits = policy.head(params, policy.features(params, tokens))
    log_probs = log_softmax(np.asarray(logits, np.float64))
    # an off-by-one would read positions 3 and 4 and predict tokens that are there already
    expected = [log_probs[0, 2, 4], log_probs[0, 3, 5]]
    np.testing.assert_allclose(result.log_probs[0], expected, rtol=1e-5)


LAST = (((2,), (0,)), ((), ()))


def gradients(x, weight, dot_general):
    """Gradients of a sum of sines of the product."""

    def total(x, weight):
        with jax.default_matmul_precision("highest"):
            return jnp.sum(jnp.sin(dot_general(x, weight, LAST)))

    return jax.grad(total, (0, 1))(x, weight)


@pytest.mark.parametrize("map_rows", [False, True])
def test_dense_product_has_the_gradient_of_a_plain_product(x64, map_rows):
    """Oracle: both gradients of `dot_general`, also under vmap."""
    draw = np.random.default_rng(0).normal
    x, weight = jnp.asarray(draw(size=(2, 3, 5, 4))), jnp.asarray(draw(size=(4, 6)))
    results = []
    for product in (numerics.dense_product, jax.lax.dot_general):
        with numerics.reverse_mode():
            each = functools.partial(gradients, weight=weight, dot_general=product)
            results.append(jax.vmap(each)(x) if map_rows else each(x[0]))
    for actual, wanted in zip(*results, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=1e-12)


def test_dense_product_keeps_its_precision_in_the_backward_pass():
    """Law: accelerators would multiply the gradients in fewer bits at the default precision."""
    x, weight = jnp.ones((2, 3, 4)), jnp.ones((4, 6))
    with numerics.reverse_mode():
        jaxpr = jax.make_jaxpr(functools.partial(gradients, dot_general=numerics.dense_product))(
            x, weight
        )
    text = str(jaxpr)
    assert text.count("dot_general[") == text.count("HIGHEST, Precision.HIGHEST") >= 3


def test_cpus_contract_weight_gradients_over_the_last_axis():
    """Law: XLA's CPU backend is twice as slow where the left operand is contracted over rows."""
    x, weight = jnp.ones((2, 3, 4)), jnp.ones((4, 6))

    def compiled(product):
        function = functools.partial(gradients, dot_general=product)
        with numerics.reverse_mode():
            return jax.jit(function).lower(x, weight).compile().as_text()

    assert "lhs_contracting_dims={0}" in compiled(jax.lax.dot_general)
    assert "lhs_contracting_dims={0}" not in compiled(numerics.dense_product)


def test_products_are_plain_outside_reverse_mode():
    """Law: kernels differentiate in forward mode and look for `dot_general`."""
    x, weight = jnp.ones((2, 3, 4)), jnp.ones((4, 6))
    product = functools.partial(numerics.dense_product, dimension_numbers=LAST)
    assert "custom_vjp" not in str(jax.make_jaxpr(product)(x, weight))
    np.testing.assert_allclose(jax.jvp(product, (x, weight), (x, weight))[1], 8)


def test_frozen_weights_have_no_gradient_product():
    """Law: two products in all where only x moves, two where only the weight does."""
    x, weight = jnp.ones((2, 3, 4)), jnp.ones((4, 6))

    def total(x, weight):
        return jnp.sum(jnp.sin(numerics.dense_product(x, weight, LAST)))

    for argument in (0, 1):
        with numerics.reverse_mode():
            text = str(jax.make_jaxpr(jax.grad(total, argument))(x, weight))
        products = text.count("dot_general[")
        # the branches of CPUs and of other backends are both in the jaxpr of a weight's gradient
        assert products == (2, 3)[argument]
