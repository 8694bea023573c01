"""Entropy, divergences and probability masses, against full logits in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl.probe.distributions import (
    advantage_covariance,
    confidence_measures,
    divergences,
    token_masses,
)
from ntkrl.softmax import OutputHead, SoftmaxOptions, logit_statistics, logits
from tests.oracles import log_softmax

N, V, D = 4, 7, 3
ROWS = 5


def entropy(z):
    """H(π) of logits, written out."""
    log_pi = log_softmax(z)
    return -(np.exp(log_pi) * log_pi).sum(-1)


def test_confidence_by_hand():
    """by hand: π = (½, ¼, ¼) with y the second token; the masked row would be 0 nats of entropy."""
    z = jnp.log(jnp.array([[0.5, 0.25, 0.25], [1.0, 1e-30, 1e-30]]))
    result = confidence_measures(logit_statistics(z, jnp.array([1, 0])), jnp.array([True, False]))
    expected = {
        "confidence": 0.5,
        "log_prob": np.log(0.25),
        "greedy_log_prob": np.log(0.5),
        "entropy": 1.5 * np.log(2),
        "sum_squares": 0.375,
    }
    assert set(result) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, rtol=1e-5)


def test_advantage_covariance(x64):
    """oracle: over the unmasked of 12 tokens; the top quarter of 10 tokens rounds to 2."""
    rng = np.random.default_rng(4)
    log_probs, advantages = -rng.exponential(size=(2, 6)), rng.normal(size=(2, 6))
    mask = np.ones((2, 6), bool)
    mask[1, 4:] = False
    result = advantage_covariance(*map(jnp.asarray, (log_probs, advantages, mask)), 0.25)
    x, y = log_probs[mask], advantages[mask]
    products = (x - x.mean()) * (y - y.mean())
    np.testing.assert_allclose(np.asarray(result.tokens)[mask], products, rtol=1e-12)
    assert not np.asarray(result.tokens)[~mask].any()
    np.testing.assert_allclose(result.mean, np.cov(x, y, bias=True)[0, 1], rtol=1e-12)
    np.testing.assert_allclose(result.top, np.sort(products)[-2:].mean(), rtol=1e-12)


def draws(capped):
    """Two policies over one vocabulary, of different widths."""
    rng = np.random.default_rng(3)
    settings = {"scale": 0.7, "soft_cap": 2.0} if capped else {}
    head = OutputHead(jnp.asarray(2 * rng.normal(size=(V, 3))), jnp.asarray(rng.normal(size=V)))
    other = OutputHead(jnp.asarray(rng.normal(size=(V, 2))), **settings)
    return (head, jnp.asarray(rng.normal(size=(ROWS, 3)))), (
        other,
        jnp.asarray(rng.normal(size=(ROWS, 2))),
    )


@pytest.mark.parametrize(
    "capped,temperature,chunks", [(False, 1.0, (1024, None)), (True, 0.6, (2, 3))]
)
def test_divergences_of_whole_logits(x64, capped, temperature, chunks):
    """oracle: sums over all V; tiles of 3 rows overlap, chunks of 2 positions leave one over."""
    policy, other = draws(capped)
    result = divergences(policy, other, SoftmaxOptions(temperature, *chunks))
    log_pi, log_rho = (log_softmax(np.asarray(logits(*p)) / temperature) for p in (policy, other))
    pi, rho = np.exp(log_pi), np.exp(log_rho)
    np.testing.assert_allclose(result.kl, (pi * (log_pi - log_rho)).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(result.kl_reverse, (rho * (log_rho - log_pi)).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(result.total_variation, np.abs(pi - rho).sum(-1) / 2, rtol=1e-12)


def test_divergences_by_hand():
    """by hand: π = (½, ½, 0), ρ = (¼, ¾, 0): TV ¼, KL ½ log 2 + ½ log ⅔; −∞ adds nothing."""
    features = jnp.ones((1, 1))
    pi = OutputHead(jnp.zeros((3, 1)), jnp.log(jnp.array([0.5, 0.5, 0.0])))
    rho = OutputHead(jnp.zeros((3, 1)), jnp.log(jnp.array([0.25, 0.75, 0.0])))
    result = divergences((pi, features), (rho, features), SoftmaxOptions(chunk_vocabulary=2))
    expected = [
        0.5 * np.log(2) + 0.5 * np.log(2 / 3),
        0.25 * np.log(1 / 2) + 0.75 * np.log(3 / 2),
        0.25,
    ]
    np.testing.assert_allclose(np.concatenate(result), expected, rtol=1e-5)


def test_memory_is_a_tile():
    """law: by the compiler's analysis, temporaries are tiles and not positions × vocabulary."""
    shapes = [
        (
            OutputHead(jax.ShapeDtypeStruct((8192, 4), jnp.float32)),
            jax.ShapeDtypeStruct((512, 4), float),
        )
        for _ in range(2)
    ]
    options = SoftmaxOptions(1.0, 16, 256)
    lowered = jax.jit(lambda a, b: divergences(a, b, options)).lower(*shapes)
    temporary = lowered.compile().memory_analysis().temp_size_in_bytes
    tile, weights = 16 * 256 * 4, 2 * 8192 * 4 * 4
    assert temporary < 8 * tile + weights < 512 * 8192 * 4 / 10


def test_vocabularies_must_agree():
    """law: a mismatch is refused before tracing."""
    (head, features), _ = draws(False)
    with pytest.raises(ValueError, match=r"\(V, O\) is \(7, 5\) and \(6, 5\)"):
        divergences((head, features), (OutputHead(head.weight[:6]), features))


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
    moved = [float(change[0]) for change in jax.tree.map(jnp.subtract, after, before)]
    assert moved[0] < -0.1 and moved[1] > 0 > moved[2]
