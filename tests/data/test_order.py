"""Law: every epoch visits rows once, and a batch depends on the arguments alone."""

from fractions import Fraction

import numpy as np
import pytest

from ntkrl.data import PromptSet, hold_out
from ntkrl.data.order import epoch_at, rows_at, spread, weighted_rows_at


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


def test_rows_of_one_file_stay():
    """golden: update only with a reason, since runs that are resumed would read other rows."""
    rows = [rows_at(p, 7, 3, seed=5).tolist() for p in (0, 1, 2, 9)]
    assert rows == [[1, 4, 2], [3, 6, 5], [4, 2, 0], [2, 3, 6]]


SIZES, WEIGHTS = (5, 3, 11), (0.1, 0.25, 0.4)


def stream(batches, batch_size=4, seed=2, weights=WEIGHTS):
    """The first rows, as (file, row of it) pairs."""
    rows = [weighted_rows_at(p, SIZES, batch_size, seed, weights) for p in range(batches)]
    firsts = np.cumsum([0, *SIZES])
    files = np.searchsorted(firsts, np.concatenate(rows), side="right") - 1
    return files, np.concatenate(rows) - firsts[files]


def test_files_take_turns_by_weight():
    """by hand: draws of weight 1/4 are due at 2, 6, 10, those of 3/4 at 2/3, 2, 10/3, 14/3, 6."""
    rows = np.concatenate([weighted_rows_at(p, (9, 9), 5, 0, (1, 3)) for p in range(2)])
    assert (rows >= 9).tolist() == [True, False, True, True, True, False, True, True, True, False]


def test_turns_are_those_of_sorting_every_draw():
    """oracle: all draws sorted by when they are due, wherever the batch begins."""
    shares = [Fraction(str(w)) / Fraction("0.75") for w in WEIGHTS]
    every = sorted(
        ((d + Fraction(1, 2)) / share, f) for f, share in enumerate(shares) for d in range(400)
    )
    files, _ = stream(100)
    assert files.tolist() == [f for _, f in every[:400]]


def test_shares_follow_weights_after_every_draw():
    """law: never further off than 1/2 + w F / 2, so a batch holds every file's share too."""
    files, _ = stream(100)
    shares = np.asarray(WEIGHTS) / sum(WEIGHTS)
    counts = np.cumsum(files[:, None] == np.arange(3), axis=0)
    off = np.abs(counts - shares * np.arange(1, 401)[:, None])
    assert (off <= 0.5 + shares * 1.5).all() and off.max() > 0.1


def test_files_are_visited_evenly():
    """law: a file's rows come once each before any comes again, in another order each time."""
    files, places = stream(150)
    orders = []
    for file, size in enumerate(SIZES):
        file_places = places[files == file]
        epochs = file_places[: len(file_places) // size * size].reshape(-1, size)
        assert len(epochs) > 5
        assert (np.sort(epochs, axis=1) == np.arange(size)).all()
        orders += [tuple(epoch) for epoch in epochs if size == 11]
    assert len(set(orders)) == len(orders)
    same = weighted_rows_at(0, (20, 20), 40, 0, (1, 1))
    assert (same[same < 20] != same[same >= 20] - 20).any()  # files have orders of their own


def test_weighted_rows_are_a_pure_function():
    """law: of the arguments alone; batches of another size cut the same stream."""
    forward = [weighted_rows_at(p, SIZES, 4, 2, WEIGHTS).tolist() for p in range(30)]
    backward = [weighted_rows_at(p, SIZES, 4, 2, WEIGHTS).tolist() for p in reversed(range(30))]
    assert forward == backward[::-1]
    assert weighted_rows_at(0, SIZES, 4, 2, WEIGHTS).dtype == np.int32
    for first, other in zip(stream(30, 4), stream(20, 6), strict=True):
        np.testing.assert_array_equal(first, other)
    # relative, and 0.1 is a third of 0.3: as binary fractions they would settle ties otherwise
    tenths, ones = (weighted_rows_at(0, (9, 9), 8, 0, w) for w in ((0.3, 0.1), (3, 1)))
    np.testing.assert_array_equal(tenths, ones)
    assert (stream(30)[1] != stream(30, seed=3)[1]).any()


@pytest.mark.parametrize(
    "arguments",
    [
        (-1, (3,), 1, 0, (1,)),
        (0, (3,), 1, -1, (1,)),
        (0, (3,), 0, 0, (1,)),
        (0, (0,), 1, 0, (1,)),
        (0, (3,), 1, 0, (0,)),
        (0, (3,), 1, 0, (float("nan"),)),
        (0, (3, 4), 1, 0, (1,)),
    ],
)
def test_weighted_arguments_outside_their_range(arguments):
    """law: each is named together with the allowed values."""
    with pytest.raises(ValueError, match="must be 0 or more, .* positive, one per size"):
        weighted_rows_at(*arguments)


def test_spread_begins_with_rows_of_every_file():
    """by hand: rows of 2 are at 1/4 and 3/4 of the way, those of 4 at 1/8, 3/8, 5/8, 7/8."""
    assert spread((2, 4)).tolist() == [2, 0, 3, 4, 1, 5]
    assert spread((5,)).tolist() == [0, 1, 2, 3, 4]


def test_hold_out_divides_a_set():
    """law: every row and its columns go to exactly one part; the same rows on every call."""
    rows = PromptSet(tuple("abcdefghij"), {"n": list(range(10))}, "x.jsonl")
    kept, held_out = hold_out(rows, 0.3)
    assert len(held_out.prompts) == 3 and sorted(kept.prompts + held_out.prompts) == list(
        "abcdefghij"
    )
    assert ["abcdefghij"[n] for n in held_out.columns["n"]] == list(held_out.prompts)
    assert hold_out(rows, 0.3) == (kept, held_out)
