"""Text of error messages. Imports no JAX, as reward workers start without it."""

import contextlib
import difflib
import errno
import os
import re
import select
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

MAX_PROBLEMS = 10
LONGEST_REASON = 300  # characters of a parser's message
PLACE_ERRORS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR),
    *(errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
}
"""Errors of a path, which another path mends."""
OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory|Ran out of memory", re.I)
"""Messages of JAX's errors of memory."""
ROW = re.compile(r"^  row (\d+)\b", re.MULTILINE)
"""Beginning of a line of `listed` about a row."""


def listed(problems: Sequence[str]) -> str:
    """Return the first MAX_PROBLEMS problems as indented lines, and the number of others."""
    lines = [f"\n  {problem}" for problem in problems[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        lines.append(f"\n  and {len(problems) - MAX_PROBLEMS} more")
    return "".join(lines)


def with_places(message: str, place: Callable[[int], str]) -> str:
    """Return a message whose lines of `listed` name places of rows for their numbers.

    Args:
      message: its lines begin with "row 5" where they are about a row.
      place: from a row's number to its place, such as "prompts.jsonl:6".
    """
    return ROW.sub(lambda match: f"  {place(int(match[1]))}", message)


def printable(text: str) -> str:
    """Return lines with "?" for control codes, which could move a terminal's cursor."""

    def harmless(character: str) -> bool:
        return (
            character.isprintable()
            or character in "\n\t"
            or unicodedata.category(character) == "Zs"  # other spaces
        )

    return "".join(c if harmless(c) else "?" for c in text)


def notify(message: str) -> None:
    """Print a message on standard error, unless its terminal or pipe is closed."""
    with contextlib.suppress(OSError, ValueError):  # a closed terminal or pipe
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        print(message, file=sys.stderr, flush=True)


def output_is_closed(failed: bool = False) -> bool:
    """Return whether nobody reads standard output any more, as after `| head`.

    What it still holds is then dropped, so that nothing fails when the process ends.

    Args:
      failed: whether a write failed already, after which standard output may hold nothing.
    """
    try:
        sys.stdout.flush()
        closed = failed and _has_no_reader(sys.stdout.fileno())
    except BrokenPipeError:
        closed = True
    except (OSError, ValueError):  # no file, as a program's
        return False
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


def _has_no_reader(descriptor: int) -> bool:
    """Return whether a descriptor is a pipe or a socket that nobody reads."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return "; did you mean …?" with the known name most similar to a wrong one, or ""."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    same = [each for each in names if each.casefold() == name.casefold()]  # as "GRPO" and "grpo"
    best = [*same, *near]
    return f"; did you mean {best[0]!r}?" if best else ""


def not_among(name: str, value: Any, allowed: Iterable[str]) -> str:
    """Return that a setting's value is none of those allowed, with the nearest."""
    names = list(allowed)
    hint = did_you_mean(value, names) if isinstance(value, str) else ""
    return f"{name} {quoted(value)} is not among {', '.join(names)}{hint}"


def quoted(value: Any, width: int = 80) -> str:
    """Return a value as Python writes it, cut to a width; a file's value may be megabytes."""
    return _shortened(repr(value), width)


def _shortened(text: str, width: int = 400) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def joined(problems: Iterable[str], separator: str = "; ", most: int = 20) -> str:
    """Return the distinct problems in one line, at most so many and the number of others."""
    distinct = list(dict.fromkeys(problems))
    text = separator.join(_shortened(problem) for problem in distinct[:most])
    return text + (f"{separator}and {len(distinct) - most} more" if len(distinct) > most else "")


@contextlib.contextmanager
def parser_sentences(problem: str, remedy: str) -> Iterator[None]:
    """Turn exceptions of a tokenizer's parsers, and panics of Rust code, into a ValueError."""
    try:
        yield
    except BaseException as error:
        # a panic is no Exception; malformed files raise any
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        raise ValueError(
            f"{problem} ({type(error).__name__}: {reason}). Remote code is never run; {remedy}."
        ) from error


def unwritable(directory: Path, error: OSError, option: str) -> str:
    """Return a sentence about a directory that cannot be made or written.

    Args:
      directory: that a command writes.
      error: one of PLACE_ERRORS.
      option: that names another directory, in words.
    """
    fix = f"give a directory that you may write to ({option})."
    places = (directory, *directory.parents)
    files = [path for path in places if path.exists() and not path.is_dir()]
    if files:
        return f"{directory} cannot be a directory, since {files[0]} is a file; {fix}"
    return f"{directory} cannot be written ({error.strerror}); {fix}"


def path_text(value: Any, name: str, kind: str) -> str:
    """Return the text of a path that a program passes.

    Args:
      value: text or a path object, not empty.
      name: of the argument.
      kind: of the path, in words.

    Raises:
      ValueError: anything else.
    """
    if isinstance(value, str | os.PathLike) and str(os.fspath(value)).strip():
        return str(os.fspath(value))
    raise ValueError(f"{name} is {quoted(value)} ({type(value).__name__}); pass {kind}.")
