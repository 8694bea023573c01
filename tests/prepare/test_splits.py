"""Which rows go where, against the libraries whose choices are repeated."""

import datasets
import numpy as np
import pytest

from ntkrl.prepare.splits import select, split


@pytest.mark.parametrize(("size", "share"), [(2, 0.5), (40, 0.8), (101, 0.8), (77, 0.31)])
def test_splits_as_datasets_does(size, share):
    """oracle: train_test_split of `datasets` with the public code's arguments."""
    rows = datasets.Dataset.from_dict({"row": list(range(size))})
    expected = rows.train_test_split(test_size=1 - float(share), seed=1283)
    first, second = split(size, share, 1283)
    assert first.tolist() == expected["train"]["row"][:]
    assert second.tolist() == expected["test"]["row"][:]


def test_too_few_for_two_parts():
    """law: told, not an empty part."""
    with pytest.raises(ValueError, match="1 preferences cannot be divided"):
        split(1, 0.8, 0)


def test_selected_rows():
    """by hand: the start of a permutation; all in order where there are no more."""
    assert select(9, 3, 237).tolist() == np.random.RandomState(237).permutation(9)[:3].tolist()
    assert select(3, 3, 237).tolist() == [0, 1, 2]
