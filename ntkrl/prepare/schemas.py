"""Instructions and preferences as conversations, and random splits of their rows.

Columns of instructions are those of AlpacaFarm: instruction, input (may be empty), output. Columns
of preferences are those of UltraFeedback and TRL: prompt, chosen, rejected, where a prompt is text
or a list of messages, and a response is text, its message, or the complete conversation that ends
with it. Splits are the same random choices as in princeton-pli/what-makes-good-rm.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ntkrl import data

Row = dict[str, Any]
KEPT_COLUMNS = ("prompt_id", "score_chosen", "score_rejected")


def examples(table: data.Rows) -> data.PromptSet:
    """Convert instructions to prompts with the column "completion".

    Instruction and input are joined by a line break, as in princeton-pli/what-makes-good-rm.

    Raises:
      ValueError: rows whose instruction, output or input is not text; lists all of them.
    """
    return _convert(table, _example, ("prompt", "completion"))


def preferences(table: data.Rows) -> data.PromptSet:
    """Convert preferences to prompts with the columns "chosen" and "rejected", one message each.

    The columns KEPT_COLUMNS are preserved.

    Raises:
      ValueError: rows of another form; lists all of them.
    """
    return _convert(table, _preference, ("prompt", "chosen", "rejected"))


def without_prompt(row: Row) -> bool:
    """Return whether a row's prompt (or instruction and input) is present and empty."""
    if "prompt" in row and isinstance(row["prompt"], str):
        return not row["prompt"].strip()
    texts = [row[name] for name in ("instruction", "input") if name in row]
    return bool(texts) and all(isinstance(text, str) and not text.strip() for text in texts)


def split(size: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split rows in two parts as `datasets`' train_test_split does.

    Args:
      size: rows, ≥ 2.
      share: of the first part, in (0, 1); the second has ⌈(1 − share) size⌉ rows.
      seed: ≥ 0.

    Returns:
      The rows of either part, in the order of the permutation.

    Raises:
      ValueError: too few rows for two parts.
    """
    second = math.ceil((1 - share) * size)
    if not 0 < second < size:
        raise ValueError(f"{size} preferences cannot be split in shares of {share} and the rest.")
    order = np.random.default_rng(seed).permutation(size)
    return order[second:], order[:second]


def select(size: int, count: int, seed: int) -> np.ndarray:
    """Return the first `count` rows of a permutation; all rows in order if there are no more."""
    if count >= size:
        return np.arange(size)
    return np.random.RandomState(seed).permutation(size)[:count]


def _convert(
    table: data.Rows, convert: Callable[[Row], Row | str], required: tuple[str, ...]
) -> data.PromptSet:
    """Convert every row; a converter returns a message for a row that is wrong."""
    rows, problems = [], list(table.problems)
    for number, row in table.rows:
        converted = convert(row)
        if isinstance(converted, str):
            problems.append((number, converted))
        else:
            rows.append((number, converted))
    return data.validate_rows(table._replace(rows=rows, problems=problems), required)


def _example(row: Row) -> Row | str:
    wrong = [name for name in ("instruction", "output") if not isinstance(_get(row, name), str)]
    context = _get(row, "input")
    if wrong or not isinstance(context, str | None):
        return f"{' and '.join(wrong) or 'input'} must be text; the row has {', '.join(row)}"
    prompt = f"{row['instruction']}\n{context}" if context else row["instruction"]
    return {"prompt": _turn("user", prompt), "completion": _turn("assistant", row["output"])}


def _preference(row: Row) -> Row | str:
    prompt = _get(row, "prompt")
    if isinstance(prompt, str):
        prompt = _turn("user", prompt)
    if not isinstance(prompt, list):
        return f"'prompt' must be text or a list of messages; the row has {', '.join(row)}"
    converted: Row = {"prompt": prompt}
    for name in ("chosen", "rejected"):
        response = _get(row, name)
        if isinstance(response, str):
            response = _turn("assistant", response)
        if isinstance(response, list) and len(response) == len(prompt) + 1:
            response = response[-1:]  # a complete conversation repeats the prompt
        if not isinstance(response, list) or len(response) != 1 or not _is_answer(response[0]):
            return (
                f"{name!r} must be text, one assistant message, or the prompt and that message, "
                f"not {_get(row, name)!r:.60}"
            )
        converted[name] = _turn("assistant", response[0]["content"])
    return converted | {name: row[name] for name in KEPT_COLUMNS if name in row}


def _is_answer(message: Any) -> bool:
    if not isinstance(message, dict):
        return False
    return _get(message, "role") == "assistant" and isinstance(_get(message, "content"), str)


def _turn(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def _get(row: Row, name: str) -> Any:
    return row[name] if name in row else None
