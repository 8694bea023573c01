"""Divergences by tiles against whole logits in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl.probe.divergence import divergences
from ntkrl.softmax import OutputHead, logits
from tests.oracles import log_softmax

N, V = 5, 7


def draws(capped):
    """Two policies over one vocabulary, of different widths."""
    rng = np.random.default_rng(3)
    settings = {"scale": 0.7, "soft_cap": 2.0} if capped else {}
    head = OutputHead(jnp.asarray(2 * rng.normal(size=(V, 3))), jnp.asarray(rng.normal(size=V)))
    other = OutputHead(jnp.asarray(rng.normal(size=(V, 2))), **settings)
    return (head, jnp.asarray(rng.normal(size=(N, 3)))), (
        other,
        jnp.asarray(rng.normal(size=(N, 2))),
    )


@pytest.mark.parametrize(
    "capped,temperature,chunks", [(False, 1.0, (1024, None)), (True, 0.6, (2, 3))]
)
def test_divergences_of_whole_logits(x64, capped, temperature, chunks):
    """oracle: sums over all V; tiles of 3 rows overlap, chunks of 2 positions leave one over."""
    policy, other = draws(capped)
    found = divergences(policy, other, temperature, *chunks)
    log_pi, log_rho = (log_softmax(np.asarray(logits(*p)) / temperature) for p in (policy, other))
    pi, rho = np.exp(log_pi), np.exp(log_rho)
    np.testing.assert_allclose(found.kl, (pi * (log_pi - log_rho)).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(found.kl_reverse, (rho * (log_rho - log_pi)).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(found.total_variation, np.abs(pi - rho).sum(-1) / 2, rtol=1e-12)


def test_divergences_by_hand():
    """by hand: π = (½, ½, 0), ρ = (¼, ¾, 0): TV ¼, KL ½ log 2 + ½ log ⅔; −∞ adds nothing."""
    features = jnp.ones((1, 1))
    pi = OutputHead(jnp.zeros((3, 1)), jnp.log(jnp.array([0.5, 0.5, 0.0])))
    rho = OutputHead(jnp.zeros((3, 1)), jnp.log(jnp.array([0.25, 0.75, 0.0])))
    found = divergences((pi, features), (rho, features), chunk_vocabulary=2)
    expected = [
        0.5 * np.log(2) + 0.5 * np.log(2 / 3),
        0.25 * np.log(1 / 2) + 0.75 * np.log(3 / 2),
        0.25,
    ]
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=1e-5)


def test_memory_is_a_tile():
    """law: by the compiler's analysis, temporaries are tiles and not positions × vocabulary."""
    shapes = [
        (
            OutputHead(jax.ShapeDtypeStruct((8192, 4), jnp.float32)),
            jax.ShapeDtypeStruct((512, 4), float),
        )
        for _ in range(2)
    ]
    lowered = jax.jit(lambda a, b: divergences(a, b, 1.0, 16, 256)).lower(*shapes)
    held = lowered.compile().memory_analysis().temp_size_in_bytes
    tile, weights = 16 * 256 * 4, 2 * 8192 * 4 * 4
    assert held < 8 * tile + weights < 512 * 8192 * 4 / 10


def test_vocabularies_must_agree():
    """law: what cannot be compared is refused before tracing."""
    (head, features), _ = draws(False)
    with pytest.raises(ValueError, match=r"\(V, O\) is \(7, 5\) and \(6, 5\)"):
        divergences((head, features), (OutputHead(head.weight[:6]), features))
