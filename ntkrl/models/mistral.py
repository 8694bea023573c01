"""Mistral: Llama with a sliding window in every layer.

Source: Jiang et al. 2310.06825; tensor names and arithmetic as in transformers' MistralForCausalLM.
"""

from collections.abc import Mapping
from typing import Any

from ntkrl.models import llama
from ntkrl.models.decoder import Config
from ntkrl.models.family import ConfigReader
from ntkrl.models.rope_config import read_rope

ARCHITECTURE = "MistralForCausalLM"


def parse(raw: Mapping[str, Any]) -> Config:
    """Read config.json."""
    reader = ConfigReader(raw)
    sizes = llama.read_sizes(reader, key_value_heads=8)
    rope = read_rope(reader, sizes["head_dim"])
    config = Config(
        architecture=ARCHITECTURE,
        **sizes,
        **llama.uniform_kinds(sizes, rope, reader.optional_integer("sliding_window", 4096)),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", False),
        extra={"model_type": "mistral", **raw},
    )
    reader.finish("Mistral")
    return config


FAMILIES = (llama.family(ARCHITECTURE, "Mistral", parse, "MistralForSequenceClassification"),)
