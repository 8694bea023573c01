"""The choice of the mesh that completions are sampled on, and refusals."""

import jax
import pytest

from ntkrl import runtime
from ntkrl.rollout.rollout_mesh import DecodingWork, make_rollout_mesh

# read in 1 GB of waits at 16 MB each, see by_hand
LARGE = DecodingWork(heads=8, layers=31, weight_bytes=16e9, rows=32)


def shape(work, data=None, tensor=None, training=(1, 8, 1)):
    """Return the sizes of a rollout mesh over eight devices."""
    mesh = make_rollout_mesh({"data": data, "tensor": tensor}, runtime.make_mesh(*training), work)
    assert list(mesh.devices.flat) == jax.devices()
    assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.shape["fsdp"] == 1
    return mesh.shape["data"], mesh.shape["tensor"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # 16 GB whole; 2 + 1.02 in eight parts
        ({}, (1, 8)),
        # 1 GB whole; 0.5 + 1.02 in two parts
        ({"weight_bytes": 1e9}, (8, 1)),
        # 2.2 GB whole; 1.1 + 1.02 in two parts; 0.28 + 1.02 in eight
        ({"weight_bytes": 2.2e9, "heads": 2}, (4, 2)),
        ({"weight_bytes": 2.2e9}, (1, 8)),
        # neither four nor eight data parts divide 6 rows, and two or one need tensor parts
        ({"weight_bytes": 1e9, "rows": 6}, (1, 8)),
        ({"weight_bytes": 1e9, "rows": 6, "heads": 4}, (2, 4)),
        # nothing divides 3 rows and 2 heads: the heads alone
        ({"heads": 2, "rows": 3}, (4, 2)),
    ],
)
def test_the_default_reads_least(changes, expected):
    """by hand: weights over tensor parts, and 64 waits of 16 MB where there are several."""
    work = DecodingWork(**{**vars(LARGE), **changes})
    assert work.bytes_per_token(1) == work.weight_bytes
    assert work.bytes_per_token(2) == work.weight_bytes / 2 + 64 * 16e6
    assert shape(work) == expected
    assert shape(work, training=(2, 2, 2)) == expected


@pytest.mark.parametrize(
    ("data", "tensor", "expected"),
    [(2, 4, (2, 4)), (-1, 4, (2, 4)), (None, 2, (4, 2)), (4, None, (4, 2)), (8, -1, (8, 1))],
)
def test_sizes_of_the_config(data, tensor, expected):
    """by hand: one size leaves the other devices to the other axis."""
    assert shape(LARGE, data, tensor) == expected


@pytest.mark.parametrize(
    ("data", "tensor", "message"),
    [
        (3, None, "data = 3 does not divide the 8 devices; the nearest that fits is data=4"),
        (None, 3, "tensor = 3 does not divide the 8 devices; tensor = 3 does not divide the 4"),
        (4, 4, "data × tensor = 16 is not the 8 devices; the nearest that fits is data=2 tensor=4"),
        (1, 8, "tensor = 8 does not divide the 4 heads; the nearest that fits is data=2 tensor=4"),
        (8, 1, "data = 8 does not divide the 12 rows of a rollout; the nearest"),
        (
            5,
            3,
            "rollout.mesh.data=5 rollout.mesh.tensor=3: data × tensor = 15 is not the 8 devices; "
            "tensor = 3 does not divide the 4 heads; data = 5 does not divide the 12 rows of a "
            "rollout; the nearest that fits is data=2 tensor=4.",
        ),
    ],
)
def test_refusals(data, tensor, message):
    """by hand: everything that is not divided in one message, and the nearest sizes."""
    work = DecodingWork(heads=4, layers=2, weight_bytes=1e6, rows=12)
    with pytest.raises(ValueError) as error:
        shape(work, data, tensor)
    assert message in str(error.value)
    with pytest.raises(ValueError, match="no other sizes fit either, so leave both None"):
        shape(DecodingWork(heads=1, layers=2, weight_bytes=1e6, rows=3), data, tensor)
