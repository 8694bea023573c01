"""Headers of GGUF files: metadata and the table of tensors.

Source: the GGUF specification, versions 2 and 3, little-endian:

    "GGUF" · version u32 · tensors u64 · entries u64 · entries (key, type u32, value) ·
    tensors (name, dimensions u32, sizes u64 …, type u32, offset u64) · padding · data

Strings and arrays start with their length, u64. `gguf.GGUFReader` trusts these lengths.
"""

import dataclasses
import math
import mmap
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ntkrl.json_files import check_regular
from ntkrl.messages import quoted

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 32 * 2**20
"""A vocabulary of 262 144 tokens with its merges takes 10 MB."""
MAX_DIMENSIONS = 4
ALIGNMENT = 32  # bytes; the default of general.alignment
STRING, ARRAY = 8, 9
SCALARS = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"},
    **{10: "<u8", 11: "<i8", 12: "<f8"},
}
"""NumPy dtypes of the value types of fixed size."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Location of a tensor.

    shape: rows first, as NumPy's. kind: number of its type. start: byte in the file.
    """

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """A file's header.

    entries: metadata by key: numbers, booleans, strings, lists of strings, arrays of numbers.
    tensors: by name.
    """

    path: Path
    entries: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def is_gguf(path: Path) -> bool:
    """Return whether a path names a GGUF file, by its ending or its first bytes."""
    if path.is_dir():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):  # unreadable, or no path
        return False


def read_header(path: Path, sizes: Mapping[int, tuple[int, int]]) -> GgufFile:
    """Read the header of a file and check that it holds all its tensors.

    Args:
      path: of the file.
      sizes: numbers and bytes of a block, by the number of the tensor type; others are refused.

    Raises:
      ValueError: no such file, or damaged; a version, byte order or tensor type that is not
        supported; a part of several files.
    """
    try:
        check_regular(path, sys.maxsize)
        with path.open("rb") as file:
            start = file.read(24)
            _check_start(path, start)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _HeaderReader(path, content, sizes).read()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error


def _check_start(path: Path, start: bytes) -> None:
    if not start.startswith(MAGIC):
        raise ValueError(
            f"{path} is not a GGUF file: it starts with {quoted(start[:4])}, not {MAGIC!r}; copy "
            "it again from its source."
        )
    if len(start) < 24:
        raise ValueError(f"{path} has {len(start)} bytes and is cut short; copy it again.")
    (version,) = struct.unpack_from("<I", start, 4)
    if version & 0xFFFF == 0:
        raise ValueError(f"{path} is a big-endian GGUF file, which is not supported.")
    if version not in VERSIONS:
        raise ValueError(
            f"{path} has GGUF version {version}; supported are {VERSIONS[0]} and {VERSIONS[1]}. "
            "Convert the model again with a current llama.cpp."
        )


