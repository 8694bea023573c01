"""Files of a tokenizer, checked before transformers opens them, and errors of its parsers.

transformers reads a tokenizer's files without limits, sizes the lists of a model's config by its
config.json, and passes files on to parsers in Rust and C++ that raise exceptions of any kind.
"""

from pathlib import Path
from typing import Any

from ntkrl.chat_templates import import_transformers
from ntkrl.json_files import check_regular, read_object
from ntkrl.messages import parser_sentences, quoted

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""Files of which a tokenizer needs one."""
OBJECTS = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.json", "config.json"),
)
"""Small JSON files."""
LARGE_FILES = (
    *VOCABULARIES,
    *("merges.txt", "tekken.json", "*.tiktoken", "tokenizer.model.*", "sentencepiece*.model"),
)
TEMPLATES = ("chat_template*.jinja", "additional_chat_templates/*.jinja")
MAX_VOCABULARY_BYTES, MAX_TEMPLATE_BYTES = 256 * 2**20, 2**20


def check_tokenizer_files(path: Path) -> None:
    """Check the kinds and sizes of all files that transformers may open, and parse the small ones.

    Raises:
      ValueError: a pipe or a device, a file that is too large, or JSON that is not an object.
    """
    for name in OBJECTS:
        if (path / name).exists():
            read_object(path / name, finite=False)
    for patterns, most in ((LARGE_FILES, MAX_VOCABULARY_BYTES), (TEMPLATES, MAX_TEMPLATE_BYTES)):
        for file in [file for pattern in patterns for file in path.glob(pattern)]:
            check_regular(file, most)


def open_tokenizer(path: Path) -> Any:
    """Return transformers' tokenizer of a directory of checked files.

    Raises:
      ValueError: its files do not load; names the directory and the reason.
    """
    # local imports, since transformers takes seconds to import
    import_transformers()
    from transformers import AutoTokenizer

    problem = f"{path}: the tokenizer does not load"
    with parser_sentences(problem, "tokenizer.json must be complete"):
        tokenizer = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False, **_options(path)
        )
        _try_out(tokenizer)
    return tokenizer


def token_ids(tokenizer: Any, texts: Any, special: bool = False) -> Any:
    """Return the token ids of a text or of several.

    Args:
      tokenizer: transformers'.
      texts: a text or a list of texts.
      special: with the special tokens that the tokenizer writes around a text.

    Raises:
      ValueError: the tokenizer has no tokens for a text, or is broken.
    """
    with parser_sentences("the tokenizer cannot encode", "the tokenizer must fit the texts"):
        return tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]


def _options(path: Path) -> dict[str, Any]:
    """Return the model's config by its type alone, as far as it decides on the tokenizer's class.

    transformers would read all of config.json, and make lists of as many layers as it declares.
    """
    import_transformers()
    from transformers import CONFIG_MAPPING, PretrainedConfig

    if not (path / "config.json").exists():
        return {}
    raw = read_object(path / "config.json", finite=False)
    kind = raw["model_type"] if "model_type" in raw else None
    known = isinstance(kind, str) and kind in CONFIG_MAPPING
    config = (CONFIG_MAPPING[kind] if known else PretrainedConfig)(name_or_path=str(path))
    for name in ("tokenizer_class", "model_name"):
        if name in raw and isinstance(raw[name], str):
            setattr(config, name, raw[name])
    return {"config": config}


def _try_out(tokenizer: Any) -> None:
    """Use what files with values of wrong types would break.

    Raises:
      Exception: of any kind, for a broken tokenizer.
    """
    size, vocabulary = len(tokenizer), tokenizer.get_vocab()
    for name in ("eos_token_id", "pad_token_id"):
        value = getattr(tokenizer, name)
        if value is not None and not (type(value) is int and 0 <= value):
            raise TypeError(f"{name} must be a token of the vocabulary, not {quoted(value)}")
    template = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template]
    if not all(isinstance(text, str | None) for text in texts):
        raise TypeError(f"chat_template must be text, not {quoted(template)}")
    tokenizer.decode([max(vocabulary.values(), default=size - 1)])


def needed_rows(tokenizer: Any) -> int:
    """Return how many rows of a model's vocabulary a tokenizer's ids need."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
