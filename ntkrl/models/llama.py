"""Llama 2 and 3, with Llama 3's rope scaling.

Source: Touvron et al. 2307.09288, Grattafiori et al. 2407.21783; tensor names and arithmetic as in
transformers' LlamaForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ntkrl.models import decoder
from ntkrl.models.reading import ConfigReader

ARCHITECTURE = "LlamaForCausalLM"


def parse(raw: Mapping[str, Any]) -> decoder.Config:
    """Read config.json.

    Args:
      raw: the parsed JSON.

    Raises:
      ValueError: missing or impossible entries, all in one message.
    """
    reader = ConfigReader(raw)
    sizes = decoder.read_sizes(reader)
    bias = reader.boolean("attention_bias", False)
    reader.fixed("pretraining_tp", 1)
    config = decoder.Config(
        architecture=ARCHITECTURE,
        **sizes,
        hidden_act=reader.choice("hidden_act", "silu", decoder.ACTIVATIONS),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", False),
        kinds=(decoder.Kind(reader.rope(sizes["head_dim"])),),
        layer_kinds=(0,) * sizes["num_hidden_layers"],
        query_scale=sizes["head_dim"] ** -0.5,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=reader.boolean("mlp_bias", False),
        extra={"model_type": "llama", **raw},
    )
    reader.finish("Llama")
    return config


FAMILIES = (decoder.family(ARCHITECTURE, "Llama 2 / 3", parse, "LlamaForSequenceClassification"),)
