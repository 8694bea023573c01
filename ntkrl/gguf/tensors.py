"""Tensors of GGUF files as float32, by the package `gguf`, which is an extra of this package."""

import functools
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from ntkrl.gguf.header import GgufFile

COMPARED_BYTES = 2**24  # at a time


def library() -> Any:
    """Return the package `gguf`.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import gguf  # an extra
    except ImportError as error:
        raise ValueError(
            "reading a GGUF file needs the package gguf: pip install 'ntkrl[gguf]'."
        ) from error
    return gguf


@functools.cache
def block_sizes() -> dict[int, tuple[int, int]]:
    """Return numbers and bytes of a block of every tensor type that can be dequantised."""
    gguf = library()
    sizes = {}
    for kind, (numbers, size) in gguf.GGML_QUANT_SIZES.items():
        try:
            with np.errstate(all="ignore"):
                gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            continue
        sizes[int(kind)] = (numbers, size)
    return sizes


def type_name(kind: int) -> str:
    """Return the name of a tensor type, such as Q4_K."""
    return library().GGMLQuantizationType(kind).name


def read_tensor(file: GgufFile, name: str, index: int | None = None) -> np.ndarray:
    """Return a tensor, or a matrix of a stacked tensor, as float32.

    Args:
      file: from `read_header`.
      name: of the tensor.
      index: of the first dimension; None for all.

    Raises:
      ValueError: the file has become shorter.
    """
    gguf, tensor = library(), file.tensors[name]
    kind = gguf.GGMLQuantizationType(tensor.kind)
    shape = tensor.shape if index is None else tensor.shape[1:]
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    columns = shape[-1] // numbers * size
    length = math.prod(shape[:-1]) * columns
    start = tensor.start + (0 if index is None else index * length)
    raw = _read(file, start, length)
    with np.errstate(all="ignore"):  # NaN and infinity are for the caller to refuse
        values = gguf.dequantize(raw.reshape(*shape[:-1], columns), kind)
    return np.asarray(values, np.float32).reshape(shape)


def same_bytes(file: GgufFile, first: str, second: str) -> bool:
    """Return whether two tensors have the same shape, type and bytes."""
    left, right = file.tensors[first], file.tensors[second]
    if (left.shape, left.kind) != (right.shape, right.kind):
        return False
    numbers, size = block_sizes()[left.kind]
    length = math.prod(left.shape) // numbers * size
    starts = range(0, length, COMPARED_BYTES)
    parts = [(start, min(COMPARED_BYTES, length - start)) for start in starts]
    return all(
        np.array_equal(
            _read(file, left.start + start, count), _read(file, right.start + start, count)
        )
        for start, count in parts
    )


def tensor_names_of(
    architecture: str, layers: int, names: Collection[str]
) -> Mapping[str, str | None]:
    """Return llama.cpp's names of tensors by Hugging Face's; None for unknown ones.

    Args:
      architecture: `general.architecture` of a file.
      layers: number of layers.
      names: with their ".weight" or ".bias".
    """
    gguf = library()
    (number,) = [key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    table = gguf.get_tensor_name_map(number, layers)
    return {name: table.get_name(name, (".weight", ".bias")) for name in names}


def _read(file: GgufFile, start: int, length: int) -> np.ndarray:
    raw = np.fromfile(file.path, np.uint8, length, offset=start)
    if raw.size != length:
        raise ValueError(f"{file.path} has become shorter while it was read; copy it again.")
    return raw
