"""Tiny models of every form of layer, whose tokens end at different times."""

import jax

from ntkrl import models
from tests.models.families import GEMMA, LONGROPE, SIZES

CASES = {
    "gpt-neox": (
        "GPTNeoXForCausalLM",
        {**SIZES, "num_attention_heads": 3, "num_key_value_heads": 3, "rotary_pct": 0.5},
    ),
    "gpt-2": (
        "GPT2LMHeadModel",
        {
            "vocab_size": 31,
            "n_embd": 24,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "initializer_range": 0.3,
        },
    ),
    "llama": ("LlamaForCausalLM", SIZES),
    "qwen3": ("Qwen3ForCausalLM", {**SIZES, "head_dim": 10}),
    "gemma 2": ("Gemma2ForCausalLM", {**GEMMA, "num_hidden_layers": 3}),
    "gemma 3": (
        "Gemma3ForCausalLM",
        {**GEMMA, "num_hidden_layers": 4, "sliding_window_pattern": 3},
    ),
    "phi-3 longrope": (
        "Phi3ForCausalLM",
        {**SIZES, "rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
    ),
    "mixture": (
        "Qwen3MoeForCausalLM",
        {
            **SIZES,
            "head_dim": 10,
            "moe_intermediate_size": 12,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
        },
    ),
}
"""Name: Hugging Face's class name, entries of config.json."""


def small_model(case: str, **options):
    """Build a model of CASES; `options` are those of `models.build`."""
    architecture, config = CASES[case]
    return models.build(architecture, config, jax.random.key(0), **options)
