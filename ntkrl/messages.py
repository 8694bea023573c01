"""Text of error messages. Imports no JAX, as reward workers start without it."""

from __future__ import annotations

from collections.abc import Sequence

MAX_PROBLEMS = 10


def listed(problems: Sequence[str]) -> str:
    """Return the first MAX_PROBLEMS problems as indented lines, and the number of others."""
    lines = [f"\n  {problem}" for problem in problems[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        lines.append(f"\n  and {len(problems) - MAX_PROBLEMS} more")
    return "".join(lines)
