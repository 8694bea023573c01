"""Law: every epoch visits rows once, and a batch depends on the arguments alone."""

import numpy as np
import pytest

from ntkrl.data.order import epoch_at, rows_at


@pytest.mark.parametrize("size, batch_size, kept", [(12, 4, 12), (13, 4, 12), (5, 5, 5), (3, 1, 3)])
def test_epochs_visit_rows_at_most_once_and_drop_the_rest(size, batch_size, kept):
    per_epoch = size // batch_size
    for epoch in range(3):
        positions = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        rows = np.concatenate([rows_at(p, size, batch_size, seed=3) for p in positions])
        assert len(rows) == len(set(rows.tolist())) == kept
        assert rows.min() >= 0 and rows.max() < size
        assert {epoch_at(p, size, batch_size) for p in positions} == {epoch}


def test_pure_function_of_arguments():
    forward = [rows_at(p, 20, 3, seed=1) for p in range(15)]
    np.random.seed(0)  # the global stream plays no part
    backward = [rows_at(p, 20, 3, seed=1) for p in reversed(range(15))][::-1]
    np.testing.assert_array_equal(forward, backward)
    assert forward[0].dtype == np.int32


def test_epochs_and_seeds_differ():
    orders = [tuple(rows_at(p, 30, 30, seed)) for p in range(3) for seed in range(3)]
    assert len(set(orders)) == 9  # seed + epoch instead of (seed, epoch) gives 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3, 4, 0), "a batch of 4 rows cannot be drawn from 3 rows; lower the batch size to"),
        ((-1, 3, 1, 0), "position is -1"),
        ((0, 3, 0, 0), "batch_size is 0"),
        ((0, 3, 1, -1), "seed is -1"),
    ],
)
def test_arguments_outside_their_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        rows_at(*arguments)
