"""The linear maps of an optimizer, against its update and against Adam's formula."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ntkrl.attribution.optimizer_maps import linearize_update
from tests.update.test_optimizers import draw, gradient, program_of

CASES = {
    "sgd": {"momentum": 0.7},
    "adam": {},
    "adamw": {"weight_decay": 0.3},
    "adafactor": {"weight_decay": 0.3},
    "muon": {"weight_decay": 0.3},
}


def last_of_three(optimizer, params):
    """Gradient, state before and update of the third step, params standing still."""
    state = optimizer.init(params)
    for count in range(3):
        grads, before = gradient(count, jnp.float64), state
        updates, state = jax.jit(optimizer.update)(grads, before, params)
    return grads, before, updates


def size(tree):
    """The largest entry."""
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", CASES)
def test_parts_add_up_and_are_linear(x64, name):
    """law: P g + momentum + decay is the update, and P of halves of the gradient adds up.

    The layers' matrices are large enough for adafactor's factors; the gradient is clipped, the
    rate is scheduled.
    """
    params = draw(0, jnp.float64)
    fields = {"max_grad_norm": 1.0, "schedule": "cosine", "warmup_steps": 2, **CASES[name]}
    optimizer = program_of(params, optimizer=name, **fields).optimizer
    grads, state, updates = last_of_three(optimizer, params)

    @jax.jit
    def parts(grads, state, params):
        result = linearize_update(optimizer, grads, state, params)
        part = jax.tree.map(lambda leaf: jnp.where(leaf > 0, leaf, 0), grads)
        rest = jax.tree.map(jnp.subtract, grads, part)
        halves = result.from_gradient(part), result.from_gradient(rest)
        return result.from_gradient(grads), result.momentum, result.decay, *halves

    push, momentum, decay, part, rest = parts(grads, state, params)
    total = jax.tree.map(lambda *leaves: sum(leaves), push, momentum, decay)
    assert size(jax.tree.map(jnp.subtract, total, updates)) < 1e-12 * size(updates)
    halves = jax.tree.map(jnp.add, part, rest)
    assert size(jax.tree.map(jnp.subtract, halves, push)) < 1e-12 * size(push)
    assert size(part) > 0.1 * size(push) > 0
    assert (size(momentum) > 0) == (name != "adafactor")
    assert (size(decay) > 0) == ("weight_decay" in CASES[name])


def test_adam_by_formula(x64):
    """oracle: the three parts by Adam's formulas, with the step's second moment and clip factor."""
    params = draw(0, jnp.float64)
    b1, b2, epsilon, rate, decay = 0.8, 0.9, 1e-3, 0.1, 0.3
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b1, b2, epsilon, weight_decay=decay)
    )
    grads, state, _ = last_of_three(optimizer, params)
    result = linearize_update(optimizer, grads, state, params)
    adam, factor = state[1][0], 1 / optax.tree.norm(grads)
    assert factor < 0.5

    def check(part, formula):
        def compare(value, g, mu, nu, theta):
            nu_hat = (b2 * nu + (1 - b2) * (factor * g) ** 2) / (1 - b2**3)
            expected = formula(g, mu, theta, np.sqrt(nu_hat) + epsilon)
            np.testing.assert_allclose(value, expected, rtol=1e-10)

        jax.tree.map(compare, part, grads, adam.mu, adam.nu, params)

    check(
        result.from_gradient(grads),
        lambda g, mu, theta, below: -rate * (1 - b1) / (1 - b1**3) * factor * g / below,
    )
    check(result.momentum, lambda g, mu, theta, below: -rate * b1 / (1 - b1**3) * mu / below)
    check(result.decay, lambda g, mu, theta, below: -rate * decay * theta)


def test_settings_in_the_state_are_no_momentum(x64):
    """by hand: a rate that is kept in the state multiplies gradient and trace alike."""
    optimizer = optax.inject_hyperparams(optax.sgd)(0.5, momentum=0.75)
    params = {"w": jnp.array([1.0, 2.0])}
    state = optimizer.init(params)
    _, state = optimizer.update({"w": jnp.array([4.0, -8.0])}, state, params)
    result = linearize_update(optimizer, {"w": jnp.array([1.0, 1.0])}, state, params)
    np.testing.assert_allclose(
        result.from_gradient({"w": jnp.array([2.0, 4.0])})["w"], [-1.0, -2.0]
    )
    np.testing.assert_allclose(result.momentum["w"], [-1.5, 3.0])
    np.testing.assert_allclose(result.decay["w"], 0.0)


def test_scans_are_followed(x64):
    """by hand: a running sum by scan is linear, forwards and backwards; products are not."""

    def scanned(turn, reverse):
        def update(updates, state, params=None):
            first = jnp.ones(()) * 0.0
            return jax.lax.scan(turn, first, updates, reverse=reverse)[1], state

        return optax.GradientTransformation(lambda params: (), update)

    inputs = jnp.array([1.0, 2.0, 4.0])
    sums = lambda carry, x: (carry + x, carry + x)  # noqa: E731
    for reverse, expected in ((False, [1.0, 3.0, 7.0]), (True, [7.0, 6.0, 4.0])):
        result = linearize_update(scanned(sums, reverse), inputs, (), inputs)
        np.testing.assert_allclose(result.from_gradient(inputs), expected)
    products = lambda carry, x: (carry * x + x, carry * x + x)  # noqa: E731
    result = linearize_update(scanned(products, False), inputs, (), inputs)
    # 1, then 1·2 is held and 2 is kept, then (2 + 2)·4 is held and 4 is kept
    np.testing.assert_allclose(result.from_gradient(inputs), [1.0, 2.0, 4.0])
