"""Confidence, entropy changes and squeezing against softmaxes written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl.probe.confidence import (
    advantage_covariance,
    confidence_measures,
    entropy_changes,
    entropy_changes_by_tile,
    fit_entropy_reward,
)
from ntkrl.probe.squeezing import Masses, akg_factors, squeezing, token_masses
from ntkrl.softmax import OutputHead, logit_statistics, logits
from tests.oracles import log_softmax

N, V, D = 4, 7, 3


def entropy(z):
    """H(π) of logits, written out."""
    log_pi = log_softmax(z)
    return -(np.exp(log_pi) * log_pi).sum(-1)


def test_confidence_by_hand():
    """by hand: π = (½, ¼, ¼) with y the second token; the masked row would be 0 nats of entropy."""
    z = jnp.log(jnp.array([[0.5, 0.25, 0.25], [1.0, 1e-30, 1e-30]]))
    found = confidence_measures(logit_statistics(z, jnp.array([1, 0])), jnp.array([True, False]))
    expected = {
        "confidence": 0.5,
        "log_prob": np.log(0.25),
        "greedy_log_prob": np.log(0.5),
        "entropy": 1.5 * np.log(2),
        "sum_squares": 0.375,
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5)


def test_entropy_change_is_a_derivative(x64):
    """oracle: central differences of H along each part; the parts add up to the whole."""
    rng = np.random.default_rng(1)
    z, parts = 2 * rng.normal(size=(N, V)), {p: rng.normal(size=(N, V)) for p in ("head", "body")}
    parts["full"] = parts["head"] + parts["body"]
    found = entropy_changes(jnp.asarray(z), jax.tree.map(jnp.asarray, parts))
    for part, dz in parts.items():
        slope = (entropy(z + 1e-5 * dz) - entropy(z - 1e-5 * dz)) / 2e-5
        np.testing.assert_allclose(found[part], slope, rtol=1e-7)
    np.testing.assert_allclose(found["head"] + found["body"], found["full"], rtol=1e-12)


def test_entropy_change_of_a_certain_token():
    """by hand: a token of no mass has log π = −∞ and adds nothing; equal log π's give 0."""
    z = jnp.array([[0.0, 0.0, -jnp.inf]])
    found = entropy_changes(z, {"a": jnp.array([[1.0, -2.0, 3.0]])})
    np.testing.assert_allclose(found["a"], 0.0, atol=1e-6)


@pytest.mark.parametrize(
    "settings,temperature,chunks",
    [({}, 1.0, (1024, None)), ({"scale": 0.6, "soft_cap": 1.5}, 0.7, (3, 4))],
    ids=["plain", "capped"],
)
def test_entropy_change_by_tiles(x64, settings, temperature, chunks):
    """oracle: the change of logits by jvp of the head, then whole; tiles of 4 rows overlap."""
    rng = np.random.default_rng(2)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    head, phi = OutputHead(draw(V, D), draw(V), **settings), draw(N, D)
    d_weight, d_bias, d_phi = draw(V, D), draw(V), draw(N, D)

    def z(weight, bias, phi):
        return logits(OutputHead(weight, bias, **settings), phi) / temperature

    at, still = (head.weight, head.bias, phi), jax.tree.map(jnp.zeros_like, (d_weight, d_bias, phi))
    steps = {
        "head": (d_weight, still[1], still[2]),
        "body": (still[0], still[1], d_phi),
        "bias": (still[0], d_bias, still[2]),
    }
    changes = {part: jax.jvp(z, at, step)[1] for part, step in steps.items()}
    expected = entropy_changes(z(*at), changes)
    given = {
        "head": (d_weight, phi),
        "body": (head.weight, d_phi),
        "bias": (d_bias[:, None], jnp.ones((N, 1))),
    }
    found = entropy_changes_by_tile(head, phi, given, temperature, *chunks)
    for part in steps:
        assert float(jnp.abs(expected[part]).min()) > 1e-3
        np.testing.assert_allclose(found[part], expected[part], rtol=1e-10)


