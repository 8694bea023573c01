"""GGUF files as Hugging Face directories, which the rest of the package reads.

A file is converted once, into the user's cache, under the digest of its content. The directory has
config.json, the dequantised tensors in float32, the tokenizer with its chat template, the tokens
that end a text, and a model card that names the file.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import filelock
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ntkrl import gguf, trees
from ntkrl.durable_files import save_text, user_cache
from ntkrl.messages import joined, quoted
from ntkrl.models import hf_export
from ntkrl.models.families import family_of
from ntkrl.models.family import Family
from ntkrl.models.gguf_families import IGNORED, Architecture, read_config
from ntkrl.models.policy import make_policy
from ntkrl.models.tensor_map import count_names, is_finite, tensor_names

FORMAT = 1
"""Version of the converted directories; a higher one converts again."""
SHARD_BYTES = 2**30
"""Size of the files written, one of which is in memory at a time."""
SPARE_BYTES = 64 * 2**20
"""Room for the tokenizer and the file system, beside the tensors."""
EXPERT_NUMBER = re.compile(r"\.experts\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A file and the model it holds.

    file: its header. family, config: of the model; raw: config.json.
    architecture: of the file.
    names: stored name → llama.cpp's name, and the expert's number or None.
    shapes: stored name → shape.
    """

    file: gguf.GgufFile
    family: Family
    raw: Mapping[str, Any]
    architecture: Architecture
    names: Mapping[str, tuple[str, int | None]]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def size(self) -> int:
        """Bytes of the tensors as float32."""
        return 4 * sum(math.prod(shape) for shape in self.shapes.values())


@dataclasses.dataclass(frozen=True)
class _LazyTensor:
    """A tensor that is read and dequantised when it is written.

    name: in the directory. done: called afterwards.
    """

    conversion: Conversion
    name: str
    done: Callable[[], object]

    @property
    def nbytes(self) -> int:
        return 4 * math.prod(self.conversion.shapes[self.name])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        conversion, (stored, index) = self.conversion, self.conversion.names[self.name]
        values = gguf.read_tensor(conversion.file, stored, index)
        if index is None:
            values = conversion.architecture.restored(stored, values, conversion.raw)
        values = np.ascontiguousarray(values)
        if not is_finite(values):
            raise ValueError(
                f"{conversion.file.path}: the tensor {stored} holds NaN or infinity; copy the file "
                "again from its source."
            )
        self.done()
        return values


def converted_directory(path: Path) -> Path:
    """Return the converted directory of a GGUF file, made at the first call.

    Two processes that ask for it at once get the same, made by the first of them.

    Raises:
      ValueError: the file is damaged, or its architecture, tensor types or entries are not
        supported; no room, or no package `gguf`.
    """
    if not path.exists():
        raise ValueError(f"model.path {str(path)!r} does not exist; give a GGUF file.")
    digest = _digest_of(path)
    directory = user_cache() / "gguf" / f"{digest[:24]}-{FORMAT}"
    if (directory / hf_export.MANIFEST).is_file():
        return directory
    conversion = plan_conversion(path)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(directory.parent / f".{directory.name}.lock"):
            if not (directory / hf_export.MANIFEST).is_file():
                _convert(conversion, directory, digest)
    except PermissionError as error:
        raise ValueError(
            f"{path} is converted into {directory}, which cannot be written ({error.strerror}); "
            "set XDG_CACHE_HOME to a directory of yours."
        ) from error
    return directory


def plan_conversion(path: Path) -> Conversion:
    """Read a file's header and match its tensors with the model that it describes.

    Raises:
      ValueError: as `converted_directory`, with all tensors that do not fit in one message.
    """
    file = gguf.read_header(path, gguf.block_sizes())
    architecture, raw = read_config(file)
    family = family_of(raw, path)
    config = family.read(raw, path)
    stacks = [tensor.shape[0] for tensor in file.tensors.values() if len(tensor.shape) == 3]
    matrices = len(file.tensors) + sum(stacks)
    _, shapes = make_policy(family, config, jnp.float32)
    leaves = {name: leaf.shape for name, leaf in trees.named_leaves(shapes).items()}
    places: dict[str, tuple[int, ...]] = {}
    for ours, name, flip in family.weights:
        if ours not in leaves:
            continue
        count = count_names(name, leaves[ours])
        if count > matrices:  # names of so many tensors might not fit into memory
            raise ValueError(
                f"{path} declares {count} tensors {name}, but holds {matrices}; copy it again."
            )
        stored = tensor_names(name, leaves[ours])
        inner = leaves[ours][stored.ndim :]
        places |= dict.fromkeys(stored.flat, inner[::-1] if flip else inner)
    names = _stored_names(file, config.num_hidden_layers, places)
    _check_tensors(file, architecture, names, places)
    raw = family.config_json(config, jnp.dtype(jnp.float32))
    return Conversion(file, family, raw, architecture, names, places)