class _HeaderReader:
    """Reads a header from a mapped file; `at` is the next byte."""

    def __init__(self, path: Path, content: mmap.mmap, sizes: Mapping[int, tuple[int, int]]):
        self.path, self.content, self.sizes = path, content, sizes
        self.size, self.at = len(content), 8

    def read(self) -> GgufFile:
        """Return the header.

        Raises:
          ValueError: as `read_header`.
        """
        tensors, entries = self._unpack("<QQ", 16)
        self._check_count("tensors", tensors, 24)
        self._check_count("metadata entries", entries, 13)
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._string("a key")
            if key in metadata:
                raise ValueError(f"{self.path}: the entry {quoted(key)} occurs twice.")
            (kind,) = self._unpack("<I", 4)
            metadata[key] = self._value(key, kind)
        parts = metadata.get("split.count", 1)
        if parts not in (0, 1):
            raise ValueError(
                f"{self.path} is one of {parts} parts; join them with llama.cpp's "
                "`llama-gguf-split --merge`."
            )
        table = [self._tensor() for _ in range(tensors)]
        return GgufFile(self.path, metadata, self._located(table, metadata))

    def _located(
        self, table: list[tuple[str, tuple[int, ...], int, int]], metadata: Mapping[str, Any]
    ) -> dict[str, StoredTensor]:
        """Return the tensors by name, each inside the file."""
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= 2**20:
            raise ValueError(f"{self.path}: general.alignment is {quoted(alignment)}, not a size.")
        data = -(-self.at // alignment) * alignment
        located: dict[str, StoredTensor] = {}
        total = 0
        for name, shape, kind, offset in table:
            label = f"{self.path}: the tensor {quoted(name)}"
            if name in located:
                raise ValueError(f"{label} occurs twice.")
            if kind not in self.sizes:
                raise ValueError(f"{label} has type number {kind}, which is not supported.")
            numbers, size = self.sizes[kind]
            if shape[-1] % numbers:
                raise ValueError(f"{label} has rows of {shape[-1]}, not whole blocks of {numbers}.")
            length = math.prod(shape) // numbers * size
            total += length
            if offset % alignment or data + offset + length > self.size:
                raise ValueError(
                    f"{label} of shape {shape} needs bytes {data + offset} to "
                    f"{data + offset + length} of a file of {self.size} bytes; the file is "
                    "damaged or cut short, copy it again."
                )
            located[name] = StoredTensor(shape, kind, data + offset)
        if total > self.size:
            raise ValueError(f"{self.path}: its tensors overlap; copy it again.")
        return located

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Return name, shape, type and offset of the next tensor."""
        name = self._string("the name of a tensor")
        (rank,) = self._unpack("<I", 4)
        if not 1 <= rank <= MAX_DIMENSIONS:
            raise ValueError(
                f"{self.path}: the tensor {quoted(name)} has {rank} dimensions; expected 1 to "
                f"{MAX_DIMENSIONS}."
            )
        shape = self._unpack(f"<{rank}Q", 8 * rank)[::-1]  # stored columns first
        if 0 in shape:
            raise ValueError(f"{self.path}: the tensor {quoted(name)} is empty, {shape}.")
        kind, offset = self._unpack("<IQ", 12)
        return name, shape, kind, offset

    def _value(self, key: str, kind: int) -> Any:
        if kind in SCALARS:
            number = self._numbers(SCALARS[kind], 1)[0]
            # the shortest text of a float32 is the number that was written: 1e-05
            value = float(str(number)) if SCALARS[kind] == "<f4" else number.item()
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{self.path}: {quoted(key)} is {value}, not a finite number.")
            return value
        if kind == STRING:
            return self._string(quoted(key))
        if kind != ARRAY:
            raise ValueError(f"{self.path}: {quoted(key)} has value type {kind}, which is unknown.")
        element, count = self._unpack("<IQ", 12)
        if element in SCALARS:
            self._check_count(quoted(key), count, np.dtype(SCALARS[element]).itemsize)
            return self._numbers(SCALARS[element], count)
        if element != STRING:
            raise ValueError(f"{self.path}: {quoted(key)} is an array of type {element}.")
        self._check_count(quoted(key), count, 8)
        return [self._string(quoted(key)) for _ in range(count)]

    def _numbers(self, dtype: str, count: int) -> np.ndarray:
        size = np.dtype(dtype).itemsize * count
        return np.frombuffer(self._take(size), dtype)

    def _string(self, label: str) -> str:
        (length,) = self._unpack("<Q", 8)
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: {label} is not UTF-8 text.") from error

    def _unpack(self, form: str, size: int) -> tuple[Any, ...]:
        return struct.unpack(form, self._take(size))

    def _take(self, size: int) -> bytes:
        """Return the next bytes."""
        self._check_count("bytes of its header", size, 1)
        self.at += size
        return self.content[self.at - size : self.at]

    def _check_count(self, label: str, count: int, size: int) -> None:
        """Refuse a count whose items of `size` bytes exceed the rest of the file or of a header."""
        rest = min(self.size, MAX_HEADER_BYTES) - self.at
        if count * size > rest:
            what = "damaged or cut short" if self.size <= MAX_HEADER_BYTES else "damaged"
            raise ValueError(
                f"{self.path} declares {count} {label} at byte {self.at}, more than the {rest} "
                f"bytes that can follow; the file is {what}, copy it again."
            )
