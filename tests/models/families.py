"""Tiny random transformers models of every family, in odd shapes that expose mistakes."""

import copy

import numpy as np
import torch
import transformers

SIZES = {
    "vocab_size": 31,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
GEMMA = {**SIZES, "head_dim": 10, "query_pre_attn_scalar": 7, "sliding_window": 4}
EXPERTS = {
    **SIZES,
    "head_dim": 10,
    "moe_intermediate_size": 12,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "beta_fast": 3.0,
    "beta_slow": 0.5,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.2, 2.0, 4.0],
}
# name: (config class, model class, settings)
CASES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", SIZES),
    "llama odd": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            **SIZES,
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "head_dim": 10,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-3,
        },
    ),
    "llama 3": ("LlamaConfig", "LlamaForCausalLM", {**SIZES, "rope_parameters": LLAMA3}),
    "llama linear": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {**SIZES, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", SIZES),
    "qwen2 tied, local": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {
            **SIZES,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 3,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**SIZES, "head_dim": 10}),
    "qwen3 tied, biased": (
        "Qwen3Config",
        "Qwen3ForCausalLM",
        {**SIZES, "head_dim": 6, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "qwen3 moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**EXPERTS, "num_experts": 5, "num_experts_per_tok": 3, "norm_topk_prob": True},
    ),
    "qwen3 moe raw weights": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**EXPERTS, "num_hidden_layers": 3, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "qwen3 moe local": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            **EXPERTS,
            "num_experts": 3,
            "num_experts_per_tok": 1,
            "use_sliding_window": True,
            "sliding_window": 3,
        },
    ),
    "gemma 2": ("Gemma2Config", "Gemma2ForCausalLM", {**GEMMA, "num_hidden_layers": 3}),
    "gemma 2 uncapped, untied": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            **GEMMA,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
            "attention_bias": True,
        },
    ),
    "gemma 2 hard caps": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**GEMMA, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
    ),
    "gemma 3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**GEMMA, "num_hidden_layers": 4, "sliding_window_pattern": 3},
    ),
    "gemma 3 scaled": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            **GEMMA,
            "layer_types": ["full_attention", "sliding_attention"],
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 900.0, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "gpt2": (
        "GPT2Config",
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
    "gpt2 odd": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": 29,
            "n_embd": 21,
            "n_layer": 3,
            "n_head": 3,
            "n_inner": 17,
            "n_positions": 100,
            "activation_function": "relu",
            "tie_word_embeddings": False,
            "scale_attn_weights": False,
            "initializer_range": 0.2,
        },
    ),
    "gpt-neox": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {
            **{k: v for k, v in SIZES.items() if k != "num_key_value_heads"},
            "num_attention_heads": 3,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
}
CASES |= {
    "llama yarn": ("LlamaConfig", "LlamaForCausalLM", {**SIZES, "rope_parameters": YARN}),
    "llama longrope": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {**SIZES, "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 6}},
    ),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**SIZES, "sliding_window": 3}),
    "mistral full, tied": (
        "MistralConfig",
        "MistralForCausalLM",
        {**SIZES, "sliding_window": None, "head_dim": 10, "tie_word_embeddings": True},
    ),
    "olmo 2": ("Olmo2Config", "Olmo2ForCausalLM", SIZES),
    "olmo 2 tied, biased": (
        "Olmo2Config",
        "Olmo2ForCausalLM",
        {**SIZES, "tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": None},
    ),
    "olmo 3": (
        "Olmo3Config",
        "Olmo3ForCausalLM",
        {**SIZES, "num_hidden_layers": 4, "sliding_window": 3, "rope_scaling": YARN},
    ),
    "olmo 3 full": (
        "Olmo3Config",
        "Olmo3ForCausalLM",
        {
            **SIZES,
            "layer_types": ["full_attention", "full_attention"],
            "tie_word_embeddings": True,
            "attention_bias": True,
        },
    ),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {**SIZES, "no_rope_layers": [1, 0]}),
    "smollm3 local, untied": (
        "SmolLM3Config",
        "SmolLM3ForCausalLM",
        {
            **SIZES,
            "num_hidden_layers": 5,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 3,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": YARN,
        },
    ),
    "phi 3": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {**SIZES, "rope_parameters": LONGROPE, "original_max_position_embeddings": 100},
    ),
    "phi 4 mini": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {
            **SIZES,
            "hidden_size": 40,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "sliding_window": 4,
            "original_max_position_embeddings": 5,
            "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.75},
        },
    ),
}
# one of each family, for what need not be seen at every shape
EACH = (
    *("llama 3", "qwen2 tied, local", "qwen3", "qwen3 moe", "gemma 2", "gemma 3", "gpt2"),
    *("gpt-neox", "mistral", "olmo 2", "olmo 3", "smollm3", "phi 3"),
)


def torch_model(case, directory=None, seed=0, **overrides):
    """Build a case's model, all parameters moved off their initial values; optionally save it."""
    config_class, model_class, settings = CASES[case]
    config = getattr(transformers, config_class)(
        **copy.deepcopy({**settings, **overrides}), bos_token_id=0, eos_token_id=0, pad_token_id=1
    )
    torch.manual_seed(seed)
    # eager attention and experts: capped scores and odd strides have no fused form
    config._attn_implementation = config._experts_implementation = "eager"
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if directory is not None:
        model.save_pretrained(directory)
    return model


def tokens_and_mask(vocab, seed=0):
    """Return three sequences: unpadded, right-padded, left-padded."""
    tokens = np.random.default_rng(seed).integers(2, vocab, (3, 9))
    mask = np.ones((3, 9), bool)
    mask[1, 6:] = False
    mask[2, :4] = False
    return tokens, mask


def torch_logits(model, tokens, mask):
    """Logits and head inputs of the reference, positions counted over real tokens.

    Rows are read alone: LongRoPE chooses its factors by the longest row of a batch.
    """
    positions, logits, features = np.maximum(np.cumsum(mask, axis=1) - 1, 0), [], []
    for row in range(len(tokens)):
        with torch.no_grad():
            out = model(
                input_ids=torch.tensor(tokens[row : row + 1]),
                attention_mask=torch.tensor(mask[row : row + 1].astype(np.int64)),
                position_ids=torch.tensor(positions[row : row + 1]),
                output_hidden_states=True,
            )
        logits.append(out.logits.float().numpy())
        features.append(out.hidden_states[-1].float().numpy())
    return np.concatenate(logits), np.concatenate(features)
