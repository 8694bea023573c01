"""Gemma 2 and Gemma 3 (text): four norms a layer, local and global attention, tied embeddings.

Gemma 2 caps attention scores and logits; Gemma 3 has norms on queries and keys and another rotary
base in local layers. Source: 2408.00118, 2503.19786; tensor names and arithmetic as in
transformers' Gemma2ForCausalLM and Gemma3ForCausalLM.
"""

import functools
from collections.abc import Mapping
from typing import Any

from ntkrl.models import llama
from ntkrl.models.activations import ACTIVATIONS
from ntkrl.models.decoder import Config
from ntkrl.models.family import ConfigReader
from ntkrl.models.rope_config import read_layer_ropes, read_rope

THETAS = {llama.FULL: ("rope_theta", 1e6), llama.SLIDING: ("rope_local_base_freq", 1e4)}


def parse(generation: int, raw: Mapping[str, Any]) -> Config:
    """Read the config.json of generation 2 or 3."""
    reader = ConfigReader(raw)
    sizes = llama.read_sizes(reader, 256, 4)
    sizes["hidden_act"] = reader.choice("hidden_activation", "gelu_pytorch_tanh", ACTIVATIONS)
    sizes["query_scale"] = reader.positive("query_pre_attn_scalar", 256.0) ** -0.5
    every = 2 if generation == 2 else reader.integer("sliding_window_pattern", 6)
    default = [
        llama.SLIDING if (i + 1) % every else llama.FULL for i in range(sizes["num_hidden_layers"])
    ]
    window = reader.optional_integer("sliding_window", 4096)
    if generation == 2:
        rope = read_rope(reader, sizes["head_dim"])
        ropes = dict.fromkeys((llama.FULL, llama.SLIDING), rope)
    else:
        ropes = read_layer_ropes(reader, sizes["head_dim"], THETAS)
    reader.fixed("use_bidirectional_attention", False)
    bias = reader.boolean("attention_bias", False)
    score_cap, logit_cap = (50.0, 30.0) if generation == 2 else (None, None)
    score_cap = reader.optional_positive("attn_logit_softcapping", score_cap)
    config = Config(
        architecture=f"Gemma{generation}ForCausalLM",
        **sizes,
        **llama.read_kinds(reader, default, window, ropes),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", True),
        attention_bias=bias,
        output_bias=bias,
        query_key_norm=generation == 3,
        post_norms=True,
        norm_offset=1.0,
        embedding_scale=sizes["hidden_size"] ** 0.5,
        # the reference ignores it in Gemma 3
        attn_logit_softcapping=score_cap if generation == 2 else None,
        final_logit_softcapping=reader.optional_positive("final_logit_softcapping", logit_cap),
        extra={"model_type": "gemma2" if generation == 2 else "gemma3_text", **raw},
    )
    reader.finish(f"Gemma {generation}")
    return config


FAMILIES = tuple(
    llama.family(
        f"Gemma{n}ForCausalLM",
        label,
        functools.partial(parse, n),
        f"{scorer}ForSequenceClassification",
        norms="both",
    )
    for n, label, scorer in ((2, "Gemma 2", "Gemma2"), (3, "Gemma 3 (text)", "Gemma3Text"))
)
