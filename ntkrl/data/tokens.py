"""Tokenizers: loading, encoding and decoding.

Ids are those that the model was trained to expect, as TRL's: a text starts with the tokenizer's
own start token (a BOS) where it writes one, a conversation with what the chat template writes.
Nothing is truncated silently.
"""

import contextlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ntkrl.data.chat import (
    rejected_rows,
    render_conversations,
    render_prompts,
    turn_end_id,
)
from ntkrl.data.prompts import PromptSet
from ntkrl.data.tokenizer_files import (
    VOCABULARIES,
    check_tokenizer_files,
    open_tokenizer,
    token_ids,
)
from ntkrl.messages import listed
from ntkrl.types import Array


def load_tokenizer(path: str | Path) -> Any:
    """Load a local Hugging Face tokenizer and set its `eos_token_id` and `pad_token_id`.

    A missing pad token becomes the end-of-sequence token: every array has a mask, and no code
    compares tokens with the pad id.

    Args:
      path: directory with `tokenizer.json` (or the vocabulary of a slow tokenizer) and
        `tokenizer_config.json`.

    Raises:
      ValueError: no such directory, no tokenizer files, files that are too large or do not load
        (such as those that need remote code), or no end-of-sequence token.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory; give the directory of tokenizer.json.")
    if not any((path / name).exists() for name in VOCABULARIES):
        raise ValueError(
            f"{path} has no tokenizer; expected tokenizer.json and tokenizer_config.json (or a "
            f"vocabulary: {', '.join(VOCABULARIES[1:])}). Copy them from the model's source."
        )
    check_tokenizer_files(path)
    tokenizer = open_tokenizer(path)
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

    A text gets the special tokens that the tokenizer writes before one (BOS), if it does not start
    with them. A conversation is what the chat template writes, up to the assistant's answer.

    Args:
      tokenizer: from `load_tokenizer`.
      prompt_set: the prompts.
      max_prompt_tokens: longest prompt allowed (tokens).

    Raises:
      ValueError: a missing chat template, or prompts that cannot be encoded, are empty or too
        long; the message lists all such rows.
    """
    source = prompt_set.source
    if prompt_set.conversational:
        encoded = encode_plain(tokenizer, _render_prompts(tokenizer, prompt_set), source, "prompt")
    else:
        encoded = encode_texts(tokenizer, [str(text) for text in prompt_set.prompts], source)
    problems = [f"row {row}: no tokens" for row, ids in enumerate(encoded) if not ids]
    if problems:
        raise ValueError(
            f"{prompt_set.source}: {len(problems)} prompts encode to nothing{listed(problems)}\n"
            "Remove these rows or give them text."
        )
    _check_lengths(encoded, max_prompt_tokens, prompt_set.source, "prompt")
    return encoded


def encode_texts(tokenizer: Any, texts: Sequence[str], source: str = "text") -> list[list[int]]:
    """Return the token ids of texts, after the special tokens that the tokenizer puts first.

    Args:
      tokenizer: from `load_tokenizer`.
      texts: not rendered by a chat template, which writes special tokens itself.
      source: of the texts, for messages.

    Raises:
      ValueError: texts that cannot be encoded, all of them in one message.
    """
    encoded = encode_plain(tokenizer, texts, source, "prompt")
    row = next((row for row, ids in enumerate(encoded) if ids), None)
    if row is None:
        return encoded
    ids, complete = encoded[row], token_ids(tokenizer, texts[row], special=True)
    places = range(len(complete) - len(ids) + 1)
    start = next((at for at in places if complete[at : at + len(ids)] == ids), 0)
    first = list(complete[:start])
    return [ids if not ids or ids[:start] == first else first + ids for ids in encoded]


def encode_completions(
    tokenizer: Any, prompt_set: PromptSet, max_completion_tokens: int
) -> list[list[int]]:
    """Return the token ids of the column "completion" for SFT, unpadded, an end token last.

    A completion is encoded after its prompt: `encode_prompts` and these ids join to the ids of the
    text of both. Where tokens would merge across the seam, the prompt keeps its own, as when it is
    sampled from.

    A conversational completion is what the chat template writes after the generation prompt. It
    ends with the template's end of turn or the end token, and white space after that is dropped:
    a sampler stops there.

    Args:
      tokenizer: from `load_tokenizer`.
      prompt_set: prompts with a "completion" for every row.
      max_completion_tokens: longest completion allowed (tokens, including the end token).

    Raises:
      ValueError: a missing column, value or chat template, or completions that cannot be encoded
        or are too long; the message lists all such rows.
    """
    completions, source = _completions(prompt_set), prompt_set.source
    ends = {tokenizer.eos_token_id}
    if prompt_set.conversational:
        ends |= {turn_end_id(tokenizer)} - {None}
        starts = _render_prompts(tokenizer, prompt_set)
        completions = _render_completions(tokenizer, prompt_set, starts, completions)
    else:
        starts = [str(prompt) for prompt in prompt_set.prompts]
    pairs = list(zip(starts, completions, strict=True))
    start_ids = encode_plain(tokenizer, starts, source, "prompt")
    joined = [start + completion for start, completion in pairs]
    joined_ids = encode_plain(tokenizer, joined, source, "completion")
    encoded, problems = [], []
    for row, (first, both) in enumerate(zip(start_ids, joined_ids, strict=True)):
        ids = _continuation(tokenizer, first, both, completions[row])
        if ids is None:
            problems.append(f"row {row}: {starts[row]!r:.60} + {completions[row]!r:.60}")
        else:
            encoded.append(_end_sequence(tokenizer, ids, ends))
    if problems:
        raise ValueError(
            f"{source}: {len(problems)} completions cannot be encoded after their prompts, since "
            f"tokens merge across the seam{listed(problems)}\nMove white space between a prompt "
            "and its completion to the completion."
        )
    _check_lengths(encoded, max_completion_tokens, source, "completion")
    return encoded


