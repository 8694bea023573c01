"""Entropy, its changes and divergences, against derivatives and full logits in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl.probe.distributions import (
    advantage_covariance,
    confidence_measures,
    divergences,
    entropy_changes,
    entropy_changes_by_tile,
    fit_entropy_reward,
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


def test_entropy_change_is_a_derivative(x64):
    """oracle: central differences of H along each part; the parts sum to the total."""
    rng = np.random.default_rng(1)
    z, parts = 2 * rng.normal(size=(N, V)), {p: rng.normal(size=(N, V)) for p in ("head", "body")}
    parts["full"] = parts["head"] + parts["body"]
    result = entropy_changes(jnp.asarray(z), jax.tree.map(jnp.asarray, parts))
    for part, dz in parts.items():
        slope = (entropy(z + 1e-5 * dz) - entropy(z - 1e-5 * dz)) / 2e-5
        np.testing.assert_allclose(result[part], slope, rtol=1e-7)
    np.testing.assert_allclose(result["head"] + result["body"], result["full"], rtol=1e-12)


def test_entropy_change_of_a_certain_token():
    """by hand: a token of no mass has log π = −∞ and adds nothing; equal log π's give 0."""
    z = jnp.array([[0.0, 0.0, -jnp.inf]])
    result = entropy_changes(z, {"a": jnp.array([[1.0, -2.0, 3.0]])})
    np.testing.assert_allclose(result["a"], 0.0, atol=1e-6)


@pytest.mark.parametrize(
    "settings,temperature,chunks",
    [({}, 1.0, (1024, None)), ({"scale": 0.6, "soft_cap": 1.5}, 0.7, (3, 4))],
    ids=["plain", "capped"],
)
def test_entropy_change_by_tiles(x64, settings, temperature, chunks):
    """oracle: the change of logits by jvp of the head at once; tiles of 4 rows overlap."""
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
    options = {
        "head": (d_weight, phi),
        "body": (head.weight, d_phi),
        "bias": (d_bias[:, None], jnp.ones((N, 1))),
    }
    result = entropy_changes_by_tile(head, phi, options, SoftmaxOptions(temperature, *chunks))
    for part in steps:
        assert float(jnp.abs(expected[part]).min()) > 1e-3
        np.testing.assert_allclose(result[part], expected[part], rtol=1e-10)


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


def test_fit_of_reward_on_entropy():
    """by hand: R = −0.3 e^H + 0.9 has the ceiling 0.6; ±0.1 off it leaves a residual of 0.1."""
    h = np.array([0.1, 0.1, 0.5, 0.5, 1.2, 1.2])
    r = -0.3 * np.exp(h) + 0.9
    np.testing.assert_allclose(fit_entropy_reward(h, r), (0.3, 0.9, 0.6, 0.0), atol=1e-12)
    noisy = fit_entropy_reward(h, r + np.array([0.1, -0.1] * 3))
    np.testing.assert_allclose(noisy, (0.3, 0.9, 0.6, 0.1), rtol=1e-9)
    with pytest.raises(ValueError, match="two different entropies"):
        fit_entropy_reward(h[:2], r[:2])


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
