"""Gemma 2 and Gemma 3 (text): four norms a layer, local and global attention, tied embeddings.

Gemma 2 caps attention scores and logits; Gemma 3 has norms on queries and keys and rotates local
layers by a base of their own. Source: 2408.00118, 2503.19786; tensor names and arithmetic as in
transformers' Gemma2ForCausalLM and Gemma3ForCausalLM.
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
    sizes = decoder.read_sizes(reader, 256)
    every = 2 if generation == 2 else reader.integer("sliding_window_pattern", 6)
    usual = [
        decoder.SLIDING if (i + 1) % every else decoder.FULL
        for i in range(sizes["num_hidden_layers"])
    ]
    window = reader.optional_integer("sliding_window", 4096)
    width, ropes = sizes["head_dim"], {}
    if generation == 3:
        nested = reader.section("rope_parameters")
        for kind, theta, older in (
            (decoder.FULL, 1e6, "rope_theta"),
            (decoder.SLIDING, 1e4, "rope_local_base_freq"),
        ):
            own = nested[kind] if nested is not None and kind in nested else None
            # older files scale the global layers alone
            scaled = nested is None and kind == decoder.FULL
            ropes[kind] = reader.rope(width, theta, older, own, scaled)
    plain = ropes[decoder.FULL] if ropes else reader.rope(width)
    kinds, layer_kinds = decoder.read_kinds(reader, usual, window, ropes, plain)
    reader.fixed("use_bidirectional_attention", False)
    bias = reader.boolean("attention_bias", False)
    caps = (50.0, 30.0) if generation == 2 else (None, None)
    scores, logits = (
        reader.optional_number(name, cap)
        for name, cap in zip(
            ("attn_logit_softcapping", "final_logit_softcapping"), caps, strict=True
        )
    )
    config = decoder.Config(
        architecture=f"Gemma{generation}ForCausalLM",
        **sizes,
        hidden_act=reader.choice("hidden_activation", "gelu_pytorch_tanh", decoder.ACTIVATIONS),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", True),
        kinds=kinds,
        layer_kinds=layer_kinds,
        query_scale=reader.number("query_pre_attn_scalar", 256.0) ** -0.5,
        attention_bias=bias,
        output_bias=bias,
        query_key_norm=generation == 3,
        four_norms=True,
        norm_offset=1.0,
        embedding_scale=sizes["hidden_size"] ** 0.5,
        attn_logit_softcapping=scores if generation == 2 else None,  # the reference ignores it in 3
        final_logit_softcapping=logits,
        extra={"model_type": "gemma2" if generation == 2 else "gemma3_text", **raw},
    )
    reader.finish(f"Gemma {generation}")
    return config


FAMILIES = tuple(
    decoder.family(
        f"Gemma{n}ForCausalLM",
        label,
        functools.partial(parse, n),
        f"{scorer}ForSequenceClassification",
        four_norms=True,
    )
    for n, label, scorer in ((2, "Gemma 2", "Gemma2"), (3, "Gemma 3 (text)", "Gemma3Text"))
)
