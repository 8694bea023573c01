"""Sampled answers as arrays of their tokens, as a model reads them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ntkrl import data
from ntkrl.types import UpdateBatch


class Answers(NamedTuple):
    """Answers of several prompts, B of them with O tokens in all.

    batch: their arrays. prompt_length: its columns before the answers.
    rows, columns: `[O]` answer, and place in it, of each token.
    groups: `[B]` number of the prompt.
    """

    batch: UpdateBatch
    prompt_length: int
    rows: np.ndarray
    columns: np.ndarray
    groups: np.ndarray


def encode_answers(export: Path, texts: data.PromptSet, max_tokens: int) -> Answers:
    """Encode prompts and completions with the tokenizer of an export.

    Args:
      export: Hugging Face directory.
      texts: prompts with completions.
      max_tokens: most tokens of each of the two.
    """
    tokenizer = data.load_tokenizer(str(export))
    encoded = data.encode_prompts(tokenizer, texts, max_tokens)
    completions = data.encode_completions(tokenizer, texts, max_tokens)
    lengths = max(map(len, encoded)), max(map(len, completions))
    rows = range(len(encoded))
    batch = data.supervised_batch(encoded, completions, rows, tokenizer.pad_token_id, *lengths)
    row_O, column_O = np.nonzero(np.asarray(batch.completion_mask))
    _, group_B = np.unique([str(prompt) for prompt in texts.prompts], return_inverse=True)
    return Answers(batch, lengths[0], row_O, column_O, group_B)


def first_answers(texts: data.PromptSet, count: int) -> data.PromptSet:
    """Return the first answers, at most `count`, of each prompt."""
    counts: dict[str, int] = {}
    rows = []
    for row, prompt in enumerate(texts.prompts):
        text = str(prompt)  # a conversation is a list
        counts[text] = counts.setdefault(text, 0) + 1
        if counts[text] <= count:
            rows.append(row)
    return data.take(texts, np.array(rows))
