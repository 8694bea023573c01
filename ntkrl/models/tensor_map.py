"""Locations of a model's params in its safetensors files, and reading of their blocks."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

from ntkrl.messages import joined

LAYER, EXPERT = "{i}", "{e}"  # placeholders of numbers in names of stacked tensors
ALIGNMENT = 64  # bytes, for XLA to adopt host memory without a copy
CHECKED = 2**17  # numbers checked at a time, which fit into a core's cache
MOST_NAMED = 10  # tensors, in a message
# bits of the exponent, all set in NaN and infinity alone; NumPy's own check of these is slow
EXPONENTS = {np.dtype(ml_dtypes.bfloat16): 0x7F80, np.dtype(np.float16): 0x7C00}


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """Locations of the params of a model.

    located: stored name → file and the name in it.
    rows: our name → stored name with placeholders, and if it is transposed.
    groups: our name → stored names, by layer and expert (`tensor_names`).
    not_finite: stored names of the tensors that `read` saw NaN or infinity in.
    """

    located: Mapping[str, tuple[Path, str]]
    rows: Mapping[str, tuple[str, bool]]
    groups: Mapping[str, np.ndarray]
    not_finite: set[str] = dataclasses.field(default_factory=set)

    def read(self, ours: str, ends: Sequence[tuple[int, int]], dtype: Any) -> np.ndarray:
        """Read one block of a leaf, tensor by tensor.

        Args:
          ours: name of the leaf.
          ends: first and one past the last index of each dimension, stack axis included.
          dtype: of the result.

        Returns:
          The block, aligned so that a CPU device adopts it without a copy.
        """
        block = _aligned(tuple(last - first for first, last in ends), dtype)
        flip, depth = self.rows[ours][1], self.groups[ours].ndim
        index: list[Any] = [slice(*pair) for pair in ends]
        inner = tuple(index[depth:])
        for numbers, stored in np.ndenumerate(self.groups[ours][(*index[:depth], ...)]):
            part, (path, key) = block[numbers], self.located[stored]
            # opened per tensor: mapped pages of an open file count as resident memory
            with safe_open(path, framework="numpy") as file:
                view = file.get_slice(key)
                with np.errstate(over="ignore"):  # float64 beyond float32 is infinite, and reported
                    part[...] = view[inner[::-1]].T if flip else view[inner]
            if not is_finite(part):
                self.not_finite.add(stored)
        return block

    def check_finite(self) -> None:
        """Refuse tensors in whose blocks `read` saw NaN or infinity.

        Raises:
          ValueError: names the tensors by file.
        """
        files: dict[Path, list[str]] = {}
        for name in sorted(self.not_finite):
            path, key = self.located[name]
            files.setdefault(path, []).append(key)
        if files:
            names = "; ".join(f"{path}: {_listed(keys)}" for path, keys in files.items())
            raise ValueError(
                f"{names}: these weights hold NaN or infinity in the dtype they are read in; train "
                "or copy the model again."
            )


def is_finite(array: np.ndarray) -> bool:
    """Return whether a contiguous array holds no NaN and no infinity, without a copy of it."""
    flat, exponent = array.reshape(-1), EXPONENTS.get(array.dtype)
    if exponent is not None:
        flat = flat.view(np.uint16)
    for start in range(0, flat.size, CHECKED):
        part = flat[start : start + CHECKED]
        if exponent is None:
            if not np.isfinite(part).all():
                return False
        elif ((part & exponent) == exponent).any():
            return False
    return True


def _listed(names: Iterable[str]) -> str:
    return joined(names, ", ", MOST_NAMED)


def tensor_names(name: str, shape: Sequence[int]) -> np.ndarray:
    """Return the stored names of a leaf, by layer and expert where it is stacked.

    Args:
      name: stored name with its placeholders.
      shape: of the leaf, stack axes first.
    """
    marks = [mark for mark in (LAYER, EXPERT) if mark in name]
    names = np.empty(shape[: len(marks)], object)
    for numbers in np.ndindex(names.shape):
        filled = name
        for mark, number in zip(marks, numbers, strict=True):
            filled = filled.replace(mark, str(number))
        names[numbers] = filled
    return names


def count_names(name: str, shape: Sequence[int]) -> int:
    """Return the size of `tensor_names` without making it."""
    return math.prod(shape[: sum(mark in name for mark in (LAYER, EXPERT))])


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
