"""The starting model of a run: the config's model section."""

import dataclasses
from typing import Any

from ntkrl.messages import not_among
from ntkrl.models.layers import REMAT
from ntkrl.numerics import DTYPES

DIRECTIONS = ("all", "mean")
"""Directions of features that may be whitened."""


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The starting model and the changes made to it.

    path: Hugging Face directory, or None for a new model.
    architecture, new: class name and config.json entries of a new model.
    dtype: of the params (masters); float32, bfloat16 or float16.
    compute_dtype: the network runs in, or None for `dtype`.
    untie: give a tied head its own copy of the embedding.
    remat: what the backward pass recomputes: "none", "products" (all of a layer but its products
        with weights) or "all" (the entire layer).
    lora: rank (0 for no adapters), alpha and modules of models.Lora.
    template: chat template given to the tokenizer (see data.read_template), or None.
    vocab_size: rows of the vocabulary, or None for what the model and the tokenizer need.
    whiten: JSONL of texts (prompt, completion) on whose tokens features are made diverse
        (see models.whitened), or None.
    whiten_directions: "all", or "mean" for that of the mean feature alone.
    """

    path: str | None
    architecture: str
    new: dict[str, Any]
    dtype: str
    compute_dtype: str | None
    untie: bool
    remat: str
    lora: dict[str, Any]
    template: str | None
    vocab_size: int | None
    whiten: str | None
    whiten_directions: str

    def __post_init__(self):
        if self.untie and self.lora["rank"]:
            raise ValueError(
                "model.untie and model.lora do not go together; untie and export first."
            )
        if self.remat not in REMAT:
            raise ValueError(f"{not_among('model.remat', self.remat, REMAT)}.")
        if self.whiten_directions not in DIRECTIONS:
            name = "model.whiten_directions"
            raise ValueError(f"{not_among(name, self.whiten_directions, DIRECTIONS)}.")
        if self.whiten is None and self.whiten_directions != "all":
            raise ValueError("model.whiten_directions needs model.whiten, a JSONL file of texts.")
        for name in ("dtype", "compute_dtype"):
            value = getattr(self, name)
            if value not in DTYPES and not (value is None and name == "compute_dtype"):
                raise ValueError(f"{not_among(f'model.{name}', value, DTYPES)}.")
