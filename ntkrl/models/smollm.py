"""SmolLM3: Llama with layers that do not rotate queries and keys.

Source: the SmolLM3 report (Hugging Face 2025), NoPE layers of Yang et al. 2501.18795; tensor names
and arithmetic as in transformers' SmolLM3ForCausalLM.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ntkrl.models import llama
from ntkrl.models.decoder import Config, LayerKind
from ntkrl.models.family import ConfigReader
from ntkrl.models.rope_config import RopeRules, read_rope

ARCHITECTURE = "SmolLM3ForCausalLM"
ROPE = RopeRules(theta=("rope_theta", 2e6))


def parse(raw: Mapping[str, Any]) -> Config:
    """Read config.json."""
    reader = ConfigReader(raw)
    sizes = llama.read_sizes(reader, key_value_heads=4)
    bias = reader.boolean("attention_bias", False)
    config = Config(
        architecture=ARCHITECTURE,
        **sizes,
        **_read_kinds(reader, sizes),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", True),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=reader.boolean("mlp_bias", False),
        extra={"model_type": "smollm3", **raw},
    )
    reader.finish("SmolLM3")
    return config


def _read_kinds(reader: ConfigReader, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments `kinds` and `layer_kinds` of `Config`."""
    count, every = sizes["num_hidden_layers"], reader.integer("no_rope_layer_interval", 4)
    rotates = reader.flags("no_rope_layers", [(i + 1) % every != 0 for i in range(count)])
    window = reader.optional_integer("sliding_window", None)
    slides = reader.boolean("use_sliding_window", False) and window is not None
    default = [llama.SLIDING if slides and not rotated else llama.FULL for rotated in rotates]
    rope = read_rope(reader, sizes["head_dim"], ROPE)
    types = llama.read_kinds(
        reader, default, window, dict.fromkeys((llama.FULL, llama.SLIDING), rope)
    )
    unrotated = dataclasses.replace(rope, scaling="none", attention_factor=1.0)
    layers = [
        LayerKind(rope if rotated else unrotated, types["kinds"][kind].window)
        for rotated, kind in zip(rotates, types["layer_kinds"], strict=True)
    ]
    kinds = tuple(dict.fromkeys(layers))
    return {"kinds": kinds, "layer_kinds": tuple(kinds.index(layer) for layer in layers)}


FAMILIES = (llama.family(ARCHITECTURE, "SmolLM3", parse, "SmolLM3ForSequenceClassification"),)
