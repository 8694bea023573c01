"""Model cards of exported directories: what was trained, then the card of the base model."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ntkrl.models.hf_files import CARD, HUB_NAME

INHERITED = ("license", "license_name", "license_link", "language")
"""Metadata of the base's card that hold for a model trained from it."""
MOST_BYTES = 2**20
"""Of a base's card; what follows is left out."""


@dataclasses.dataclass(frozen=True)
class Training:
    """Facts of a training run for the card.

    facts: label to value, in the order of the card.
    tags: of the metadata.
    """

    facts: Mapping[str, Any]
    tags: tuple[str, ...] = ()


def write_card(
    base: str | None,
    directory: str | None,
    training: Training | None,
    library: str = "transformers",
) -> str:
    """Return the README.md of a model trained from another.

    Args:
      base: name or path of the base model as the user gave it, or None for a new model.
      directory: of the base model, whose card is appended; or None.
      training: of the model; None for one that is only converted.
      library: that loads the directory.
    """
    import huggingface_hub  # slow to import

    metadata, card = _base_card(directory)
    kept = {name: metadata[name] for name in INHERITED if _is_text(metadata.get(name))}
    if base is not None and HUB_NAME.fullmatch(base) and not Path(base).exists():
        kept["base_model"] = base
    training = Training({}) if training is None else training
    data = huggingface_hub.ModelCardData(
        **kept, library_name=library, tags=["ntkrl", *training.tags]
    )
    facts = {"Base model": "none: trained from new weights" if base is None else f"`{base}`"}
    rows = [f"- {label}: {value}" for label, value in {**facts, **training.facts}.items()]
    text = "\n".join(
        ["---", data.to_yaml(), "---", "", "# Model trained with ntkrl", "", *rows, ""]
    )
    if card:
        text += f"\n## Card of the base model\n\n{card.strip()}\n"
    return text


def _is_text(value: Any) -> bool:
    """Return whether a value of a card's metadata is text or a list of texts."""
    values = value if isinstance(value, list) else [value]
    return all(isinstance(each, str) for each in values)


def _base_card(directory: str | None) -> tuple[dict[str, Any], str]:
    """Return metadata and text of a model's README.md; empty without one."""
    import huggingface_hub

    path = None if directory is None else Path(directory) / CARD
    if path is None or not path.is_file():
        return {}, ""
    with path.open("rb") as file:
        content = file.read(MOST_BYTES).decode("utf-8", errors="replace")
    try:
        card = huggingface_hub.ModelCard(content, ignore_metadata_errors=True)
        metadata = card.data.to_dict()
    except Exception:  # of several libraries: a damaged card is text
        return {}, content
    return metadata, card.text
