"""The table of every metric: on the report page, and as Markdown."""

from __future__ import annotations

from typing import NamedTuple

from ntkrl.report.names import ALIASES, DIFFERENT, FAMILIES, GLOSSARY, TIMINGS

COLUMNS = ("metric", "unit", "meaning", "elsewhere")


class Entry(NamedTuple):
    """One metric; elsewhere: `(library, its name)` where another one measures the same."""

    name: str
    unit: str
    meaning: str
    elsewhere: list[tuple[str, str]]


def entries() -> list[Entry]:
    """Return every metric, those with a user's own word in them and timings last."""
    return [
        Entry(
            name, *row, [(style, table[name]) for style, table in ALIASES.items() if name in table]
        )
        for name, row in (GLOSSARY | FAMILIES | TIMINGS).items()
    ]


def format_glossary() -> str:
    """Return the table as Markdown, and below it the names that measure something else."""
    lines = [_row(*COLUMNS), "|---" * len(COLUMNS) + "|"]
    for entry in entries():
        elsewhere = ", ".join(f"{style} `{name}`" for style, name in entry.elsewhere)
        lines.append(_row(f"`{entry.name}`", entry.unit, entry.meaning, elsewhere))
    lines += ["", "Names of other libraries that stand for something else:", ""]
    lines += [_row("library", "name", "stands for"), "|---|---|---|"]
    for style, table in DIFFERENT.items():
        lines += [_row(style, f"`{name}`", meaning) for name, meaning in table.items()]
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
