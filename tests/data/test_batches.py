"""By hand: paddings and masks written out."""

import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl.data.batches import prompt_batch, supervised_batch
from ntkrl.numerics import bucket_length

PAD = 99


def test_bucket_length_is_a_power_of_two_or_the_maximum():
    longest = [1, 8, 9, 16, 17, 100, 128]
    assert [bucket_length(n, 128) for n in longest] == [8, 8, 16, 16, 32, 128, 128]
    assert bucket_length(65, 100) == 100
    assert bucket_length(3, 5) == 5
    # A run with prompts of 1 to 128 tokens compiles five times at most.
    assert len({bucket_length(n, 128) for n in range(1, 129)}) == 5


@pytest.mark.parametrize("longest", [0, 129])
def test_bucket_length_outside_its_range(longest):
    with pytest.raises(ValueError, match=f"{longest} tokens; allowed are 1 to 128"):
        bucket_length(longest, 128)


def test_prompts_are_left_padded():
    batch = prompt_batch([[1, 2, 3], [4], [5, 6]], [2, 0, 2], pad_id=PAD, length=4)
    np.testing.assert_array_equal(batch.tokens, [[99, 99, 5, 6], [99, 1, 2, 3], [99, 99, 5, 6]])
    np.testing.assert_array_equal(batch.mask, [[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]])
    np.testing.assert_array_equal(batch.rows, [2, 0, 2])
    assert (batch.tokens.dtype, batch.mask.dtype) == (jnp.int32, jnp.bool_)
    assert batch.rows.dtype == jnp.int32


def test_a_token_equal_to_the_pad_is_kept():
    batch = prompt_batch([[PAD, 1]], [0], pad_id=PAD, length=3)
    np.testing.assert_array_equal(batch.mask, [[0, 1, 1]])


def test_supervised_rows_are_prompt_then_completion():
    batch = supervised_batch([[1, 2], [3]], [[4], [5, 6, 0]], np.asarray([1, 0]), PAD, 3, 4)
    np.testing.assert_array_equal(
        batch.tokens, [[99, 99, 3, 5, 6, 0, 99], [99, 1, 2, 4, 99, 99, 99]]
    )
    np.testing.assert_array_equal(batch.mask, [[0, 0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch.completion_mask, [[1, 1, 1, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(batch.old_log_probs, np.zeros((2, 4)))
    np.testing.assert_array_equal(batch.ref_log_probs, np.zeros((2, 4)))
    np.testing.assert_array_equal(batch.advantages, np.ones((2, 4)))
    assert batch.old_log_probs.dtype == batch.advantages.dtype == jnp.float32
    assert (batch.tokens.dtype, batch.completion_mask.dtype) == (jnp.int32, jnp.bool_)


def test_row_that_does_not_fit():
    with pytest.raises(ValueError, match="row 1 has 3 tokens and does not fit 2 columns"):
        prompt_batch([[1], [1, 2, 3]], [0, 1], PAD, 2)
    with pytest.raises(ValueError, match="row 0 has 3 tokens and does not fit 2 columns"):
        supervised_batch([[1]], [[1, 2, 3]], [0], PAD, 2, 2)
