"""Diverse features: the same logits everywhere, unit moments, and a head that comes out plain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntkrl
from ntkrl import models
from tests.toys import TINY


def drawn():
    """Return a tiny model, tokens, their features and the features' second moment."""
    policy, params = ntkrl.build("GPTNeoXForCausalLM", TINY, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (12, 9), 0, policy.vocab_size)
    phi_OD = policy.features(params, tokens).reshape(-1, policy.feature_size)
    # a direction that all features share, as in trained networks
    shift = {"final_norm": {**params["final_norm"], "bias": jnp.full(policy.feature_size, 2.0)}}
    params = {**params, **shift}
    phi_OD = policy.features(params, tokens).reshape(-1, policy.feature_size)
    return policy, params, tokens, phi_OD, phi_OD.T @ phi_OD / len(phi_OD)


def mean_cosine(phi_OD):
    """Return the mean cosine of different rows."""
    unit_OD = phi_OD / jnp.linalg.norm(phi_OD, axis=1, keepdims=True)
    gram_OO = unit_OD @ unit_OD.T
    return float((gram_OO.sum() - len(gram_OO)) / (len(gram_OO) * (len(gram_OO) - 1)))


def test_logits_stay_and_features_spread():
    """law: W'φ' = Wφ in one pass or token by token, ‖φ‖ is unchanged, cosines nearly vanish."""
    policy, params, tokens, phi_OD, moments = drawn()
    plain, white = models.whitened(policy, params, moments)
    turned_OD = plain.features(white, tokens).reshape(phi_OD.shape)
    expected = policy.head(params, phi_OD)
    np.testing.assert_allclose(plain.head(white, turned_OD), expected, atol=2e-4)
    again_OD = turned_OD.T @ turned_OD / len(phi_OD)
    spectrum = np.linalg.eigvalsh(again_OD)
    assert spectrum[-1] / spectrum[0] < 0.1 * np.linalg.cond(moments)
    np.testing.assert_allclose(np.trace(again_OD), np.trace(moments), rtol=1e-3)
    assert mean_cosine(phi_OD) > 0.5
    assert abs(mean_cosine(turned_OD)) < 0.15 * mean_cosine(phi_OD)
    mask = jnp.ones(tokens.shape, bool)
    copy = plain.decode_params(white)
    read, _ = plain.decode(copy, plain.init_cache(12, 9), tokens, mask)
    np.testing.assert_allclose(read.reshape(phi_OD.shape), turned_OD, atol=1e-4)


def test_the_mean_alone_shrinks():
    """law: W'φ' = Wφ and mean ‖φ‖² stay; the mean has an average direction's size, others keep."""
    policy, params, tokens, phi_OD, moments = drawn()
    mean_D = phi_OD.mean(axis=0)
    plain, shrunk = models.whitened(policy, params, moments, mean_D)
    turned_OD = plain.features(shrunk, tokens).reshape(phi_OD.shape)
    expected = policy.head(params, phi_OD)
    np.testing.assert_allclose(plain.head(shrunk, turned_OD), expected, atol=2e-4)
    again = turned_OD.T @ turned_OD / len(phi_OD)
    np.testing.assert_allclose(np.trace(again), np.trace(moments), rtol=1e-4)
    direction = mean_D / jnp.linalg.norm(mean_D)
    # of a trace over D directions the mean's has 1/D; before it had more than half
    np.testing.assert_allclose(
        direction @ again @ direction, np.trace(again) / len(again), rtol=1e-3
    )
    assert direction @ moments @ direction > 0.5 * np.trace(moments)
    across = jnp.eye(len(again)) - jnp.outer(direction, direction)
    kept, before = turned_OD @ across, phi_OD @ across
    np.testing.assert_allclose(mean_cosine(kept), mean_cosine(before), atol=1e-4)


def test_the_head_comes_out_plain(tmp_path):
    """story: a whitened model is exported, and read back it is the function it was."""
    policy, params, tokens, phi_OD, moments = drawn()
    original, white = models.whitened(policy, params, moments)
    models.export(tmp_path / "out", original, white)
    back, plain = ntkrl.load(tmp_path / "out")
    assert "whitening" not in plain
    result = back.head(plain, back.features(plain, tokens).reshape(phi_OD.shape))
    np.testing.assert_allclose(result, policy.head(params, phi_OD), atol=2e-4)


def test_a_tied_head_is_refused():
    """by hand: the embedding cannot be changed for the head's sake."""
    config = {**TINY, "tie_word_embeddings": True}
    policy, params = ntkrl.build("GPTNeoXForCausalLM", config, jax.random.key(0))
    with pytest.raises(ValueError, match="untie=True"):
        models.whitened(policy, params, jnp.eye(policy.feature_size))
