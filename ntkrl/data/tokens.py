"""Tokenizers: loading, chat templates, encoding and decoding.

Only the text and the chat template determine the tokens, but for the end token of a supervised
completion. Nothing is truncated silently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ntkrl.data.prompts import PromptSet
from ntkrl.messages import listed
from ntkrl.types import Array

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template.

    text: jinja2, as in transformers' `chat_template`.
    tokens: special tokens to add to the tokenizer, in this order.
    """

    text: str
    tokens: tuple[str, ...] = ()


# The format of princeton-pli/what-makes-good-rm for Pythia, without line breaks and without a
# start token. It writes a system message as an assistant's; this one rejects it.
PYTHIA = Template(
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('roles are user and assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    ("<|user|>", "<|assistant|>"),
)
TEMPLATES = {"pythia": PYTHIA}


def read_template(name: str) -> Template:
    """Return a template by name ("pythia"), or from a path that ends in `.jinja`.

    Raises:
      ValueError: an unknown name, or a file that cannot be read.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if not name.endswith(".jinja"):
        raise ValueError(
            f"model.template {name!r} is unknown; give {', '.join(TEMPLATES)} or a .jinja file."
        )
    try:
        return Template(Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"model.template {name} cannot be read: {error}.") from error


def apply_template(tokenizer: Any, template: Template) -> int:
    """Set a tokenizer's chat template and add its special tokens; return how many were new."""
    tokenizer.chat_template = template.text
    return tokenizer.add_special_tokens({"additional_special_tokens": list(template.tokens)})


def load_tokenizer(path: str | Path) -> Any:
    """Load a local Hugging Face tokenizer and set its `eos_token_id` and `pad_token_id`.

    A missing pad token becomes the end-of-sequence token: every array has a mask, and no code
    compares tokens with the pad id.

    Args:
      path: directory with `tokenizer.json` (or the vocabulary of a slow tokenizer) and
        `tokenizer_config.json`.

    Raises:
      ValueError: no such directory, no tokenizer files, files that do not load (such as those
        that need remote code), or no end-of-sequence token.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory; give the directory of tokenizer.json.")
    if not any((path / name).exists() for name in TOKENIZER_FILES):
        raise ValueError(
            f"{path} has no tokenizer; expected tokenizer.json and tokenizer_config.json (or a "
            f"vocabulary: {', '.join(TOKENIZER_FILES[1:])}). Copy them from the model's source."
        )
    # a local import, since transformers takes seconds to import
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises bare Exception for malformed files
        raise ValueError(
            f"{path}: the tokenizer does not load ({type(error).__name__}: {error}). "
            "Remote code is never run; tokenizer.json must be complete."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{path}: the tokenizer has no end-of-sequence token, so no completion could end; "
            'set "eos_token" in tokenizer_config.json to a token of the vocabulary.'
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode_prompts(
    tokenizer: Any, prompt_set: PromptSet, max_prompt_tokens: int
) -> list[list[int]]:
    """Return the token ids of each prompt, unpadded.

    Text prompts are encoded without special tokens, conversations by the tokenizer's chat
    template with the generation prompt.

    Args:
      tokenizer: from `load_tokenizer`.
      prompt_set: the prompts.
      max_prompt_tokens: longest prompt allowed (tokens).

    Raises:
      ValueError: a missing chat template, or prompts that cannot be encoded, are empty or too
        long; the message lists all such rows.
    """
    if prompt_set.conversational:
        texts = _render(tokenizer, prompt_set, prompt_set.prompts, generation_prompt=True)
    else:
        texts = [str(prompt) for prompt in prompt_set.prompts]
    encoded = _encode(tokenizer, texts, prompt_set.source, "prompt")
    problems = [f"row {row}: no tokens" for row, ids in enumerate(encoded) if not ids]
    if problems:
        raise ValueError(
            f"{prompt_set.source}: {len(problems)} prompts encode to nothing{listed(problems)}\n"
            "Remove these rows or give them text."
        )
    _check_lengths(encoded, max_prompt_tokens, prompt_set.source, "prompt")
    return encoded


def encode_completions(
    tokenizer: Any, prompt_set: PromptSet, max_completion_tokens: int
) -> list[list[int]]:
    """Return the token ids of the column "completion" for SFT, unpadded, the end token last.

    A conversational completion is what the chat template writes after the generation prompt. If
    it has the end token, only white space that follows it is dropped, as a sampler stops there.

    Args:
      tokenizer: from `load_tokenizer`.
      prompt_set: prompts with a "completion" for every row.
      max_completion_tokens: longest completion allowed (tokens, including the end token).

    Raises:
      ValueError: a missing column, value or chat template, or completions that cannot be encoded
        or are too long; the message lists all such rows.
    """
    completions = _completions(prompt_set)
    if prompt_set.conversational:
        completions = _render_completions(tokenizer, prompt_set, completions)
    encoded = [
        _end_sequence(tokenizer, ids)
        for ids in _encode(tokenizer, completions, prompt_set.source, "completion")
    ]
    _check_lengths(encoded, max_completion_tokens, prompt_set.source, "completion")
    return encoded


def decode_completions(
    tokenizer: Any, tokens: Array, completion_mask: Array, eos_id: int
) -> tuple[list[str], list[list[int]]]:
    """Return the completions of a rollout as texts without special tokens, and as all token ids.

    Args:
      tokenizer: from `load_tokenizer`.
      tokens: `[B, T]` or `[B, C]`; the completions are the last C columns.
      completion_mask: `[B, C]` bool.
      eos_id: end-of-sequence token, never part of the text.

    Raises:
      ValueError: the mask is wider than the tokens or has another number of rows.
    """
    tokens_BT, mask_BC = np.asarray(tokens), np.asarray(completion_mask, bool)
    if tokens_BT.shape[0] != mask_BC.shape[0] or tokens_BT.shape[1] < mask_BC.shape[1]:
        raise ValueError(
            f"tokens {tokens_BT.shape} and completion_mask {mask_BC.shape} do not fit; "
            "expected [B, T] and [B, C] with T ≥ C."
        )
    tokens_BC = tokens_BT[:, tokens_BT.shape[1] - mask_BC.shape[1] :]
    ids = [row[mask].tolist() for row, mask in zip(tokens_BC, mask_BC, strict=True)]
    texts = [
        tokenizer.decode(
            [token for token in row if token != eos_id],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,  # it would rewrite " ." and change the text
        )
        for row in ids
    ]
    return texts, ids


def stop_finder(tokenizer: Any, stops: Sequence[str]) -> Callable[[np.ndarray], int | None]:
    """Return `find(ids [n])`: the fewest tokens whose text contains a stop string, or None.

    Args:
      tokenizer: from `load_tokenizer`.
      stops: at least one string.
    """

    def contains_stop(ids: np.ndarray) -> bool:
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return any(stop in text for stop in stops)

    def find(ids: np.ndarray) -> int | None:
        if not contains_stop(ids):
            return None
        low, high = 0, len(ids)  # text only grows with tokens, so bisection finds the first
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if contains_stop(ids[:middle]) else (middle, high)
        return high

    return find


def _render(
    tokenizer: Any, prompt_set: PromptSet, conversations: Sequence[Any], generation_prompt: bool
) -> list[str]:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{prompt_set.source}: prompts are lists of messages, but the tokenizer has no chat "
            "template. Put chat_template.jinja into the tokenizer's directory (or set "
            '"chat_template" in tokenizer_config.json), or use {"prompt": "text"} rows.'
        )
    # jinja2 comes with transformers' chat templates, its only use
    from jinja2 import TemplateError

    def write(messages: Any) -> str:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=generation_prompt, tokenize=False
        )

    message = f"{prompt_set.source}: the chat template rejects"
    return _map_rows(write, conversations, TemplateError, message)


def _encode(tokenizer: Any, texts: Sequence[str], source: str, kind: str) -> list[list[int]]:
    def ids(text: str | list[str]) -> Any:
        # templates write special tokens themselves; the caller checks lengths
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    try:
        return ids(list(texts))
    except Exception:  # tokenizers raises bare Exception; encode by row to name the rows
        message = f"{source}: the tokenizer cannot encode the {kind} of"
        return _map_rows(ids, texts, Exception, message)


def _map_rows(
    call: Callable[[Any], Any], items: Sequence[Any], kind: type[Exception], message: str
) -> list[Any]:
    """Apply a function to every row; one ValueError lists all rows that raise `kind`."""
    results, problems = [], []
    for row, item in enumerate(items):
        try:
            results.append(call(item))
        except kind as error:
            problems.append(f"row {row}, {item!r:.60}: {error}")
    if problems:
        raise ValueError(f"{message} {len(problems)} rows{listed(problems)}")
    return results


def _completions(prompt_set: PromptSet) -> list[Any]:
    columns = prompt_set.columns
    if "completion" not in columns:
        raise ValueError(
            f"{prompt_set.source}: supervised training needs a column 'completion'; "
            f"columns are: {', '.join(columns) if columns else 'none'}."
        )
    kind, form = (list, "a list of messages") if prompt_set.conversational else (str, "text")
    problems = [
        f"row {row}: {completion!r:.60}"
        for row, completion in enumerate(columns["completion"])
        if not isinstance(completion, kind)
    ]
    if problems:
        raise ValueError(
            f"{prompt_set.source}: every 'completion' must be {form}{listed(problems)}"
        )
    return columns["completion"]


def _render_completions(
    tokenizer: Any, prompt_set: PromptSet, completions: Sequence[Any]
) -> list[str]:
    prompts = prompt_set.prompts
    starts = _render(tokenizer, prompt_set, prompts, generation_prompt=True)
    conversations = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
    texts = _render(tokenizer, prompt_set, conversations, generation_prompt=False)
    pairs = list(zip(texts, starts, strict=True))
    problems = [
        f"row {row}: {start!r:.60} is not a prefix of {text!r:.60}"
        for row, (text, start) in enumerate(pairs)
        if not text.startswith(start)
    ]
    if problems:
        raise ValueError(
            f"{prompt_set.source}: the chat template writes a conversation that does not start "
            f"with its prompt, so the completion cannot be separated{listed(problems)}\n"
            "Use a template whose generation prompt is the start of an assistant turn."
        )
    return [text[len(start) :] for text, start in pairs]


def _end_sequence(tokenizer: Any, ids: list[int]) -> list[int]:
    """Return the ids with the end token last; a template may have written it already."""
    eos_id = tokenizer.eos_token_id
    if eos_id in ids:
        end = len(ids) - ids[::-1].index(eos_id)
        if not tokenizer.decode(ids[end:]).strip():
            return ids[:end]
    return [*ids, eos_id]


def _check_lengths(encoded: list[list[int]], limit: int, source: str, kind: str) -> None:
    problems = [
        f"row {row}: {len(ids)} tokens" for row, ids in enumerate(encoded) if len(ids) > limit
    ]
    if problems:
        longest = max(len(ids) for ids in encoded)
        raise ValueError(
            f"{source}: {len(problems)} {kind}s are longer than {limit} tokens{listed(problems)}\n"
            f"Raise --config.data.max_{kind}_tokens (the longest has {longest}), or shorten or "
            "filter these rows."
        )
