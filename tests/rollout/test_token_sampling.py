"""Truncation and the draw of one token, against sorting and counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl.rollout.settings import SamplerSettings
from ntkrl.rollout.token_sampling import BLOCK, draw_uniforms, sample_tokens, truncated

CASES = [
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 400},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"min_p": 0.2},
    {"top_k": 20, "top_p": 0.5, "min_p": 0.05},
]


def settings(temperature=1.0, **truncation):
    """Settings of which the draw uses temperature and truncation."""
    return SamplerSettings(
        completions_per_prompt=1,
        max_completion_tokens=1,
        temperature=temperature,
        end_ids=(0,),
        pad_id=0,
        **truncation,
    )


def kept_by_sorting(weights, top_k=None, top_p=None, min_p=None):
    """Return the tokens that truncation keeps of one row, by the usual sorting."""
    order = np.argsort(-weights)
    kept = np.zeros(len(weights), bool)
    kept[order[: len(weights) if top_k is None else top_k]] = True
    if top_p is not None:
        mass = np.where(kept, weights, 0.0)[order]
        before = np.cumsum(mass) - mass
        kept[order[before >= top_p * mass.sum()]] = False
    if min_p is not None:
        kept &= weights >= min_p * weights.max()
    return kept


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("size", [300, 6])
def test_truncation_equals_sorting(case, size):
    """oracle: sort, cumulate, cut; rows of any size."""
    z = np.random.default_rng(0).normal(size=(9, size)).astype(np.float32) * 2
    weights = np.exp(z - z.max(axis=1, keepdims=True))
    result = np.asarray(truncated(settings(**case), jnp.asarray(weights)))
    expected = np.stack([kept_by_sorting(row.astype(np.float64), **case) for row in weights])
    np.testing.assert_array_equal(result > 0, expected)
    np.testing.assert_array_equal(result[expected], weights[expected])


def test_equal_weights_stay_together():
    """by hand: the second and the third likeliest are equal: top-2 keeps three tokens."""
    weights = jnp.array([[1.0, 0.5, 0.5, 0.25]])
    np.testing.assert_array_equal(truncated(settings(top_k=2), weights), [[1, 0.5, 0.5, 0]])


@pytest.mark.parametrize("case", [{}, {"top_k": 9}, {"temperature": 0.5, "top_p": 0.7}], ids=str)
def test_frequencies_and_masses(case):
    """law: 20000 draws are within 4.5 standard errors; log-probs and kept mass are exact."""
    rng, count, size = np.random.default_rng(1), 20000, BLOCK + 30
    z = rng.normal(size=size).astype(np.float32) * 2
    options = settings(**case)
    keys = jax.random.split(jax.random.key(0), count)
    result = jax.jit(
        lambda uniforms: sample_tokens(options, jnp.tile(jnp.asarray(z), (count, 1)), uniforms)
    )(draw_uniforms(keys, jnp.arange(1))[0])
    wide = z.astype(np.float64) / options.temperature
    probs = np.exp(wide - np.logaddexp.reduce(wide))
    truncation = {name: value for name, value in case.items() if name != "temperature"}
    kept = kept_by_sorting(probs, **truncation)
    drawn = np.where(kept, probs, 0) / probs[kept].sum()
    tokens = np.asarray(result.tokens)
    counts = np.bincount(tokens, minlength=size) / count
    assert (np.abs(counts - drawn) <= 4.5 * np.sqrt(drawn * (1 - drawn) / count) + 1e-9).all()
    assert len(set(tokens // BLOCK)) == 2 or kept.sum() < 20
    np.testing.assert_allclose(result.log_probs, np.log(probs)[tokens], rtol=2e-5)
    if not truncation:
        assert result.kept_log_mass is None
        return
    np.testing.assert_allclose(result.kept_log_mass, np.log(probs[kept].sum()), atol=1e-6)
    assert (result.kept_log_mass <= 1e-7).all()


def test_excluded_tokens_are_never_drawn():
    """law: a logit of −∞ at either end of a block has no chance, however the sums round."""
    z = jnp.tile(jnp.where(jnp.arange(BLOCK + 4) % 7 == 3, 0.0, -jnp.inf), (4000, 1))
    keys = jax.random.split(jax.random.key(3), 4000)
    result = sample_tokens(settings(), z, draw_uniforms(keys, jnp.arange(1))[0])
    assert set(np.asarray(result.tokens) % 7) == {3}
