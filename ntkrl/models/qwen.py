"""Qwen2 / 2.5 (biases on queries, keys, values) and Qwen3 (norms on queries and keys).

Source: Yang et al. 2407.10671, 2505.09388; tensor names and arithmetic as in transformers'
Qwen2ForCausalLM and Qwen3ForCausalLM.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from ntkrl.models import decoder
from ntkrl.models.reading import ConfigReader


def parse(generation: int, raw: Mapping[str, Any]) -> decoder.Config:
    """Read config.json.

    Args:
      generation: 2 or 3.
      raw: the parsed JSON.

    Raises:
      ValueError: missing or impossible entries, all in one message.
    """
    reader = ConfigReader(raw)
    sizes = decoder.read_sizes(reader, None if generation == 2 else 128)
    count = sizes["num_hidden_layers"]
    window, first = None, count
    if reader.boolean("use_sliding_window", False):
        window = reader.optional_integer("sliding_window", 4096)
        first = reader.integer("max_window_layers", 28)
    usual = [decoder.FULL if i < first else decoder.SLIDING for i in range(count)]
    rope = reader.rope(sizes["head_dim"])
    kinds, layer_kinds = decoder.read_kinds(reader, usual, window, {}, rope)
    bias = generation == 2 or reader.boolean("attention_bias", False)
    config = decoder.Config(
        architecture=f"Qwen{generation}ForCausalLM",
        **sizes,
        hidden_act=reader.choice("hidden_act", "silu", decoder.ACTIVATIONS),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", False),
        kinds=kinds,
        layer_kinds=layer_kinds,
        query_scale=sizes["head_dim"] ** -0.5,
        attention_bias=bias,
        output_bias=bias and generation == 3,
        query_key_norm=generation == 3,
        extra={"model_type": f"qwen{generation}", **raw},
    )
    reader.finish(f"Qwen{generation}")
    return config


FAMILIES = tuple(
    decoder.family(
        f"Qwen{n}ForCausalLM",
        label,
        functools.partial(parse, n),
        f"Qwen{n}ForSequenceClassification",
    )
    for n, label in ((2, "Qwen2 / 2.5"), (3, "Qwen3"))
)
