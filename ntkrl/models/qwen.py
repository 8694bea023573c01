"""Qwen2 / 2.5 (biases on queries, keys, values) and Qwen3 (norms on queries and keys).

Source: Yang et al. 2407.10671, 2505.09388; tensor names and arithmetic as in transformers'
Qwen2ForCausalLM and Qwen3ForCausalLM.
"""

import functools
from collections.abc import Mapping
from typing import Any

from ntkrl.models import llama
from ntkrl.models.decoder import Config
from ntkrl.models.family import ConfigReader
from ntkrl.models.rope_config import read_rope


def parse(generation: int, raw: Mapping[str, Any]) -> Config:
    """Read the config.json of generation 2 or 3."""
    reader = ConfigReader(raw)
    sizes = llama.read_sizes(reader, None if generation == 2 else 128, 32)
    count = sizes["num_hidden_layers"]
    window, first = None, count
    if reader.boolean("use_sliding_window", False):
        window = reader.optional_integer("sliding_window", 4096)
        first = reader.integer("max_window_layers", 28)
    default = [llama.FULL if i < first else llama.SLIDING for i in range(count)]
    ropes = dict.fromkeys((llama.FULL, llama.SLIDING), read_rope(reader, sizes["head_dim"]))
    bias = generation == 2 or reader.boolean("attention_bias", False)
    config = Config(
        architecture=f"Qwen{generation}ForCausalLM",
        **sizes,
        **llama.read_kinds(reader, default, window, ropes),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", False),
        attention_bias=bias,
        output_bias=bias and generation == 3,
        query_key_norm=generation == 3,
        extra={"model_type": f"qwen{generation}", **raw},
    )
    reader.finish(f"Qwen{generation}")
    return config


FAMILIES = tuple(
    llama.family(
        f"Qwen{n}ForCausalLM",
        label,
        functools.partial(parse, n),
        f"Qwen{n}ForSequenceClassification",
    )
    for n, label in ((2, "Qwen2 / 2.5"), (3, "Qwen3"))
)
