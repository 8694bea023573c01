"""Checksums of sharded arrays, computed where they are placed.

Every word of an array is mixed with its position, twice and differently, and the results are added
modulo 2³². Addition makes the checksum independent of the sharding; the positions make it depend on
the order of the words. A change that does not know the mixers goes unnoticed once in 2⁶⁴.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ntkrl import trees
from ntkrl.runtime.mesh import fetch
from ntkrl.types import Array

UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
Mixer = tuple[int, int, int, int, int]
MIXERS: tuple[Mixer, Mixer] = (
    (16, 0x85EBCA6B, 13, 0xC2B2AE35, 16),  # MurmurHash3's finalizer, by A. Appleby
    (16, 0x7FEB352D, 15, 0x846CA68B, 16),  # lowbias32, by C. Wellons
)
"""Bijections of 32-bit words: xor with a right shift, multiply, xor, multiply, xor."""


def checksums(tree: Any) -> dict[str, str]:
    """Return 16 hexadecimal digits by array; the same for every sharding of it."""
    sums = fetch(_checksums(jax.tree.leaves(tree)))
    texts = [f"{int(first):08x}{int(second):08x}" for first, second in sums]
    return dict(zip(trees.names(tree), texts, strict=True))


@jax.jit
def _checksums(leaves: list[Array]) -> list[tuple[Array, Array]]:
    return [_checksum(_words(leaf)) for leaf in leaves]


def _checksum(words: Array) -> tuple[Array, Array]:
    positions, (first, second) = _positions(words.shape), MIXERS
    mixed = (
        _mix(words ^ _mix(positions, first), first),
        _mix(words + _mix(positions, second), second),
    )
    # one reduction of both: on CPUs ten times as fast as two sums
    zero = jnp.uint32(0)
    return jax.lax.reduce(mixed, (zero, zero), _add, tuple(range(words.ndim)))


def _add(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
    return left[0] + right[0], left[1] + right[1]


def _words(leaf: Array) -> Array:
    """Return the bits of an array as unsigned words; those of 8 bytes as two, on a last axis."""
    if leaf.dtype != bool:
        leaf = jax.lax.bitcast_convert_type(leaf, UNSIGNED[leaf.dtype.itemsize])
    return leaf.astype(jnp.uint32)


def _positions(shape: tuple[int, ...]) -> Array:
    """Return a number per entry, all different below 2³² of them.

    The flat index in an array whose sizes are rounded up to odd ones: odd strides are never 0
    modulo 2³², so that exchanged rows or layers of larger arrays differ too.
    """
    positions, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        positions += index * jnp.uint32(stride % 2**32)
        stride *= shape[axis] | 1
    return positions


def _mix(words: Array, mixer: Mixer) -> Array:
    first_shift, first_factor, second_shift, second_factor, third_shift = mixer
    words = (words ^ (words >> first_shift)) * jnp.uint32(first_factor)
    words = (words ^ (words >> second_shift)) * jnp.uint32(second_factor)
    return words ^ (words >> third_shift)
