"""Rotary positions (Su et al. 2104.09864), half-rotation form, with two context extensions."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from ntkrl.types import Array

SCALINGS = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Which dimensions of a head turn, and how fast.

    size: rotated dimensions of a head, even.
    theta: base of the geometric frequencies θ^(−2i/size).
    scaling: "default", "linear" (all frequencies divided by `factor`) or "llama3" (low ones
      divided, high ones kept, a linear ramp between; Llama 3.1).
    factor: how many times longer contexts become.
    low_frequency, high_frequency: waves per original context below which a frequency is divided,
      and above which it is kept ("llama3").
    original_length: tokens of the original context ("llama3").
    """

    size: int
    theta: float
    scaling: str = "default"
    factor: float = 1.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_length: int = 8192

    def frequencies(self) -> np.ndarray:
        """Return radians per position `[size / 2]`, float64."""
        plain = self.theta ** (-np.arange(0, self.size, 2) / self.size)
        if self.scaling == "default":
            return plain
        if self.scaling == "linear":
            return plain / self.factor
        waves = self.original_length * plain / (2 * math.pi)
        span = self.high_frequency - self.low_frequency
        kept = np.clip((waves - self.low_frequency) / span, 0.0, 1.0)
        return plain * (kept + (1 - kept) / self.factor)


def tables(positions: Array, rope: Rope) -> tuple[Array, Array]:
    """Return cos and sin `[B, T, size]` at integer positions `[B, T]`."""
    frequencies = jnp.asarray(rope.frequencies(), float)  # float64 under x64, else float32
    angles_BTF = jnp.einsum("bt,f->btf", positions.astype(frequencies.dtype), frequencies)
    angles_BTE = jnp.concatenate([angles_BTF, angles_BTF], axis=-1)
    return jnp.cos(angles_BTE), jnp.sin(angles_BTE)


def rotate(heads: Array, turns: tuple[Array, Array]) -> Array:
    """Rotate the first dimensions of each head, as many as the tables have; pass the rest.

    Args:
      heads: `[B, T, H, E]`.
      turns: cos and sin, each `[B, T, R]`, R ≤ E.
    """
    cos, sin = (table[:, :, None, :] for table in turns)
    size = cos.shape[-1]
    turned, kept = heads[..., :size], heads[..., size:]
    low, high = jnp.split(turned, 2, axis=-1)
    turned = turned * cos + jnp.concatenate([-high, low], axis=-1) * sin
    return jnp.concatenate([turned.astype(heads.dtype), kept], axis=-1)
