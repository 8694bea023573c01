"""Registry of the supported architectures.

A new family is a module with its FAMILIES, imported and listed here.
"""

from pathlib import Path
from typing import Any

from ntkrl.messages import quoted
from ntkrl.models import gemma, gpt, llama, mistral, olmo, phi, qwen, qwen_moe, smollm
from ntkrl.models.family import Family

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for module in (gpt, llama, qwen, qwen_moe, gemma, mistral, olmo, smollm, phi)
    for family in module.FAMILIES
}
SCORERS: dict[str, Family] = {family.scorer: family for family in FAMILIES.values()}


def architecture_of(raw: dict[str, Any]) -> str | None:
    """Return the single architecture named by a config.json, or None."""
    names = raw["architectures"] if "architectures" in raw else None
    if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str):
        return names[0]
    return None


def family_of(raw: dict[str, Any], source: str | Path) -> Family:
    """Return the family of a language model's config.json.

    Raises:
      ValueError: another architecture; the message lists the known ones.
    """
    name = architecture_of(raw)
    if name in FAMILIES:
        return FAMILIES[name]
    names = raw["architectures"] if "architectures" in raw else None
    raise ValueError(
        f"{source}: architecture {quoted(names)} is unknown; known are "
        f"{', '.join(sorted(FAMILIES))}."
    )
