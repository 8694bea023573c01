"""The metric glossary of `metrics.toml`: unit and meaning of every metric, and its other names.

`GLOSSARY` and `PATTERNS` map every name in `metrics.jsonl` to its unit and meaning; other names are
refused. Dashboards also get `TIMINGS` and other libraries' names of the same quantities.
"""

import importlib.resources
import re
import tomllib
from collections.abc import Mapping
from typing import Any, NamedTuple

_PLACEHOLDER = re.compile("<[a-z]+>")
_TABLES = tomllib.loads(
    importlib.resources.files("ntkrl.report").joinpath("metrics.toml").read_text("utf-8")
)

GLOSSARY: dict[str, tuple[str, str]] = {n: (u, m) for n, (u, m) in _TABLES["metrics"].items()}
"""Unit and meaning by name."""
for _part, _meaning in _TABLES["ledger"].items():
    GLOSSARY[f"ledger/{_part}_share"] = ("share", f"⟨Δ_part, Δ⟩/⟨Δ, Δ⟩, Δ measured; {_meaning}")
    GLOSSARY[f"ledger/{_part}_entropy"] = ("nats", f"mean ΔH of probe tokens; {_meaning}")
GLOSSARY |= {name: (unit, text) for name, (unit, text) in _TABLES["ledger_metrics"].items()}
PATTERNS: dict[str, tuple[str, str]] = {n: (u, m) for n, (u, m) in _TABLES["patterns"].items()}
"""The same for names with a placeholder."""
TIMINGS: dict[str, tuple[str, str]] = {n: (u, m) for n, (u, m) in _TABLES["timings"].items()}
NOT_TRAINING = ("probe_seconds", "look_seconds", "eval_seconds")
"""Timings of activities that are not training; see `training_timings`."""
ALIASES: dict[str, dict[str, str]] = _TABLES["aliases"]
"""By library, our name → its name of the same quantity (at its defaults)."""
FALSE_FRIENDS: dict[str, dict[str, str]] = _TABLES["different"]
"""By library, its names of quantities that we do not measure, or measure differently."""
COLUMNS = ("metric", "unit", "meaning", "elsewhere")


class GlossaryEntry(NamedTuple):
    """One metric; elsewhere: (library, its name there) for each library that measures the same."""

    name: str
    unit: str
    meaning: str
    elsewhere: tuple[tuple[str, str], ...]


def entries() -> list[GlossaryEntry]:
    """Return every metric; patterns and timings last."""
    return [
        GlossaryEntry(
            name,
            unit,
            meaning,
            tuple((style, table[name]) for style, table in ALIASES.items() if name in table),
        )
        for name, (unit, meaning) in (GLOSSARY | PATTERNS | TIMINGS).items()
    ]


def format_glossary() -> str:
    """Return the glossary as Markdown, followed by the names in FALSE_FRIENDS."""
    lines = [_markdown(*COLUMNS), "|---" * len(COLUMNS) + "|"]
    for entry in entries():
        elsewhere = ", ".join(f"{style} `{name}`" for style, name in entry.elsewhere)
        lines.append(_markdown(f"`{entry.name}`", entry.unit, entry.meaning, elsewhere))
    lines += ["", "Names of other libraries that stand for something else:", ""]
    lines += [_markdown("library", "name", "stands for"), "|---|---|---|"]
    for style, table in FALSE_FRIENDS.items():
        lines += [_markdown(style, f"`{name}`", meaning) for name, meaning in table.items()]
    return "\n".join(lines)


def is_known(name: str) -> bool:
    """Return whether `name` is in the glossary or matches one of the patterns."""
    return name in GLOSSARY or any(_match(pattern, name) is not None for pattern in PATTERNS)


def training_timings(timings: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of a line of timings that were spent training, by activity.

    Probes, evaluations and times that are null are left out.
    """
    return {
        name: seconds
        for name, seconds in timings.items()
        if name.endswith("_seconds") and name not in NOT_TRAINING and seconds is not None
    }


def aliased(style: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that another library measures too, under its names.

    Args:
      style: a key of ALIASES.
      values: by our names, "step" and timings included.
    """
    renamed = {}
    for ours, theirs in ALIASES[style].items():
        for name, value in values.items():
            word = _match(ours, name)
            if word is not None:
                renamed[_PLACEHOLDER.sub("{}", theirs).format(word)] = value
    return renamed


def _match(pattern: str, name: str) -> str | None:
    """Return the text at the pattern's placeholder ("" without one), None if names differ."""
    match = re.fullmatch(_PLACEHOLDER.sub("(.+)", re.escape(pattern)), name)
    return None if match is None else "".join(match.groups())


def _markdown(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
