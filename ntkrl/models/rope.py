"""Rotary positions (Su et al. 2104.09864) and their extensions to longer contexts.

Arithmetic as in transformers' `modeling_rope_utils`; frequencies in float64.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from ntkrl.types import Array

SCALINGS = ("default", "linear", "llama3", "yarn", "longrope")
"""Supported `rope_type` values."""


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions in the half-rotation form.

    size: rotated dimensions of a head, even.
    theta: base of the geometric frequencies θ^(−2i/size).
    scaling: "default"; "linear", all frequencies divided by `factor`; "llama3" and "yarn", low ones
      divided, high ones unchanged, and a linear ramp between, over the frequencies (Llama 3.1) or
      over their index (Peng et al. 2309.00071); "longrope", each frequency divided by a factor
      (Ding et al. 2402.13753); "none", no rotation.
    factor: extension of the context length.
    low_frequency, high_frequency: waves per original context below which a frequency is divided,
      and above which it is unchanged ("llama3", "yarn").
    original_length: tokens of the original context ("llama3", "yarn", "longrope").
    truncate: round the ends of the ramp outwards to whole indices ("yarn").
    short_factors, long_factors: divisors of the frequencies for sequences of at most
      `original_length` tokens, and for longer ones ("longrope").
    attention_factor: on cos and sin.
    """

    size: int
    theta: float
    scaling: str = "default"
    factor: float = 1.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_length: int = 8192
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0

    @property
    def decode_limit(self) -> int | None:
        """Tokens up to which a cached key stays valid, or None without such a limit."""
        return self.original_length if self.scaling == "longrope" else None

    def frequencies(self, long: bool = False) -> np.ndarray:
        """Return radians per position `[size / 2]`, float64.

        Args:
          long: for sequences longer than `original_length` ("longrope").
        """
        plain = self.theta ** (-np.arange(0, self.size, 2) / self.size)
        if self.scaling == "default":
            return plain
        if self.scaling == "none":
            return np.zeros_like(plain)
        if self.scaling == "linear":
            return plain / self.factor
        if self.scaling == "longrope":
            return plain / np.asarray(self.long_factors if long else self.short_factors)
        share = self._yarn_share() if self.scaling == "yarn" else self._llama3_share(plain)
        return plain * (share + (1 - share) / self.factor)

    def _llama3_share(self, plain: np.ndarray) -> np.ndarray:
        """Return the unchanged share of each frequency."""
        waves = self.original_length * plain / (2 * math.pi)
        span = self.high_frequency - self.low_frequency
        return np.clip((waves - self.low_frequency) / span, 0.0, 1.0)

    def _yarn_share(self) -> np.ndarray:
        """Return the unchanged share of each frequency."""
        first, last = (
            self.size
            * math.log(self.original_length / (2 * math.pi * waves))
            / (2 * math.log(self.theta))
            for waves in (self.high_frequency, self.low_frequency)
        )
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, self.size - 1)
        if first == last:
            last += 0.001  # as the reference does
        return 1 - np.clip((np.arange(self.size // 2) - first) / (last - first), 0.0, 1.0)


def rotary_tables(position: Array, length: Array, rope: Rope) -> tuple[Array, Array]:
    """Return cos and sin `[B, T, size]`.

    Args:
      position: `[B, T]`, integer.
      length: `[B, T]` or `[B, 1]`, tokens of each token's sequence so far.
      rope: rotary positions.
    """
    frequencies = jnp.asarray(rope.frequencies(), float)  # float64 under x64, else float32
    if rope.scaling == "longrope":
        long = jnp.asarray(rope.frequencies(long=True), float)
        chosen = jnp.where((length > rope.original_length)[..., None], long, frequencies)
        angles_BTF = position[..., None].astype(frequencies.dtype) * chosen
    else:
        angles_BTF = jnp.einsum("bt,f->btf", position.astype(frequencies.dtype), frequencies)
    angles_BTE = jnp.concatenate([angles_BTF, angles_BTF], axis=-1)
    tables = jnp.cos(angles_BTE), jnp.sin(angles_BTE)
    if rope.attention_factor == 1.0:
        return tables
    return tables[0] * rope.attention_factor, tables[1] * rope.attention_factor


def rotate(heads: Array, tables: tuple[Array, Array]) -> Array:
    """Rotate the first R dimensions of each head and leave the others unchanged.

    Args:
      heads: `[B, T, H, E]`.
      tables: cos and sin, each `[B, T, R]`, R ≤ E.
    """
    cos, sin = (jnp.split(table[:, :, None, :], 2, axis=-1) for table in tables)
    half = cos[0].shape[-1]
    # split and one concatenation: slices would be padded and added in the backward pass
    low, high, others = jnp.split(heads, (half, 2 * half), axis=-1)
    rotated = (low * cos[0] - high * sin[0], high * cos[1] + low * sin[1])
    return jnp.concatenate([*(part.astype(heads.dtype) for part in rotated), others], axis=-1)