def _stored_names(
    file: gguf.GgufFile, layers: int, places: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[str, int | None]]:
    """Return llama.cpp's names by ours, each with the number of its expert: those are stacked."""
    merged = {name: EXPERT_NUMBER.sub(".experts.", name) for name in places}
    table = gguf.tensor_names_of(file.entries["general.architecture"], layers, set(merged.values()))
    names = {}
    for name, short in merged.items():
        number = EXPERT_NUMBER.search(name)
        stored = table[short]
        index = None if number is None else int(number[1])
        names[name] = short if stored is None else stored, index
    return names


def _check_tensors(
    file: gguf.GgufFile,
    architecture: Architecture,
    names: Mapping[str, tuple[str, int | None]],
    places: Mapping[str, tuple[int, ...]],
) -> None:
    """Refuse tensors that are missing, misshapen or unknown, all of them in one message."""
    experts: dict[str, int] = {}
    for stored, index in names.values():
        if index is not None:
            experts[stored] = max(experts.get(stored, 0), index + 1)
    problems = []
    for name, (stored, _) in names.items():
        expected = places[name]
        expected = expected[::-1] if architecture.flips(stored) else expected
        expected = (experts[stored], *expected) if stored in experts else expected
        tensor = file.tensors.get(stored)
        if tensor is None:
            problems.append(f"{stored} is missing")
        elif tensor.shape != expected:
            problems.append(f"{stored} has shape {tensor.shape}, expected {expected}")
    known = {stored for stored, _ in names.values()}
    for stored in sorted(set(file.tensors) - known):
        copied = stored == "output.weight"  # of the embedding, as `read_config` has seen
        if not copied and not IGNORED.fullmatch(stored):
            problems.append(f"{stored} is not part of this architecture")
    if problems:
        raise ValueError(
            f"{file.path} does not hold the model of its metadata: {joined(problems)}."
        )


def _convert(conversion: Conversion, directory: Path, digest: str) -> None:
    """Write the directory.

    Raises:
      ValueError: no room for it, or tensors that are not finite.
    """
    path, free = conversion.file.path, shutil.disk_usage(directory.parent).free
    if free < conversion.size + SPARE_BYTES:
        raise ValueError(
            f"{path} takes {conversion.size / 1e6:.0f} MB in float32, and {directory.parent} has "
            f"{free / 1e6:.0f} MB; make room, or set XDG_CACHE_HOME to another disk."
        )
    _log(f"converting {path} into {directory} ({conversion.size / 1e6:.0f} MB, once)")
    with tempfile.TemporaryDirectory() as scratch:
        gguf.write_tokenizer(conversion.file, Path(scratch))
        _write_generation(conversion, Path(scratch))
        companions = hf_export.Companions(scratch, scratch, _card(conversion, digest))
        with tqdm(total=len(conversion.shapes), desc="tensors", disable=None, leave=False) as bar:
            tensors = {
                name: _LazyTensor(conversion, name, bar.update) for name in conversion.shapes
            }
            hf_export.write_files(directory, conversion.raw, tensors, companions, SHARD_BYTES)


def _write_generation(conversion: Conversion, directory: Path) -> None:
    ids: dict[str, Any] = dict(gguf.special_token_ids(conversion.file))
    ids.pop("unk_token_id", None)
    ends = gguf.end_tokens(conversion.file)
    if len(ends) > 1:
        ids["eos_token_id"] = ends
    text = json.dumps(ids, indent=2, sort_keys=True) + "\n"
    save_text(directory / "generation_config.json", text)


def _card(conversion: Conversion, digest: str) -> str:
    """Return README.md of the directory; texts of the file are quoted."""
    entries = conversion.file.entries
    license_name = entries.get("general.license")
    lines = []
    if isinstance(license_name, str):
        lines = ["---", f"license: {json.dumps(license_name[:80])}", "---", ""]
    counts: dict[str, int] = {}
    for tensor in conversion.file.tensors.values():
        kind = gguf.type_name(tensor.kind)
        counts[kind] = counts.get(kind, 0) + math.prod(tensor.shape)
    kinds = ", ".join(sorted(counts, key=lambda kind: -counts[kind]))
    name = entries.get("general.name")
    return "\n".join(
        [
            *lines,
            f"# {quoted(name) if isinstance(name, str) else 'Model'} from a GGUF file",
            "",
            f"Converted by ntkrl from `{conversion.file.path.name}` (SHA-256 `{digest}`), whose",
            f"tensors of type {kinds} are float32 here.",
            "",
        ]
    )


@functools.lru_cache(maxsize=64)
def _digest(path: Path, size: int, changed: int, inode: int) -> str:
    """Return the SHA-256 of a file; the other arguments differ once it has been replaced."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"model.path {str(path)!r} is not a regular file; give a GGUF file.")
    status = os.stat(path)
    try:
        return _digest(path.resolve(), status.st_size, status.st_mtime_ns, status.st_ino)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error


def _log(message: str) -> None:
    print(f"ntkrl: {message}", file=sys.stderr, flush=True)
