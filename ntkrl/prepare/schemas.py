"""Rows as AlpacaFarm and UltraFeedback publish them, as conversations.

AlpacaFarm: instruction, input (may be empty), output. UltraFeedback, and TRL's preferences: prompt,
chosen, rejected, where a prompt is a text or a list of messages, and a response a text, its
message, or the whole conversation that ends with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ntkrl import data

Row = dict[str, Any]


def examples(found: data.Rows) -> data.PromptSet:
    """Turn AlpacaFarm's rows into prompts with the column "completion".

    Instruction and input are joined by a line break, as princeton-pli/what-makes-good-rm does.

    Raises:
      ValueError: rows without instruction or output, or with others than texts; all of them.
    """
    return _converted(found, _example, ("prompt", "completion"))


def preferences(found: data.Rows) -> data.PromptSet:
    """Turn preferences into prompts with the columns "chosen" and "rejected", a message each.

    Columns that stay beside: prompt_id, score_chosen and score_rejected.

    Raises:
      ValueError: rows of another form; all of them.
    """
    return _converted(found, _preference, ("prompt", "chosen", "rejected"))


def without_prompt(row: Row) -> bool:
    """Tell whether a row's prompt (or instruction and input) is there and has no text."""
    if "prompt" in row and isinstance(row["prompt"], str):
        return not row["prompt"].strip()
    texts = [row[name] for name in ("instruction", "input") if name in row]
    return bool(texts) and all(isinstance(text, str) and not text.strip() for text in texts)


def _converted(
    found: data.Rows, convert: Callable[[Row], Row | str], required: tuple[str, ...]
) -> data.PromptSet:
    rows, problems = [], list(found.problems)
    for number, row in found.rows:
        made = convert(row)
        if isinstance(made, str):
            problems.append((number, made))
        else:
            rows.append((number, made))
    return data.checked(found._replace(rows=rows, problems=problems), required)


def _example(row: Row) -> Row | str:
    wrong = [name for name in ("instruction", "output") if not isinstance(_of(row, name), str)]
    given = _of(row, "input")
    if wrong or not isinstance(given, str | None):
        return f"{' and '.join(wrong) or 'input'} must be text; the row has {', '.join(row)}"
    prompt = f"{row['instruction']}\n{given}" if given else row["instruction"]
    return {"prompt": _turn("user", prompt), "completion": _turn("assistant", row["output"])}


def _preference(row: Row) -> Row | str:
    prompt = _of(row, "prompt")
    if isinstance(prompt, str):
        prompt = _turn("user", prompt)
    if not isinstance(prompt, list):
        return f"'prompt' must be text or a list of messages; the row has {', '.join(row)}"
    made: Row = {"prompt": prompt}
    for name in ("chosen", "rejected"):
        given = _of(row, name)
        if isinstance(given, str):
            given = _turn("assistant", given)
        # a whole conversation repeats the prompt before its last message
        whole = isinstance(given, list) and len(given) == len(prompt) + 1
        given = given[-1:] if whole else given
        if not isinstance(given, list) or len(given) != 1 or not _is_answer(given[0]):
            return (
                f"{name!r} must be text, one assistant message, or the prompt and that message, "
                f"not {_of(row, name)!r:.60}"
            )
        made[name] = _turn("assistant", given[0]["content"])
    kept = ("prompt_id", "score_chosen", "score_rejected")
    return made | {name: row[name] for name in kept if name in row}


def _is_answer(message: Any) -> bool:
    if not isinstance(message, dict):
        return False
    return _of(message, "role") == "assistant" and isinstance(_of(message, "content"), str)


def _turn(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def _of(row: Row, name: str) -> Any:
    return row[name] if name in row else None
