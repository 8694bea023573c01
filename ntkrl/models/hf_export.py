"""Writing of Hugging Face directories: config.json, safetensors, and the files beside them.

A directory is written beside its place and then exchanged for what is there. Only a directory that
is empty, or that holds an earlier export and nothing else, is replaced: an export lists its files
with their checksums, and so any other file or later change is seen.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from ntkrl import trees
from ntkrl.durable_files import replacing_directory
from ntkrl.json_files import read_object
from ntkrl.messages import MAX_PROBLEMS
from ntkrl.models.family import Table
from ntkrl.models.hf_files import CARD, MODEL_FILES, STEM, TOKENIZER_FILES, index_path
from ntkrl.models.tensor_map import tensor_names

MANIFEST = ".ntkrl-export.json"
"""File of every export: file name → SHA-256."""


def gather_tensors(table: Table, leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Gather a model's leaves to the host under their stored names, tensor by tensor.

    All processes must call it; process 0 alone gets tensors, the others an empty dict.
    """
    tensors: dict[str, np.ndarray] = {}
    for ours, stored, transpose in table:
        if ours not in leaves:
            continue
        array = trees.gather_to_host(leaves[ours])
        if jax.process_index() != 0:
            continue
        for numbers, name in np.ndenumerate(tensor_names(stored, array.shape)):
            tensors[name] = array[numbers].T if transpose else array[numbers]
    return tensors


@dataclasses.dataclass(frozen=True)
class Companions:
    """Files to write beside a model.

    tokenizer: directory of tokenizer files to copy, or None.
    model: directory of the model it was trained from, whose generation settings and license are
      copied, or None.
    card: text of README.md, or None.
    """

    tokenizer: str | None = None
    model: str | None = None
    card: str | None = None

    def write(self, directory: Path) -> None:
        """Copy and write them."""
        for source, patterns in ((self.model, MODEL_FILES), (self.tokenizer, TOKENIZER_FILES)):
            if source is None:
                continue
            paths = [path for pattern in patterns for path in Path(source).glob(pattern)]
            for path in paths:
                if not path.is_file():  # neither a pipe nor a folder is copied
                    continue
                target = directory / path.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
        if self.card is not None:
            (directory / CARD).write_text(self.card, encoding="utf-8")


def check_target(directory: Path, sources: Sequence[str | Path | None]) -> None:
    """Refuse to export to a directory whose files would be lost.

    Args:
      directory: to be written.
      sources: directories that the export is made from; None for none.

    Raises:
      ValueError: a symbolic link, or a file; a directory with other files than those of an earlier
        export, or with such files that were changed; one of the sources, or around one.
    """
    fix = "give a directory that does not exist, that is empty, or that holds an earlier export"
    if directory.is_symlink():
        raise ValueError(f"export: {directory} is a symbolic link; {fix}.")
    target = directory.resolve()
    for source in sources:
        base = None if source is None else Path(source).resolve()
        if base is not None and (target == base or target in base.parents):
            raise ValueError(
                f"export: {directory} is or holds {source}, which the model was read from; {fix}."
            )
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ValueError(f"export: {directory} is not a directory; {fix}.")
    strangers = list(itertools.islice(_strangers(directory), MAX_PROBLEMS + 1))
    if strangers:
        more = ", …" if len(strangers) > MAX_PROBLEMS else ""
        raise ValueError(
            f"export: {directory} holds files that no export wrote, or that were changed since: "
            f"{', '.join(strangers[:MAX_PROBLEMS])}{more}; move them, or {fix}."
        )


def write_model(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    companions: Companions,
    shard_bytes: int = 5 * 2**30,
    files: tuple[str, str] = ("config.json", STEM),
) -> None:
    """Write a model directory atomically, in process 0.

    Args:
      directory: target; an earlier export there is replaced.
      config, tensors, companions, shard_bytes, files: as for `write_files`.

    Raises:
      ValueError: as `check_target`.
    """
    if jax.process_index() != 0:
        return
    write_files(directory, config, tensors, companions, shard_bytes, files)


def write_files(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    companions: Companions,
    shard_bytes: int = 5 * 2**30,
    files: tuple[str, str] = ("config.json", STEM),
) -> None:
    """Write a model directory atomically.

    Args:
      directory: target; an earlier export there is replaced.
      config: entries of config.json.
      tensors: stored name → array, or an object with `nbytes` and `__array__`, which is read when
        its shard is written.
      companions: files to write beside them.
      shard_bytes: largest shard; several shards get an index.
      files: names of the config, and of the file of tensors without its ending.

    Raises:
      ValueError: as `check_target`.
    """
    check_target(directory, (companions.tokenizer, companions.model))
    config_file, stem = files
    with replacing_directory(directory) as fresh:
        companions.write(fresh)
        (fresh / config_file).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        _write_tensors(fresh, tensors, shard_bytes, stem)
        digests = {name: _digest(fresh / name) for name in _names(fresh)}
        (fresh / MANIFEST).write_text(json.dumps(digests, indent=2) + "\n")


def _write_tensors(
    directory: Path, tensors: Mapping[str, Any], shard_bytes: int, stem: str
) -> None:
    shards: list[dict[str, Any]] = [{}]
    for name, array in tensors.items():
        if shards[-1] and sum(a.nbytes for a in shards[-1].values()) + array.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = array
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        part = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
        file = f"{stem}{part}.safetensors"
        arrays = {name: np.ascontiguousarray(array) for name, array in shard.items()}
        save_file(arrays, directory / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    if len(shards) == 1:
        return
    size = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    index_path(directory, stem).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _strangers(directory: Path) -> Iterator[str]:
    """Yield the files and folders of a directory that are not those of an export to the byte."""
    digests: dict[str, Any] = {}
    if (directory / MANIFEST).is_file():
        with contextlib.suppress(ValueError):  # then all files are strangers
            digests = read_object(directory / MANIFEST)
    for name in _names(directory):
        path = directory / name
        if path.is_symlink() or not path.is_file():
            yield name
        elif not (digests and name == MANIFEST) and digests.get(name) != _digest(path):
            yield name


def _names(directory: Path) -> Iterator[str]:
    """Yield the names of all files, links and empty folders below a directory, sorted."""
    for parent, folders, files in os.walk(directory):
        folders.sort()
        path = Path(parent).relative_to(directory)
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        if not files and not folders and path != Path("."):
            yield path.as_posix()
        yield from ((path / name).as_posix() for name in sorted([*files, *links]))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
