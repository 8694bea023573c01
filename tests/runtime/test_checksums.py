"""Checksums of arrays: of the bits and of their order, whatever the sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ntkrl import runtime
from ntkrl.runtime.checksums import _checksum, checksums

MASK = 2**32 - 1


def murmur(word):
    """MurmurHash3's finalizer, in Python's integers."""
    word = (word ^ (word >> 16)) * 0x85EBCA6B & MASK
    word = (word ^ (word >> 13)) * 0xC2B2AE35 & MASK
    return word ^ (word >> 16)


def lowbias(word):
    """lowbias32, in Python's integers."""
    word = (word ^ (word >> 16)) * 0x7FEB352D & MASK
    word = (word ^ (word >> 15)) * 0x846CA68B & MASK
    return word ^ (word >> 16)


def test_a_checksum_by_hand():
    """by hand: 1.0 is 0x3f800000, −0.0 is 0x80000000, bfloat16 1.0 is 0x3f80; rows of 3 take 3."""
    assert (murmur(1), lowbias(1)) == (0x514E28B7, 0x688990C0)  # as published
    tree = {
        "floats": jnp.array([[1.0, -0.0, 1.0], [0.0, 0.0, 1.0]]),
        "short": jnp.ones(2, jnp.bfloat16),
        "integers": jnp.array([-1, 2], jnp.int32),
        "flags": jnp.array([True, False]),
        "scalar": jnp.uint32(7),
        "bytes": jnp.array([[250, 3]], jnp.uint8),
    }
    words = {
        "floats": [0x3F800000, 0x80000000, 0x3F800000, 0, 0, 0x3F800000],
        "short": [0x3F80, 0x3F80],
        "integers": [MASK, 2],
        "flags": [1, 0],
        "scalar": [7],
        "bytes": [250, 3],
    }
    expected = {}
    for name, values in words.items():
        first = sum(murmur(word ^ murmur(i)) for i, word in enumerate(values)) & MASK
        second = sum(lowbias((word + lowbias(i)) & MASK) for i, word in enumerate(values)) & MASK
        expected[name] = f"{first:08x}{second:08x}"
    assert checksums(tree) == {name: expected[name] for name in sorted(expected)}


NOISE = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)


LARGE, SMALL = np.argmax(np.abs(NOISE)), np.argmin(np.abs(NOISE))


def flipped(bit, *places):
    """Flip a bit of some entries."""
    words = NOISE.view(np.uint32).copy()
    words.ravel()[list(places)] ^= np.uint32(1 << bit)
    return words.view(np.float32)


CHANGES = {
    "reversed": NOISE[::-1, ::-1],
    "rows exchanged": NOISE[[1, 0, *range(2, 64)]],
    "halves exchanged": np.roll(NOISE, 32, axis=0),
    "shifted": np.roll(NOISE.ravel(), 1).reshape(NOISE.shape),
    "transposed": np.ascontiguousarray(NOISE.T).reshape(NOISE.shape),
    "sorted": np.sort(NOISE.ravel()).reshape(NOISE.shape),
    "negated": -NOISE,  # the signs of an even number of words
    "a bit set here and cleared there": flipped(30, LARGE, SMALL),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_that_leave_the_sum_of_words(name):
    """law: order and places count; a sum of the words, used before, would be the same."""
    arrays = [np.ascontiguousarray(array) for array in (NOISE, CHANGES[name])]
    sums = [np.sum(array.view(np.uint32), dtype=np.uint32) for array in arrays]
    assert sums[0] == sums[1] and not np.array_equal(*arrays)
    before, after = (checksums([jnp.asarray(array)])["0"] for array in arrays)
    # both halves, each of 32 bits, notice it
    assert before[:8] != after[:8] and before[8:] != after[8:]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.bool_])
def test_any_sharding(dtype):
    """law: the same checksum on one device and on eight, whatever axis is sharded."""
    array = jnp.asarray(NOISE.reshape(8, 4, 12) * 9).astype(dtype)
    mesh = runtime.make_mesh(2, 2, 2)
    specs = [
        PartitionSpec(),
        PartitionSpec("data"),
        PartitionSpec(None, "fsdp", "tensor"),
        PartitionSpec(("data", "fsdp"), None, "tensor"),
        PartitionSpec("tensor", "data", "fsdp"),
    ]
    placed = [jax.device_put(array, NamedSharding(mesh, spec)) for spec in specs]
    assert {checksums([leaf])["0"] for leaf in placed} == {checksums([array])["0"]}


def test_no_two_single_bits_are_equal():
    """law: any bit of any of 300 words changes both halves of the checksum, each differently.

    9600 random 32-bit numbers have 0.01 equal pairs on average; the sum of words has 32 values.
    """
    bits = np.zeros((9600, 300), np.uint32)
    bits[np.arange(9600), np.arange(9600) // 32] = (
        np.uint32(1) << np.arange(9600, dtype=np.uint32) % 32
    )
    first, second = map(np.asarray, jax.vmap(_checksum)(jnp.asarray(bits)))
    assert len(set(first.tolist())) == len(set(second.tolist())) == 9600
