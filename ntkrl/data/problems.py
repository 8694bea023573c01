"""How many mistakes of one file become one message."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 10
"""Problems spelled out before the rest is only counted."""


def listed(problems: Sequence[str]) -> str:
    """Return the problems as indented lines, the first ten in full and the rest counted."""
    lines = [f"\n  {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"\n  and {len(problems) - SHOWN} more")
    return "".join(lines)
