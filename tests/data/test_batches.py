"""Padded and packed batches: layouts by hand, and invariants of packing."""

import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl.data.batches import pack, packed_batches, prompt_batch, supervised_batch
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


def drawn(seed, count=12, longest=10):
    """Prompts and completions of 1 to `longest` tokens, all tokens different."""
    rng = np.random.default_rng(seed)
    ends = np.cumsum(rng.integers(1, longest + 1, 2 * count))
    pieces = np.split(np.arange(100, 100 + ends[-1]), ends[:-1])
    pieces = [piece.tolist() for piece in pieces]
    return pieces[:count], pieces[count:]


def test_longest_first_into_the_first_row_with_room():
    """by hand: 6 · 5 and 2 (not 5 and 3) · 4 and 3; equals keep their order."""
    assert pack([3, 2, 5, 4, 6], 7) == [[4], [2, 1], [3, 0]]
    assert pack([2, 2, 2], 4) == [[0, 1], [2]]
    assert pack([4], 4) == [[0]]
    with pytest.raises(ValueError, match=r"items \[1\] are longer than a row of 4 tokens"):
        pack([4, 5], 4)


def test_rows_hold_examples_one_after_the_other():
    """by hand: the first example of a row is its longest; column 0 is never predicted."""
    (batch,) = packed_batches([[1, 2], [3], [7]], [[4], [5, 6, 0], [8]], [[0, 1, 2]], PAD, 8)
    np.testing.assert_array_equal(
        batch.tokens, [[3, 5, 6, 0, 1, 2, 4, PAD], [7, 8, PAD, PAD, PAD, PAD, PAD, PAD]]
    )
    np.testing.assert_array_equal(batch.mask, [[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(
        batch.completion_mask, [[1, 1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(batch.advantages, np.ones((2, 7)))
    assert batch.old_log_probs.shape == batch.ref_log_probs.shape == (2, 7)
    assert (batch.tokens.dtype, batch.mask.dtype) == (jnp.int32, jnp.int32)
    assert batch.completion_mask.dtype == jnp.bool_


@pytest.mark.parametrize("seed", range(5))
def test_every_example_is_whole_in_the_batch_of_its_part(seed):
    """law: a part's segments are its examples, and counted tokens its completions."""
    prompts, completions = drawn(seed)
    parts = np.split(np.random.default_rng(seed).permutation(12), 3)
    batches = packed_batches(prompts, completions, parts, PAD, 24)
    assert len({batch.tokens.shape for batch in batches}) == 1
    for part, batch in zip(parts, batches, strict=True):
        tokens, segments = np.asarray(batch.tokens), np.asarray(batch.mask)
        result = [
            tokens[row][segments[row] == k].tolist()
            for row in range(len(tokens))
            for k in range(1, segments[row].max() + 1)
        ]
        assert sorted(result) == sorted(prompts[r] + completions[r] for r in part)
        counted = tokens[:, 1:][np.asarray(batch.completion_mask)]
        assert sorted(counted) == sorted(t for r in part for t in completions[r])
        assert (tokens[segments == 0] == PAD).all()
        apart = supervised_batch(prompts, completions, part, PAD, 10, 10)
        assert np.count_nonzero(segments) == apart.mask.sum()


def test_few_shapes_whatever_the_lengths():
    """law: 300 steps of 22 examples compile for nine shapes at most, divisible by the devices."""
    for multiple, allowed in ((1, {1, 2, 3, 4, 6, 8, 12, 16, 22}), (8, {8, 16, 24})):
        rows = set()
        for seed in range(300):
            prompts, completions = drawn(seed, 22, 1 + seed % 10)
            (batch,) = packed_batches(prompts, completions, [range(22)], PAD, 20, multiple)
            rows.add(len(batch.tokens))
        assert rows <= allowed and len(rows) > 2


def test_packing_depends_on_the_rows_alone():
    """law: twice the same, and more devices add rows of padding only."""
    prompts, completions = drawn(0)
    (first,), (again,), (spread,) = (
        packed_batches(prompts, completions, [range(12)], PAD, 24, multiple)
        for multiple in (1, 1, 8)
    )
    np.testing.assert_array_equal(first.tokens, again.tokens)
    kept = (np.asarray(first.mask) > 0).any(axis=1)
    np.testing.assert_array_equal(spread.tokens[: kept.sum()], first.tokens[: kept.sum()])
    assert not np.asarray(spread.mask)[kept.sum() :].any() and len(spread.tokens) == 8
