"""Reading of Hugging Face directories: config.json and safetensors. Hub names, GGUF files.

Nothing executable is read. Every missing, misshapen or unknown tensor is in one error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ntkrl import directory_kinds
from ntkrl.gguf import is_gguf
from ntkrl.json_files import read_object
from ntkrl.messages import joined, path_text, quoted
from ntkrl.models.family import MOST, Family
from ntkrl.models.tensor_map import LAYER, TensorMap, count_names, tensor_names

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
ROWS_COMPARED = 4096  # at a time, of two tables
LONGEST_NAME = 200  # of a file, in characters
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def local_directory(path: str | Path) -> Path:
    """Return a directory as it is, or that of a model on the hub or in a GGUF file.

    Args:
      path: a directory; a hub name such as `EleutherAI/pythia-160m`: `huggingface_hub` caches
        downloads, HF_HUB_OFFLINE=1 disables the network; or a GGUF file, converted once into the
        user's cache.

    Raises:
      ValueError: a name that is not a directory and could not be fetched, or a GGUF file that
        cannot be converted.
    """
    directory = Path(path_text(path, "path", "a directory of Hugging Face files"))
    if is_gguf(directory):
        from ntkrl.models import gguf_files  # imports the families, which import this module

        return gguf_files.converted_directory(directory)
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


def check_directory(directory: Path) -> None:
    """Refuse a path that cannot be a model's directory.

    Raises:
      ValueError: no such directory, a file, or a run directory, with the model that is meant.
    """
    if not directory.is_dir():
        wrong = "is a file" if directory.is_file() else "is not a directory"
        hint = directory_kinds.nearest(directory, directory_kinds.is_model)
        raise ValueError(
            f"model.path {str(directory)!r} {wrong}{hint or ';'} {'G' if hint else 'g'}ive a "
            "Hugging Face model directory (config.json, *.safetensors, tokenizer files) or a GGUF "
            "file."
        )
    other = directory_kinds.not_a_model(directory)
    if other is not None:
        raise ValueError(other)


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json of a model directory.

    Raises:
      ValueError: as `check_directory`; no config.json, or not a JSON object.
    """
    check_directory(directory)
    path = directory / "config.json"
    if not path.is_file():
        entries = sorted(entry.name for entry in directory.iterdir())
        names = joined(entries, ", ") or "nothing"
        hint = "; give the GGUF file itself" if any(n.endswith(".gguf") for n in entries) else ""
        raise ValueError(f"{directory} has no config.json; it holds {names}{hint}.")
    return read_object(path)


def generation_end_ids(directory: str | Path) -> tuple[int, ...]:
    """Return the tokens that end a text in transformers' `generate`.

    Args:
      directory: of a model: its generation_config.json, or without one its config.json.

    Raises:
      ValueError: entries that are not token ids.
    """
    path = Path(directory) / "generation_config.json"
    raw = read_object(path) if path.is_file() else read_config(Path(directory))
    value = raw["eos_token_id"] if "eos_token_id" in raw else None
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(each) is int and 0 <= each <= MOST for each in ids):
        raise ValueError(
            f"{path if path.is_file() else path.with_name('config.json')}: eos_token_id must be a "
            f"token id or a list of them, not {quoted(value)}."
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
        raw = read_object(index)
        weight_map = raw["weight_map"] if "weight_map" in raw else None
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no weight_map object; write the model again.")
        wrong = [value for value in weight_map.values() if not isinstance(value, str)]
        if wrong:
            raise ValueError(
                f"{index}: weight_map must give a file name for every tensor, not "
                f"{quoted(wrong[0])}; write the model again."
            )
        return _indexed_files(index, weight_map)
    pickles = sorted(e.name for e in directory.iterdir() if e.suffix in PICKLES)
    if pickles:
        raise ValueError(
            f"{directory} holds only pickle checkpoints ({joined(pickles, ', ')}), which can run "
            "code when read and are refused. Save it with transformers' "
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
    for ours, (name, _) in rows.items():
        count = count_names(name, shapes[ours])
        if count > len(located):  # names of so many tensors might not fit into memory
            raise ValueError(
                f"{directory}: its config.json declares {count} tensors {name}, but the files hold "
                f"{len(located)} tensors in all; copy the files of one model."
            )
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
        raise ValueError(
            f"{directory} does not hold the model of its config.json: {joined(problems)}."
        )
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
    if not family.read(raw, directory).tie_word_embeddings or not located.keys() >= set(names):
        return raw
    slices = []
    for path, key in (located[name] for name in names):
        slices.append(safe_open(path, framework="numpy").get_slice(key))
    shapes = [tuple(view.get_shape()) for view in slices]
    dtypes = [view.get_dtype() for view in slices]
    if len(shapes[0]) != 2 or 0 in shapes[0] or not set(dtypes) <= set(FLOAT_DTYPES):
        return raw  # `check_tensors` names what is wrong
    rows, starts = shapes[0][0], range(0, shapes[0][0], ROWS_COMPARED)
    same = shapes[0] == shapes[1] and all(
        np.array_equal(*(view[start : min(start + ROWS_COMPARED, rows)] for view in slices))
        for start in starts
    )
    return raw if same else {**raw, "tie_word_embeddings": False}


def _mismatches(name: str, view: Any, shape: tuple[int, ...], flip: bool) -> list[str]:
    """Return the problems of a stored tensor's shape and dtype."""
    problems = []
    stored, expected = tuple(view.get_shape()), shape[::-1] if flip else shape
    if stored != tuple(expected):
        problems.append(f"{name} has shape {stored}, expected {tuple(expected)}")
    if view.get_dtype() not in FLOAT_DTYPES:
        problems.append(f"{name} has dtype {view.get_dtype()}, expected {', '.join(FLOAT_DTYPES)}")
    return problems


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
    # a plain name: not a path, not the directory itself or the one above it
    outside = [s for s in shards if Path(s).name != s or "\0" in s or len(s) > LONGEST_NAME]
    missing = [s for s in shards if s not in outside and not (directory / s).is_file()]
    if outside or missing:
        raise ValueError(
            f"{index} names shards that are not in {directory}: "
            f"{joined(map(quoted, outside + missing), ', ')}; copy them there."
        )
    names = {shard: set(stored_names(directory / shard)) for shard in shards}
    absent = sorted(name for name, shard in weight_map.items() if name not in names[shard])
    if absent:
        raise ValueError(
            f"{index} places tensors in shards that do not hold them: "
            f"{joined(absent, ', ')}; write the model again."
        )
    return {name: directory / shard for name, shard in weight_map.items()}
