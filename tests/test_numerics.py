"""Totals and token statistics against numpy in float64."""

import jax.numpy as jnp
import numpy as np

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
