"""Tokenizers of GGUF files as the files of Hugging Face's, by transformers' own conversion."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ntkrl.gguf.header import GgufFile
from ntkrl.messages import parser_sentences, quoted

PREFIX = "tokenizer.ggml."
MAX_TOKEN_LENGTH = 1024  # characters
LISTS = {"tokens": str, "merges": str, "scores": float, "token_type": int}
"""Metadata by key, and the type of their elements."""
SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""Ends of a sequence, of a turn and of a message."""


def write_tokenizer(file: GgufFile, directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Args:
      file: from `read_header`.
      directory: that exists.

    Raises:
      ValueError: no vocabulary, entries of other types, or a kind of tokenizer that transformers
        does not convert.
    """
    from transformers import PreTrainedTokenizerFast  # slow to import

    entries, options = _entries(file), _options(file)
    label = f"{file.path}: the tokenizer {quoted(entries['tokenizer_type'])} cannot be converted"
    with parser_sentences(label, "copy the file again, or give the model's own directory"):
        backend = _converter()(file.entries["general.architecture"], entries)[0]
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=_within_vocabulary(backend, len(entries["tokens"])), **options
        )
        tokenizer.save_pretrained(directory)


def special_token_ids(file: GgufFile) -> dict[str, int]:
    """Return the ids of special tokens that the file names, by Hugging Face's names.

    Raises:
      ValueError: ids outside of the vocabulary.
    """
    keys = {f"{name}_id": key for name, key in SPECIAL.items()}
    ids = {name: _token_id(file, key) for name, key in keys.items()}
    return {name: token for name, token in ids.items() if token is not None}


def end_tokens(file: GgufFile) -> list[int]:
    """Return the ids of tokens that end a completion, each once.

    Raises:
      ValueError: ids outside of the vocabulary.
    """
    ids = [_token_id(file, key) for key in ENDS]
    return list(dict.fromkeys(token for token in ids if token is not None))


def _converter() -> Any:
    """Return transformers' conversion, which has moved between versions."""
    try:
        from transformers.integrations.gguf import convert_gguf_tokenizer
    except ImportError:  # before 5.20 or so
        from transformers.integrations.ggml import convert_gguf_tokenizer
    return convert_gguf_tokenizer


def _within_vocabulary(backend: Any, size: int) -> Any:
    """Return a tokenizer without the special tokens that transformers adds after the vocabulary."""
    from tokenizers import Tokenizer

    raw = json.loads(backend.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["id"] < size]
    return Tokenizer.from_str(json.dumps(raw))


def _entries(file: GgufFile) -> dict[str, Any]:
    """Return the arguments of the conversion.

    Raises:
      ValueError: missing, or of other types or lengths.
    """
    entries: dict[str, Any] = {}
    for key, kind in LISTS.items():
        value = file.entries.get(PREFIX + key)
        if value is None:
            continue
        entries[key] = value.tolist() if isinstance(value, np.ndarray) else value
        # lists of strings, or arrays of one dtype
        if not isinstance(value, list | np.ndarray) or not all(
            type(element) is kind for element in entries[key][:1]
        ):
            raise ValueError(
                f"{file.path}: {PREFIX}{key} must be a list of {kind.__name__}, not "
                f"{quoted(value)}."
            )
    for key, name in (("model", "tokenizer_type"), ("pre", "pre_tokenizer_type")):
        value = file.entries.get(PREFIX + key)
        if not isinstance(value, str | None):
            raise ValueError(f"{file.path}: {PREFIX}{key} must be text, not {quoted(value)}.")
        entries[name] = value
    count = len(_tokens(file))
    for key in ("scores", "token_type"):
        if len(entries.get(key, entries["tokens"])) != count:
            raise ValueError(
                f"{file.path}: {PREFIX}{key} has {len(entries[key])} values for {count} tokens."
            )
    longest = max(entries["tokens"], key=len)
    if len(longest) > MAX_TOKEN_LENGTH:
        raise ValueError(
            f"{file.path}: a token of {len(longest)} characters, at most {MAX_TOKEN_LENGTH} are "
            f"expected: {quoted(longest)}."
        )
    if len(set(entries["tokens"])) != count:
        raise ValueError(f"{file.path}: some of its {count} tokens occur twice.")
    return entries


def _options(file: GgufFile) -> Mapping[str, Any]:
    """Return the keyword arguments of transformers' tokenizer.

    Raises:
      ValueError: entries of other types.
    """
    entries, tokens = file.entries, _tokens(file)
    ids = {name: _token_id(file, key) for name, key in SPECIAL.items()}
    options: dict[str, Any] = {
        name: None if token is None else tokens[token] for name, token in ids.items()
    }
    # llama.cpp adds BOS to sentencepiece texts unless the file has the entry
    default = entries.get(f"{PREFIX}model") == "llama"
    for name, fallback in (("add_bos_token", default), ("add_eos_token", False)):
        value = entries.get(PREFIX + name, fallback)
        if not isinstance(value, bool):
            raise ValueError(
                f"{file.path}: {PREFIX}{name} must be true or false, not {quoted(value)}."
            )
        options[name] = value
    template = entries.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise ValueError(f"{file.path}: tokenizer.chat_template must be text.")
    return options if template is None else {**options, "chat_template": template}


def _tokens(file: GgufFile) -> list[str]:
    """Return the vocabulary.

    Raises:
      ValueError: there is none.
    """
    tokens = file.entries.get(f"{PREFIX}tokens")
    if not isinstance(tokens, list) or not tokens or f"{PREFIX}model" not in file.entries:
        raise ValueError(
            f"{file.path} has no tokenizer ({PREFIX}model, {PREFIX}tokens); give the model's "
            "Hugging Face directory."
        )
    return tokens


def _token_id(file: GgufFile, key: str) -> int | None:
    """Return a token id of the metadata, None without the entry."""
    value, count = file.entries.get(PREFIX + key), len(_tokens(file))
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < count:
        raise ValueError(
            f"{file.path}: {PREFIX}{key} must be the id of one of its {count} tokens, not "
            f"{quoted(value)}."
        )
    return value
