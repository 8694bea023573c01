"""Reading of Hugging Face directories: config.json and safetensors; hub names fetched.

Nothing executable is read. Every missing, misshapen or unknown tensor is in one error.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ntkrl.models.family import Family

STEM = "model"  # of file names of tensors
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FLOAT_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# files of a model besides config.json and its tensors
TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer.model*",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
MODEL_FILES = ("generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
CARD = "README.md"  # the model card
LAYER, EXPERT = "{i}", "{e}"  # placeholders of numbers in names of stacked tensors
ALIGNMENT = 64  # bytes, for XLA to adopt host memory without a copy
ROWS_COMPARED = 4096  # at a time, of two tables
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def local_directory(path: str | Path) -> Path:
    """Return a directory as it is, or the local copy of a model on the Hugging Face hub.

    Args:
      path: a directory, or a hub name such as `EleutherAI/pythia-160m`. `huggingface_hub` caches
        downloads; HF_HUB_OFFLINE=1 disables the network.

    Raises:
      ValueError: a name that is not a directory and could not be fetched.
    """
    directory = Path(path)
    if directory.exists() or not HUB_NAME.fullmatch(str(path)):
        return directory
    import huggingface_hub  # slow to import, and seldom needed

    patterns = [
        "config.json",
        "*.safetensors",
        "*.safetensors.index.json",
        CARD,
        *TOKENIZER_FILES,
        *MODEL_FILES,
    ]
    try:
        return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=patterns))
    except (OSError, ValueError, RuntimeError) as error:
        # raised for offline mode, lost connections, unknown and gated names
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"model.path {str(path)!r} is not a local directory, and could not be fetched from the "
            f"Hugging Face hub ({type(error).__name__}: {reason}). Give a model directory "
            "(config.json, *.safetensors, tokenizer files), or fetch it where there is a network."
        ) from error


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
      ValueError: invalid JSON; the message names the file and the position.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); write the model again.") from error


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json of a model directory.

    Raises:
      ValueError: no such directory, no config.json, or not a JSON object.
    """
    if not directory.is_dir():
        raise ValueError(
            f"model.path {str(directory)!r} is not a directory; give a Hugging Face model "
            "directory (config.json, *.safetensors, tokenizer files)."
        )
    path = directory / "config.json"
    if not path.is_file():
        names = ", ".join(sorted(entry.name for entry in directory.iterdir())) or "nothing"
        raise ValueError(f"{directory} has no config.json; it holds {names}.")
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(raw).__name__}.")
    return raw


def generation_end_ids(directory: str | Path) -> tuple[int, ...]:
    """Return the tokens that end a text in transformers' `generate`.

    Args:
      directory: of a model: its generation_config.json, or without one its config.json.

    Raises:
      ValueError: entries that are not token ids.
    """
    path = Path(directory) / "generation_config.json"
    raw = read_json(path) if path.is_file() else read_config(Path(directory))
    value = raw.get("eos_token_id") if isinstance(raw, dict) else raw
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(each, bool) or not isinstance(each, int) or each < 0 for each in ids):
        raise ValueError(
            f"{path if path.is_file() else path.with_name('config.json')}: eos_token_id must be a "
            f"token id or a list of them, not {value!r:.60}."
        )
    return tuple(ids)


def tensor_files(directory: Path, stem: str = STEM) -> dict[str, Path]:
    """Map each stored tensor's name to its file, from one file or from the index.

    Args:
      directory: of the model.
      stem: file name without its ending.

    Raises:
      ValueError: no safetensors (pickle-only directories are refused), missing shards, or
        tensors that are in the index and in no file.
    """
    index, single = index_path(directory, stem), directory / f"{stem}.safetensors"
    if single.is_file():  # as transformers does, whatever an index beside it says
        return {name: single for name in stored_names(single)}
    if index.is_file():
        raw = read_json(index)
        if not isinstance(raw, dict) or not isinstance(raw.get("weight_map"), dict):
            raise ValueError(f"{index} has no weight_map object; write the model again.")
        return _indexed_files(index, raw["weight_map"])
    pickles = sorted(e.name for e in directory.iterdir() if e.suffix in PICKLES)
    if pickles:
        raise ValueError(
            f"{directory} holds only pickle checkpoints ({', '.join(pickles)}), which can run code "
            "when read and are refused. Save it with transformers' "
            "model.save_pretrained(path, safe_serialization=True)."
        )
    raise ValueError(f"{directory} holds neither {single.name} nor {index.name}.")


def index_path(directory: Path, stem: str) -> Path:
    """Return the path of the index of a model in several files."""
    return directory / f"{stem}.safetensors.index.json"


def stored_names(path: Path) -> list[str]:
    """Return the tensor names of one safetensors file."""
    try:
        with safe_open(path, framework="numpy") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}); copy or write it again."
        ) from error


