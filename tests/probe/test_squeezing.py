"""Factors of a change and probability masses, against derivatives and full softmaxes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl.probe.squeezing import Masses, akg_factors, squeezing, token_masses
from ntkrl.softmax import OutputHead, SoftmaxOptions, logits
from tests.oracles import log_softmax

N, V, D = 4, 7, 3


def test_akg_is_the_first_order_change(x64):
    """oracle: central differences of log π(o) along K 𝒢, with A = −2."""
    rng = np.random.default_rng(5)
    z_o, z_u, kernel = rng.normal(size=V), rng.normal(size=V), rng.normal(size=(V, V))
    result = akg_factors(*map(jnp.asarray, (z_o, kernel, z_u)), jnp.array(2), -2.0)
    asked = -2.0 * (np.eye(V)[2] - np.exp(log_softmax(z_u)))
    np.testing.assert_allclose(result.residual, asked, rtol=1e-12)
    dz = kernel @ asked
    slope = (log_softmax(z_o + 1e-5 * dz) - log_softmax(z_o - 1e-5 * dz)) / 2e-5
    np.testing.assert_allclose(result.change, slope, rtol=1e-7)
    np.testing.assert_allclose(result.adjust @ dz, result.change, rtol=1e-12)


@pytest.mark.parametrize("chunks", [(1024, None), (3, 4)])
def test_masses(x64, chunks):
    """oracle: sums of full softmaxes; where y = y* the others are all but one token."""
    rng = np.random.default_rng(6)
    head, phi = (
        OutputHead(jnp.asarray(rng.normal(size=(V, D)))),
        jnp.asarray(rng.normal(size=(N, D))),
    )
    log_pi = log_softmax(np.asarray(logits(head, phi)) / 0.8)
    best = log_pi.argmax(-1)
    y = np.array([best[0], *((best[1:] + 2) % V)])
    options = SoftmaxOptions(0.8, *chunks)
    result = token_masses(head, phi, jnp.asarray(y), jnp.asarray(best), options)
    for o in range(N):
        rest = [np.exp(log_pi[o, v]) for v in range(V) if v not in (y[o], best[o])]
        expected = (log_pi[o, y[o]], log_pi[o, best[o]], np.log(sum(rest)))
        np.testing.assert_allclose([part[o] for part in result], expected, rtol=1e-12)


def test_a_negative_gradient_squeezes(x64):
    """law: gradient descent on an unlikely token's log π feeds the arg max alone."""
    z = jnp.array([[3.0, 0.0, 0.0, -4.0]])
    eye, y, best = OutputHead(jnp.eye(4)), jnp.array([3]), jnp.array([0])
    step = -0.5 * (jnp.eye(4)[3] - jax.nn.softmax(z[0]))
    # the head's own kernel on feature z = φ is the identity, and W moves by step φᵀ/‖φ‖²
    before, after = (token_masses(eye, z + move, y, best) for move in (0.0, step[None]))
    table = squeezing(before, after, jnp.array([-1.0]))
    assert table["tokens"].tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]
    moved = [float(table[name][0, 0]) for name in ("sampled", "greedy", "others")]
    assert moved[0] < -0.1 and moved[1] > 0 > moved[2]


def test_squeezing_by_hand():
    """by hand: A < 0 at π 0.05 and 0.6, A > 0 twice at 0.05, A = 0 left out."""
    p = jnp.array([0.05, 0.6, 0.05, 0.05, 0.05])
    before = Masses(jnp.log(p), jnp.zeros(5), jnp.zeros(5))
    after = Masses(jnp.log(p) - 1.0, jnp.array([1.0, 2.0, 3.0, 5.0, 9.0]), -jnp.ones(5))
    result = squeezing(before, after, jnp.array([-1.0, -2.0, 1.0, 0.5, 0.0]))
    assert result["tokens"].tolist() == [[1, 0, 1, 0], [2, 0, 0, 0]]
    np.testing.assert_allclose(result["greedy"], [[1, 0, 2, 0], [4, 0, 0, 0]])
    np.testing.assert_allclose(result["sampled"], [[-1, 0, -1, 0], [-1, 0, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(result["others"], [[-1, 0, -1, 0], [-1, 0, 0, 0]])
    sure = Masses(*[jnp.zeros(1)] * 3)  # π = 1 is an edge, and belongs above it
    result = squeezing(sure, sure, jnp.ones(1), (0.5, 1.0))
    assert result["tokens"].tolist() == [[0, 0, 0], [0, 0, 1]]
