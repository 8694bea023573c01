"""Prompts with their columns, read from a file or directory (see published.py), checked row by row.

Two forms, as in TRL: *standard* (`{"prompt": "text"}`) and *conversational*
(`{"prompt": [{"role": "user", "content": "text"}]}`). A file holds one of them. Where no columns
are needed, a plain text file with one prompt per line will do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ntkrl.data.problems import listed
from ntkrl.data.published import Rows, read_rows

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
EXAMPLES = (
    '{"prompt": "text"} or {"prompt": [{"role": "user", "content": "text"}]}, '
    "one object per line or row, other keys become columns"
)


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order, and what is known about each.

    prompts: one text each (standard) or one list of messages each (conversational).
    columns: name to one value per prompt; None where a row has no value.
    source: where the prompts came from, for messages.
    """

    prompts: tuple[str | list[Message], ...]
    columns: dict[str, list[Any]]
    source: str

    @property
    def conversational(self) -> bool:
        """True when prompts are lists of messages."""
        return len(self.prompts) > 0 and isinstance(self.prompts[0], list)


def read_set(path: str | Path, required: Sequence[str] = ("prompt",)) -> PromptSet:
    """Read and check the rows of a file or a directory.

    Args:
      path: UTF-8 JSON Lines (blank lines are skipped), or what else published.py reads.
      required: keys every row must hold (null counts as missing); "prompt" always is one.
        "completion", "chosen" and "rejected" among them are checked too: text for standard
        prompts, a list of messages for conversational ones.

    Returns:
      The rows in file order. Keys other than "prompt" become columns.

    Raises:
      ValueError: what `published.read_rows` raises, no rows, or rows that are wrong; all of them
        are named as file:line, or file and row, in one message.
    """
    return checked(read_rows(path), required)


def checked(found: Rows, required: Sequence[str] = ("prompt",)) -> PromptSet:
    """Check rows and return them as a set; see `read_set`."""
    _, _, rows, problems = found
    if not rows and not problems:
        raise ValueError(f"{found.source}: the file is empty. Expected {EXAMPLES}.")
    form = _form(found)
    problems = problems + [
        (number, fault) for number, row in rows for fault in _faults(row, required, form)
    ]
    if problems:
        # Stable by number, since what is no object is found before mistakes of content.
        ordered = [
            f"{found.place(number)}: {fault}"
            for number, fault in sorted(problems, key=lambda p: p[0])
        ]
        raise ValueError(
            f"{found.source}: problems: {len(problems)}{listed(ordered)}\nExpected {EXAMPLES}."
        )
    names = dict.fromkeys(name for _, row in rows for name in row if name != "prompt")
    return PromptSet(
        prompts=tuple(row["prompt"] for _, row in rows),
        columns={name: [row[name] if name in row else None for _, row in rows] for name in names},
        source=found.source,
    )


def join(prompt_sets: Sequence[PromptSet]) -> PromptSet:
    """Put prompt sets one after the other.

    Args:
      prompt_sets: at least one.

    Returns:
      Their rows; a column that a set does not have is None there.

    Raises:
      ValueError: text prompts in some and lists of messages in others.
    """
    forms = {one.conversational: one.source for one in prompt_sets}
    if len(forms) > 1:
        raise ValueError(
            f"mixed forms: prompts are text in {forms[False]} and lists of messages in "
            f"{forms[True]}; use one."
        )
    names = dict.fromkeys(name for one in prompt_sets for name in one.columns)
    return PromptSet(
        prompts=tuple(prompt for one in prompt_sets for prompt in one.prompts),
        columns={name: [v for one in prompt_sets for v in _column(one, name)] for name in names},
        source=", ".join(one.source for one in prompt_sets),
    )


def _column(prompt_set: PromptSet, name: str) -> list[Any]:
    held = prompt_set.columns
    return held[name] if name in held else [None] * len(prompt_set.prompts)