def decode_completions(
    tokenizer: Any, tokens: Array, completion_mask: Array, end_ids: Collection[int]
) -> tuple[list[str], list[list[int]]]:
    """Return the completions of a rollout as texts without special tokens, and as all token ids.

    Args:
      tokenizer: from `load_tokenizer`.
      tokens: `[B, T]` or `[B, C]`; the completions are the last C columns.
      completion_mask: `[B, C]` bool.
      end_ids: tokens that end a completion, never part of the text.

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
            [token for token in row if token not in end_ids],
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
        # a stop string may be, or include, a special token
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
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


def _render_prompts(tokenizer: Any, prompt_set: PromptSet) -> list[str]:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{prompt_set.source}: prompts are lists of messages, but the tokenizer has no chat "
            "template. Put chat_template.jinja into the tokenizer's directory (or set "
            '"chat_template" in tokenizer_config.json), or use {"prompt": "text"} rows.'
        )
    return render_prompts(tokenizer, prompt_set.prompts, prompt_set.columns, prompt_set.source)


def encode_plain(
    tokenizer: Any, texts: Sequence[str], source: str, kind: str = "text"
) -> list[list[int]]:
    """Return the token ids of texts without special tokens, of any length.

    Args:
      tokenizer: from `load_tokenizer`.
      texts: may hold special tokens, as those of a chat template do.
      source, kind: of the texts, for messages.

    Raises:
      ValueError: texts that cannot be encoded, all of them in one message.
    """
    try:
        return token_ids(tokenizer, list(texts))
    except ValueError:  # encode by row to name the rows
        message = f"{source}: the tokenizer cannot encode the {kind} of"
        return map_rows(lambda row: token_ids(tokenizer, texts[row]), texts, (ValueError,), message)


def map_rows(
    call: Callable[[int], Any],
    items: Sequence[Any],
    kinds: tuple[type[Exception], ...],
    message: str,
) -> list[Any]:
    """Call a function with every row's number and return the results.

    Raises:
      ValueError: `message`, and all rows whose call raises one of `kinds`.
    """
    results: list[Any] = []
    problems: dict[int, Exception] = {}
    for row in range(len(items)):
        try:
            results.append(call(row))
        except kinds as error:
            problems[row] = error
    if problems:
        raise ValueError(rejected_rows(message, items, problems))
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
    tokenizer: Any, prompt_set: PromptSet, starts: Sequence[str], completions: Sequence[Any]
) -> list[str]:
    turns = zip(prompt_set.prompts, completions, strict=True)
    conversations = [[*prompt, *completion] for prompt, completion in turns]
    texts = render_conversations(tokenizer, conversations, prompt_set.columns, prompt_set.source)
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


def _continuation(
    tokenizer: Any, start: list[int], joined: list[int], completion: str
) -> list[int] | None:
    """Return ids that continue `start` to the text of `joined`, or None if none are found.

    Args:
      tokenizer: from `load_tokenizer`.
      start: ids of a prompt.
      joined: ids of the prompt and the completion as one text.
      completion: its text.
    """
    if joined[: len(start)] == start:
        return joined[len(start) :]

    def ids(text: str) -> list[int]:
        with contextlib.suppress(ValueError):  # a line break may have no token
            return token_ids(tokenizer, text)
        return []

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    # the second avoids the space that sentencepiece writes before a text
    candidates = (ids(completion), ids("\n" + completion)[len(ids("\n")) :])
    return next((each for each in candidates if text(start + each) == text(joined)), None)


def _end_sequence(tokenizer: Any, ids: list[int], ends: Collection[int]) -> list[int]:
    """Return the ids with an end token last; a template may have written it already."""
    last = max((at for at, token in enumerate(ids) if token in ends), default=None)
    if last is not None and not tokenizer.decode(ids[last + 1 :]).strip():
        return ids[: last + 1]
    return [*ids, tokenizer.eos_token_id]


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