def check_tensors(
    directory: Path,
    family: Family,
    shapes: Mapping[str, tuple[int, ...]],
    tied: bool,
    stem: str = STEM,
) -> TensorMap:
    """Match the stored tensors with the params, reading headers only.

    Args:
      directory: of the model.
      family: with the table of tensor names.
      shapes: our name → expected shape, stack axis included.
      tied: ignore a stored head, as a copy of the embedding.
      stem: file name of tensors without its ending.

    Raises:
      ValueError: names, shapes or dtypes that do not fit, all of them in one message.
    """
    located = _with_prefix(tensor_files(directory, stem), family)
    rows = {ours: (name, flip) for ours, name, flip in family.weights if ours in shapes}
    groups = {ours: tensor_names(name, shapes[ours]) for ours, (name, _) in rows.items()}
    known = {name for group in groups.values() for name in group.flat}
    problems = [f"{name} is missing" for name in sorted(known - set(located))]
    ignored = [*family.ignored, *([re.escape(family.head_name)] if tied else [])]
    patterns = [re.compile(pattern) for pattern in ignored]
    for name in sorted(set(located) - known):
        if not any(pattern.fullmatch(name) for pattern in patterns):
            problems.append(f"{name} is not part of this architecture")
    paths = {path for path, _ in located.values()}
    headers = {path: safe_open(path, framework="numpy") for path in paths}
    for ours, (_, flip) in rows.items():
        shape = shapes[ours][groups[ours].ndim :]
        for stored in groups[ours].flat:
            if stored in located:
                path, key = located[stored]
                problems += _mismatches(stored, headers[path].get_slice(key), shape, flip)
    if problems:
        first = "; ".join(problems[:20])
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"{directory} does not hold the model of its config.json: {first}{more}.")
    return TensorMap(located, rows, groups)


def resolve_tied_head(directory: Path, family: Family, raw: dict[str, Any]) -> dict[str, Any]:
    """Return config.json with `tie_word_embeddings` false if the stored head differs.

    A merge, or a save of a model whose head was trained, may leave a head of other numbers beside a
    config that ties it; transformers keeps that head, too.

    Args:
      directory, family: of the model.
      raw: config.json.

    Raises:
      ValueError: as `tensor_files`.
    """
    located = _with_prefix(tensor_files(directory), family)
    names = family.weights[0][1], family.head_name
    if not family.parse(raw).tie_word_embeddings or not located.keys() >= set(names):
        return raw
    slices = []
    for path, key in (located[name] for name in names):
        slices.append(safe_open(path, framework="numpy").get_slice(key))
    shapes = [tuple(view.get_shape()) for view in slices]
    rows, starts = shapes[0][0], range(0, shapes[0][0], ROWS_COMPARED)
    same = shapes[0] == shapes[1] and all(
        np.array_equal(*(view[start : min(start + ROWS_COMPARED, rows)] for view in slices))
        for start in starts
    )
    return raw if same else {**raw, "tie_word_embeddings": False}


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


def _mismatches(name: str, view: Any, shape: tuple[int, ...], flip: bool) -> list[str]:
    """Return the problems of a stored tensor's shape and dtype."""
    problems = []
    stored, expected = tuple(view.get_shape()), shape[::-1] if flip else shape
    if stored != tuple(expected):
        problems.append(f"{name} has shape {stored}, expected {tuple(expected)}")
    if view.get_dtype() not in FLOAT_DTYPES:
        problems.append(f"{name} has dtype {view.get_dtype()}, expected {', '.join(FLOAT_DTYPES)}")
    return problems


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """Locations of the params of a model.

    located: stored name → file and the name in it.
    rows: our name → stored name with placeholders, and if it is transposed.
    groups: our name → stored names, by layer and expert (`tensor_names`).
    """

    located: Mapping[str, tuple[Path, str]]
    rows: Mapping[str, tuple[str, bool]]
    groups: Mapping[str, np.ndarray]

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
                part[...] = view[inner[::-1]].T if flip else view[inner]
        return block


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _with_prefix(located: Mapping[str, Path], family: Family) -> dict[str, tuple[Path, str]]:
    """Add the prefix to the names of a trunk that was saved without its head."""
    stems = [name.split(LAYER)[0] for _, name, _ in family.weights]
    trunk = tuple(s.removeprefix(family.prefix) for s in stems if s.startswith(family.prefix))
    bare = not any(name.startswith(family.prefix) for name in located)
    return {
        family.prefix + name if bare and name.startswith(trunk) else name: (path, name)
        for name, path in located.items()
    }


def _indexed_files(index: Path, weight_map: Mapping[str, str]) -> dict[str, Path]:
    directory = index.parent
    shards = sorted(set(weight_map.values()))
    outside = [shard for shard in shards if Path(shard).name != shard]
    missing = [s for s in shards if s not in outside and not (directory / s).is_file()]
    if outside or missing:
        raise ValueError(
            f"{index} names shards that are not in {directory}: "
            f"{', '.join(outside + missing)}; copy them there."
        )
    names = {shard: set(stored_names(directory / shard)) for shard in shards}
    absent = sorted(name for name, shard in weight_map.items() if name not in names[shard])
    if absent:
        raise ValueError(
            f"{index} places tensors in shards that do not hold them: "
            f"{', '.join(absent[:20])}; write the model again."
        )
    return {name: directory / shard for name, shard in weight_map.items()}
