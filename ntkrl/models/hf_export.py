"""Writing of Hugging Face directories: config.json, safetensors, and the files beside them.

Writing goes to a temporary directory that then replaces the target.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from ntkrl import trees
from ntkrl.models.family import Table
from ntkrl.models.hf_files import (
    CARD,
    MODEL_FILES,
    STEM,
    TOKENIZER_FILES,
    index_path,
    tensor_names,
)


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
            for path in [path for pattern in patterns for path in Path(source).glob(pattern)]:
                target = directory / path.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
        if self.card is not None:
            (directory / CARD).write_text(self.card, encoding="utf-8")


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
      directory: target; an existing model there is replaced.
      config: entries of config.json.
      tensors: stored name → array.
      companions: files to write beside them.
      shard_bytes: largest shard; several shards get an index.
      files: names of the config, and of the file of tensors without its ending.
    """
    if jax.process_index() != 0:
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    config_file, stem = files
    fresh = directory.with_name(directory.name + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    companions.write(fresh)
    (fresh / config_file).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    _write_tensors(fresh, tensors, shard_bytes, stem)
    old = directory.with_name(directory.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    fresh.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def _write_tensors(
    directory: Path, tensors: Mapping[str, np.ndarray], shard_bytes: int, stem: str
) -> None:
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, array in tensors.items():
        if shards[-1] and sum(a.nbytes for a in shards[-1].values()) + array.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = np.ascontiguousarray(array)
    metadata = {"format": "pt"}
    if len(shards) == 1:
        save_file(shards[0], directory / f"{stem}.safetensors", metadata)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata)
        weight_map.update(dict.fromkeys(shard, file))
    size = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    index_path(directory, stem).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