def read_prompts(path: str | Path) -> PromptSet:
    """Read a file of prompts alone: one per line if its name ends in `.txt`, else as `read_set`.

    Args:
      path: a UTF-8 file; blank lines are skipped, other white space of a text line is kept.

    Returns:
      The prompts in file order; a text file has no columns.

    Raises:
      ValueError: the file cannot be read or holds no prompts, or what `read_set` raises.
    """
    path = Path(path)
    if path.suffix != ".txt":
        return read_set(path)
    if path.is_dir() or not path.exists():
        wrong = "is a directory" if path.exists() else "no such file"
        raise ValueError(f"{path}: {wrong}. Expected a text file with one prompt per line.")
    try:
        # Windows editors put a byte-order mark first; it is no part of the first prompt.
        text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8."
        ) from error
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    prompts = tuple(line for line in lines if line.strip())
    if not prompts:
        raise ValueError(f"{path}: the file is empty. Expected one prompt per line.")
    return PromptSet(prompts=prompts, columns={}, source=str(path))


def _form(found: Rows) -> tuple[type, str] | None:
    """Return the form of the first row with a text or list prompt, and which row that is."""
    for number, row in found.rows:
        if "prompt" in row and isinstance(row["prompt"], str | list):
            return type(row["prompt"]), f"{found.unit} {number}"
    return None


def _faults(
    row: dict[str, Any], required: Sequence[str], form: tuple[type, str] | None
) -> list[str]:
    wanted = dict.fromkeys(("prompt", *required))
    faults = [
        f"no {name!r} (missing or null); the row has {', '.join(row) if row else 'no keys'}"
        for name in wanted
        if name not in row or row[name] is None
    ]
    if "prompt" in row and row["prompt"] is not None:
        faults += _prompt_faults(row["prompt"], form)
    for name in ("completion", "chosen", "rejected"):
        if name in wanted and name in row and row[name] is not None:
            faults += _completion_faults(name, row[name], form)
    return faults


def _prompt_faults(prompt: Any, form: tuple[type, str] | None) -> list[str]:
    if not isinstance(prompt, str | list):
        return [f"'prompt' is {type(prompt).__name__}; expected text or a list of messages"]
    if form is not None and not isinstance(prompt, form[0]):
        here, there = ("a list of messages", "text")[:: 1 if isinstance(prompt, list) else -1]
        return [f"mixed forms: this prompt is {here}, that of {form[1]} is {there}; use one"]
    if isinstance(prompt, str):
        return ["empty prompt"] if not prompt.strip() else _text_faults("'prompt'", prompt)
    faults = _message_faults("prompt", prompt)
    if not faults and not any(message["content"].strip() for message in prompt):
        return ["empty prompt (no message has content)"]
    return faults


def _completion_faults(name: str, completion: Any, form: tuple[type, str] | None) -> list[str]:
    if form is None:
        return []
    if not isinstance(completion, form[0]):
        wanted = "a list of messages" if form[0] is list else "text"
        found = type(completion).__name__
        return [f"{name!r} is {found}; expected {wanted}, the form of the prompts"]
    if isinstance(completion, str):
        return _text_faults(repr(name), completion)
    return _message_faults(name, completion)


def _message_faults(name: str, messages: list[Any]) -> list[str]:
    if not messages:
        return [f"empty {name} (a list without messages)"]
    faults = []
    for i, message in enumerate(messages):
        where = f"message {i} of {name!r}"
        if not isinstance(message, dict):
            found = type(message).__name__
            faults.append(f"{where} is {found}; expected an object with 'role' and 'content'")
        elif "role" not in message or message["role"] not in ROLES:
            found = repr(message["role"]) if "role" in message else "missing"
            faults.append(f"{where}: role is {found}; expected one of {', '.join(ROLES)}")
        elif "content" not in message or not isinstance(message["content"], str):
            found = type(message["content"]).__name__ if "content" in message else "missing"
            faults.append(f"{where}: content is {found}; expected text")
        else:
            faults += _text_faults(where, message["content"])
    return faults


def _text_faults(name: str, text: str) -> list[str]:
    # JSON can escape half of a surrogate pair, which is no character and stops a tokenizer.
    if any("\ud800" <= character <= "\udfff" for character in text):
        return [f"{name} holds half of a surrogate pair (\\ud800-\\udfff), which is no character"]
    return []
