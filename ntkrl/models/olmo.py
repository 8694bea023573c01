"""OLMo 2 and OLMo 3: norms after attention and MLP, and on queries and keys over all heads.

OLMo 3 has sliding layers, and extends the context of the others alone. Source: 2501.00656,
2512.13961; tensor names and arithmetic as in transformers' Olmo2ForCausalLM and Olmo3ForCausalLM.
"""

import functools
from collections.abc import Mapping
from typing import Any

from ntkrl.models import llama
from ntkrl.models.decoder import Config
from ntkrl.models.family import ConfigReader
from ntkrl.models.rope_config import read_layer_ropes, read_rope

# the sliding layers' base has no top-level entry
THETAS = {llama.FULL: ("rope_theta", 5e5), llama.SLIDING: ("", 5e5)}


def parse(generation: int, raw: Mapping[str, Any]) -> Config:
    """Read the config.json of generation 2 or 3."""
    reader = ConfigReader(raw)
    sizes = llama.read_sizes(reader, norm_eps=1e-5)
    bias = reader.boolean("attention_bias", False)
    if generation == 2:
        kinds = llama.uniform_kinds(sizes, read_rope(reader, sizes["head_dim"]), None)
    else:
        ropes = read_layer_ropes(reader, sizes["head_dim"], THETAS)
        count = sizes["num_hidden_layers"]
        default = [llama.SLIDING if (i + 1) % 4 else llama.FULL for i in range(count)]
        window = reader.optional_integer("sliding_window", 4096)
        kinds = llama.read_kinds(reader, default, window, ropes)
    config = Config(
        architecture=f"Olmo{generation}ForCausalLM",
        **sizes,
        **kinds,
        tie_word_embeddings=reader.boolean("tie_word_embeddings", False),
        attention_bias=bias,
        output_bias=bias,
        query_key_norm=True,
        wide_query_key_norm=True,
        pre_norms=False,
        post_norms=True,
        extra={"model_type": f"olmo{generation}", **raw},
    )
    reader.finish(f"OLMo {generation}")
    return config


FAMILIES = tuple(
    llama.family(
        f"Olmo{n}ForCausalLM",
        f"OLMo {n}",
        functools.partial(parse, n),
        f"Olmo{n}ForSequenceClassification",
        norms="after",
    )
    for n in (2, 3)
)
