"""Rows of several sequences, told apart by segment numbers, against a row for each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntkrl
from tests.models.families import tokens_and_mask, torch_model
from tests.toys import TINY


@pytest.mark.parametrize("case", ["gpt-neox", "gpt2", "gemma 3"])
def test_ones_and_zeros_are_a_plain_mask(tmp_path, case):
    """law: one segment per row is what a bool mask says, with padding on either side."""
    torch_model(case, tmp_path)
    policy, params = ntkrl.load(tmp_path)
    tokens, mask = tokens_and_mask(policy.vocab_size)
    plain, numbered = (policy.features(params, jnp.asarray(tokens), m) for m in (mask, mask * 3))
    np.testing.assert_array_equal(np.asarray(plain)[mask], np.asarray(numbered)[mask])


def test_a_cache_refuses_segments():
    """law: decoding continues one sequence per row."""
    policy, params = ntkrl.build("GPTNeoXForCausalLM", TINY, jax.random.key(0))
    tokens = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="takes a bool mask, not int32; rows of several sequences"):
        policy.decode(params, policy.init_cache(1, 8), tokens, jnp.asarray([[1, 1, 2, 2]]))
