"""The architectures that can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ntkrl.models import gemma, gpt2, gpt_neox, llama, qwen
from ntkrl.models.family import Family

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for file in (gpt_neox, llama, qwen, gemma, gpt2)
    for family in file.FAMILIES
}
SCORERS: dict[str, Family] = {family.scorer: family for family in FAMILIES.values()}


def named(raw: dict[str, Any]) -> str | None:
    """Return the one architecture a config.json names, or None."""
    found = raw["architectures"] if "architectures" in raw else None
    one = isinstance(found, list) and len(found) == 1 and isinstance(found[0], str)
    return found[0] if one else None


def family_of(raw: dict[str, Any], where: Path) -> Family:
    """Return the family of a language model's config.json.

    Raises:
      ValueError: another architecture; says which are known.
    """
    name = named(raw)
    if name in FAMILIES:
        return FAMILIES[name]
    shown = raw["architectures"] if "architectures" in raw else None
    raise ValueError(
        f"{where}: architecture {shown!r} is unknown; known are {', '.join(sorted(FAMILIES))}."
    )
