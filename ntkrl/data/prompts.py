"""Prompts with their columns, read from a file or directory (see published.py) and validated.

Two forms, as in TRL: *standard* (`{"prompt": "text"}`) and *conversational*
(`{"prompt": [{"role": "user", "content": "text"}]}`), one of them per file. A plain text file has
one prompt per line and no columns.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ntkrl.data.published import Rows, read_bytes, read_rows
from ntkrl.messages import listed, with_places

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_NAMES = {
    "prompt": ("question", "problem", "instruction", "query", "input", "messages", "text"),
    "completion": ("response", "output", "answer", "solution"),
}
"""Names of columns in data sets, by ours."""
EXAMPLES = (
    '{"prompt": "text"} or {"prompt": [{"role": "user", "content": "text"}]}, '
    "one object per line or row, other keys become columns"
)


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order, with columns.

    prompts: a text each (standard) or a list of messages each (conversational).
    columns: name to one value per prompt; None if the row has no value.
    source: of the prompts, for messages.
    places: name of each row in its file, such as "prompts.jsonl:6"; empty if rows have none.
    """

    prompts: tuple[str | list[Message], ...]
    columns: dict[str, list[Any]]
    source: str
    places: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    @property
    def conversational(self) -> bool:
        """Return whether prompts are lists of messages."""
        return len(self.prompts) > 0 and isinstance(self.prompts[0], list)

    def place(self, row: int) -> str:
        """Return the name of a row for messages."""
        return self.places[row] if self.places else f"row {row} of {self.source}"

    @contextlib.contextmanager
    def named_rows(self) -> Iterator[None]:
        """Name rows by their places in the errors that a block raises about their numbers."""
        try:
            yield
        except ValueError as error:
            raise ValueError(with_places(str(error), self.place)) from error


def read_set(path: str | Path, required: Sequence[str] = ("prompt",)) -> PromptSet:
    """Read and validate the rows of a file or a directory; other keys than "prompt" become columns.

    Args:
      path: UTF-8 JSON Lines (blank lines are skipped), or another form of published.py.
      required: keys that every row must have (null counts as missing), in addition to "prompt".
        "completion", "chosen" and "rejected" must be text for standard prompts, a list of
        messages for conversational ones.

    Raises:
      ValueError: errors of `read_rows`, no rows, or invalid rows; the message lists all of them
        as file:line, or file and row.
    """
    return validate_rows(read_rows(path), required)


def validate_rows(table: Rows, required: Sequence[str] = ("prompt",)) -> PromptSet:
    """Validate rows and return them as a set; see `read_set`."""
    rows, problems = table.rows, list(table.problems)
    if not rows and not problems:
        raise ValueError(f"{table.source}: the file is empty. Expected {EXAMPLES}.")
    form = _form(table)
    problems += [(number, fault) for number, row in rows for fault in _faults(row, required, form)]
    if problems:
        others = [repr(name) for name in dict.fromkeys(required) if name != "prompt"]
        also = f"; here with {', '.join(others)} too" if others else ""
        lines = listed(_described(table, problems))
        raise ValueError(
            f"{table.source}: problems: {len(problems)}{lines}\nExpected {EXAMPLES}{also}."
        )
    names = dict.fromkeys(name for _, row in rows for name in row if name != "prompt")
    return PromptSet(
        prompts=tuple(row["prompt"] for _, row in rows),
        columns={name: [row[name] if name in row else None for _, row in rows] for name in names},
        source=table.source,
        places=tuple(table.place(number) for number, _ in rows),
    )


def _described(table: Rows, problems: list[tuple[int, str]]) -> list[str]:
    """Return a line per problem in the order of the rows, and one for a problem of every row."""
    rows = len({number for number, _ in problems} | {number for number, _ in table.rows})
    counts = collections.Counter(fault for _, fault in problems)
    lines: dict[Any, str] = {}  # by fault where every row has it
    for number, fault in sorted(problems, key=lambda problem: problem[0]):  # stable
        place, everywhere = table.place(number), counts[fault] == rows > 1
        if everywhere:
            place = f"each of {rows} rows, the first at {place}"
        lines.setdefault(fault if everywhere else (number, fault), f"{place}: {fault}")
    return list(lines.values())


def join(prompt_sets: Sequence[PromptSet]) -> PromptSet:
    """Concatenate prompt sets, at least one; columns that a set lacks are None there.

    Raises:
      ValueError: text prompts in some and lists of messages in others.
    """
    forms = {each.conversational: each.source for each in prompt_sets}
    if len(forms) > 1:
        raise ValueError(
            f"mixed forms: prompts are text in {forms[False]} and lists of messages in "
            f"{forms[True]}; use one."
        )
    columns: dict[str, list[Any]] = {}
    for name in dict.fromkeys(name for each in prompt_sets for name in each.columns):
        columns[name] = []
        for each in prompt_sets:
            absent = [None] * len(each.prompts)
            columns[name] += each.columns[name] if name in each.columns else absent
    return PromptSet(
        prompts=tuple(prompt for each in prompt_sets for prompt in each.prompts),
        columns=columns,
        source=", ".join(each.source for each in prompt_sets),
        places=tuple(each.place(row) for each in prompt_sets for row in range(len(each.prompts))),
    )


