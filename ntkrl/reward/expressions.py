"""Reward of the built-in task: does the completion write the target as an expression?

    expression := term (('+' | '-') term)*
    term       := factor ('*' factor)*
    factor     := integer | '(' expression ')'

Read by recursive descent and never by `eval`: completions are untrusted. Caps keep the work
of one completion bounded. White space is no part of the grammar.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MAX_CHARACTERS = 64
MAX_NESTING = 16
MAX_DIGITS = 6
DIGITS = "0123456789"  # str.isdigit would let other scripts and superscripts pass


def evaluate(text: str) -> int | None:
    """Return the value of an expression.

    Args:
      text: at most 64 characters, parentheses at most 16 deep, integers of 1 to 6 digits
        (leading zeros allowed).

    Returns:
      The value, or None if the text is no expression of the grammar or breaks a cap.
    """
    if len(text) > MAX_CHARACTERS:
        return None
    parsed = _expression(text, 0, 0)
    if parsed is None or parsed[1] != len(text):
        return None
    return parsed[0]


def score(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    target: Sequence[int | None],
    **columns: Any,
) -> list[float | None]:
    """Give 1 to completions that equal their target by at least one operator, else 0.

    The bare target is worth nothing: copying the prompt is no answer.

    Args:
      prompts: not read.
      completions: B texts, or B lists of messages of which the last is read.
      completion_ids: not read.
      target: B integers; None where the task does not apply.
      **columns: not read.

    Returns:
      B rewards, 0.0 or 1.0, None where the target is None.

    Raises:
      ValueError: a target is neither an integer nor None.
    """
    wrong = [f"row {row}: {value!r}" for row, value in enumerate(target) if not _is_target(value)]
    if wrong:
        raise ValueError(
            f"the column 'target' holds integers (None where absent), but {'; '.join(wrong[:10])}"
        )
    return [
        None if value is None else float(_solves(completion, value))
        for completion, value in zip(completions, target, strict=True)
    ]


def _is_target(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def _solves(completion: Any, target: int) -> bool:
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    # Every operator of the grammar has two sides, so its presence is its use.
    return evaluate(text) == target and any(operator in text for operator in "+-*")


# Each reader takes the text, a position and the open parentheses, and returns the value and
# the position after it, or None.


def _expression(text: str, at: int, nesting: int) -> tuple[int, int] | None:
    parsed = _term(text, at, nesting)
    while parsed is not None and text[parsed[1] : parsed[1] + 1] in ("+", "-"):
        value, at = parsed
        right = _term(text, at + 1, nesting)
        if right is None:
            return None
        parsed = (value + right[0] if text[at] == "+" else value - right[0], right[1])
    return parsed


def _term(text: str, at: int, nesting: int) -> tuple[int, int] | None:
    parsed = _factor(text, at, nesting)
    while parsed is not None and text[parsed[1] : parsed[1] + 1] == "*":
        right = _factor(text, parsed[1] + 1, nesting)
        if right is None:
            return None
        parsed = (parsed[0] * right[0], right[1])
    return parsed


def _factor(text: str, at: int, nesting: int) -> tuple[int, int] | None:
    if text[at : at + 1] == "(":
        if nesting == MAX_NESTING:
            return None
        inner = _expression(text, at + 1, nesting + 1)
        if inner is None or text[inner[1] : inner[1] + 1] != ")":
            return None
        return inner[0], inner[1] + 1
    end = at
    while end < len(text) and text[end] in DIGITS:
        end += 1
    if not 1 <= end - at <= MAX_DIGITS:
        return None
    return int(text[at:end]), end