def test_advantage_covariance(x64):
    """oracle: over the unmasked of 12 tokens; the top quarter of 10 tokens rounds to 2."""
    rng = np.random.default_rng(4)
    log_probs, advantages = -rng.exponential(size=(2, 6)), rng.normal(size=(2, 6))
    mask = np.ones((2, 6), bool)
    mask[1, 4:] = False
    found = advantage_covariance(*map(jnp.asarray, (log_probs, advantages, mask)), 0.25)
    x, y = log_probs[mask], advantages[mask]
    products = (x - x.mean()) * (y - y.mean())
    np.testing.assert_allclose(np.asarray(found.tokens)[mask], products, rtol=1e-12)
    assert not np.asarray(found.tokens)[~mask].any()
    np.testing.assert_allclose(found.mean, np.cov(x, y, bias=True)[0, 1], rtol=1e-12)
    np.testing.assert_allclose(found.top, np.sort(products)[-2:].mean(), rtol=1e-12)


def test_fit_of_reward_on_entropy():
    """by hand: R = −0.3 e^H + 0.9 has the ceiling 0.6; ±0.1 off it leaves a residual of 0.1."""
    h = np.array([0.1, 0.1, 0.5, 0.5, 1.2, 1.2])
    r = -0.3 * np.exp(h) + 0.9
    np.testing.assert_allclose(fit_entropy_reward(h, r), (0.3, 0.9, 0.6, 0.0), atol=1e-12)
    noisy = fit_entropy_reward(h, r + np.array([0.1, -0.1] * 3))
    np.testing.assert_allclose(noisy, (0.3, 0.9, 0.6, 0.1), rtol=1e-9)
    with pytest.raises(ValueError, match="two different entropies"):
        fit_entropy_reward(h[:2], r[:2])


def test_akg_is_the_first_order_change(x64):
    """oracle: central differences of log π(o) along K 𝒢, with A = −2."""
    rng = np.random.default_rng(5)
    z_o, z_u, kernel = rng.normal(size=V), rng.normal(size=V), rng.normal(size=(V, V))
    found = akg_factors(*map(jnp.asarray, (z_o, kernel, z_u)), jnp.array(2), -2.0)
    asked = -2.0 * (np.eye(V)[2] - np.exp(log_softmax(z_u)))
    np.testing.assert_allclose(found.residual, asked, rtol=1e-12)
    dz = kernel @ asked
    slope = (log_softmax(z_o + 1e-5 * dz) - log_softmax(z_o - 1e-5 * dz)) / 2e-5
    np.testing.assert_allclose(found.change, slope, rtol=1e-7)
    np.testing.assert_allclose(found.adjust @ dz, found.change, rtol=1e-12)


@pytest.mark.parametrize("chunks", [(1024, None), (3, 4)])
def test_masses(x64, chunks):
    """oracle: sums of whole softmaxes; where y = y* the others are all but one token."""
    rng = np.random.default_rng(6)
    head, phi = (
        OutputHead(jnp.asarray(rng.normal(size=(V, D)))),
        jnp.asarray(rng.normal(size=(N, D))),
    )
    log_pi = log_softmax(np.asarray(logits(head, phi)) / 0.8)
    best = log_pi.argmax(-1)
    y = np.array([best[0], *((best[1:] + 2) % V)])
    found = token_masses(head, phi, jnp.asarray(y), jnp.asarray(best), 0.8, *chunks)
    for o in range(N):
        rest = [np.exp(log_pi[o, v]) for v in range(V) if v not in (y[o], best[o])]
        expected = (log_pi[o, y[o]], log_pi[o, best[o]], np.log(sum(rest)))
        np.testing.assert_allclose([part[o] for part in found], expected, rtol=1e-12)


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
    found = squeezing(before, after, jnp.array([-1.0, -2.0, 1.0, 0.5, 0.0]))
    assert found["tokens"].tolist() == [[1, 0, 1, 0], [2, 0, 0, 0]]
    np.testing.assert_allclose(found["greedy"], [[1, 0, 2, 0], [4, 0, 0, 0]])
    np.testing.assert_allclose(found["sampled"], [[-1, 0, -1, 0], [-1, 0, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(found["others"], [[-1, 0, -1, 0], [-1, 0, 0, 0]])
    sure = Masses(*[jnp.zeros(1)] * 3)  # π = 1 is an edge, and belongs above it
    found = squeezing(sure, sure, jnp.ones(1), (0.5, 1.0))
    assert found["tokens"].tolist() == [[0, 0, 0], [0, 0, 1]]