def read_prompts(path: str | Path) -> PromptSet:
    """Read prompts: one per line if the name ends in `.txt`, else as `read_set`.

    Blank lines are skipped; other white space is preserved.

    Raises:
      ValueError: the file cannot be read or has no prompts, or errors of `read_set`.
    """
    path = Path(path)
    if path.suffix != ".txt":
        return read_set(path)
    if path.is_dir() or not path.exists():
        wrong = "is a directory" if path.exists() else "no such file"
        raise ValueError(f"{path}: {wrong}. Expected a text file with one prompt per line.")
    try:
        text = read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8."
        ) from error
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise ValueError(f"{path}: the file is empty. Expected one prompt per line.")
    places = tuple(f"{path}:{number}" for number, _ in numbered)
    return PromptSet(tuple(line for _, line in numbered), {}, str(path), places)


def _form(table: Rows) -> tuple[Any, str] | None:
    """Return the type of the first text or list prompt, and the name of its row."""
    for number, row in table.rows:
        if "prompt" in row and isinstance(row["prompt"], str | list):
            return type(row["prompt"]), f"{table.unit} {number}"
    return None


def _faults(
    row: dict[str, Any], required: Sequence[str], form: tuple[Any, str] | None
) -> list[str]:
    keys = dict.fromkeys(("prompt", *required))
    faults = [
        f"no {name!r} (missing or null); the row has {', '.join(row) if row else 'no keys'}"
        f"{_renamed(name, row)}"
        for name in keys
        if name not in row or row[name] is None
    ]
    if "prompt" in row and row["prompt"] is not None:
        faults += _prompt_faults(row["prompt"], form)
    for name in ("completion", "chosen", "rejected"):
        if name in keys and name in row and row[name] is not None:
            faults += _completion_faults(name, row[name], form)
    return faults


def _renamed(name: str, row: dict[str, Any]) -> str:
    """Return that a column is to be renamed which data sets call otherwise."""
    names = OTHER_NAMES[name] if name in OTHER_NAMES else ()
    same = [other for other in names if other in row]
    return f"; rename {same[0]!r} to {name!r}" if same else ""


def _prompt_faults(prompt: Any, form: tuple[Any, str] | None) -> list[str]:
    if not isinstance(prompt, str | list):
        return [f"'prompt' is {type(prompt).__name__}; expected text or a list of messages"]
    if form is not None and not isinstance(prompt, form[0]):
        this, other = ("a list of messages", "text")[:: 1 if isinstance(prompt, list) else -1]
        return [f"mixed forms: this prompt is {this}, that of {form[1]} is {other}; use one"]
    if isinstance(prompt, str):
        return ["empty prompt"] if not prompt.strip() else _text_faults("'prompt'", prompt)
    faults = _message_faults("prompt", prompt)
    if not faults and not any(message["content"].strip() for message in prompt):
        return ["empty prompt (no message has content)"]
    return faults


def _completion_faults(name: str, completion: Any, form: tuple[Any, str] | None) -> list[str]:
    if form is None:
        return []
    if not isinstance(completion, form[0]):
        expected = "a list of messages" if form[0] is list else "text"
        actual = type(completion).__name__
        return [f"{name!r} is {actual}; expected {expected}, the form of the prompts"]
    if isinstance(completion, str):
        return _text_faults(repr(name), completion)
    return _message_faults(name, completion)


def _message_faults(name: str, messages: list[Any]) -> list[str]:
    if not messages:
        return [f"empty {name} (a list without messages)"]
    faults = []
    for i, message in enumerate(messages):
        label = f"message {i} of {name!r}"
        if not isinstance(message, dict):
            kind = type(message).__name__
            faults.append(f"{label} is {kind}; expected an object with 'role' and 'content'")
        elif "role" not in message or message["role"] not in ROLES:
            role = repr(message["role"]) if "role" in message else "missing"
            faults.append(f"{label}: role is {role}; expected one of {', '.join(ROLES)}")
        elif "content" not in message or not isinstance(message["content"], str):
            kind = type(message["content"]).__name__ if "content" in message else "missing"
            faults.append(f"{label}: content is {kind}; expected text")
        else:
            faults += _text_faults(label, message["content"])
    return faults


def _text_faults(name: str, text: str) -> list[str]:
    # JSON can escape half of a surrogate pair, on which tokenizers fail
    if any("\ud800" <= character <= "\udfff" for character in text):
        return [f"{name} has half of a surrogate pair (\\ud800-\\udfff), which is not a character"]
    return []
