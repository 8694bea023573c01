"""Every field of transformers' config classes, changed and left out, against our reading of it."""

import dataclasses

import jax
import pytest
import torch
import transformers

from tests.models.config_edits import ABSENT, Reference
from tests.models.families import CASES, EACH

# fields that change no logits: of training, of generation, of other heads, of the file itself
WITHOUT_EFFECT = {
    *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
    *("classifier_dropout", "summary_first_dropout", "initializer_range"),
    *("use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "is_decoder"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
    *("id2label", "label2id", "problem_type", "output_hidden_states", "return_dict"),
    *("transformers_version", "dtype", "chunk_size_feed_forward", "is_encoder_decoder"),
    *("reorder_and_upcast_attn", "output_router_logits", "router_aux_loss_coef"),
}
# fields that transformers does not use
IDLE = {"qwen3 moe": {"intermediate_size"}, "gemma 3": {"attn_logit_softcapping"}}
# a stored head of other numbers is kept, and without a head nothing can be untied: test_loading.py
TIED = "tie_word_embeddings"
ROPE = {"rope_type": "default", "rope_theta": 77.0}
WINDOWS = {"use_sliding_window": True, "sliding_window": 2, "layer_types": ABSENT}
# other values; a dict with the field itself among its keys changes several entries at once
VALUES = {
    "activation_function": ["silu", "tanh"],
    "add_cross_attention": [True],
    "attention_bias": [True, False],
    "attention_dropout": [0.5],
    "attn_logit_softcapping": [1.0, None],
    "attn_pdrop": [0.5],
    "bos_token_id": [3],
    "chunk_size_feed_forward": [2],
    "classifier_dropout": [0.5],
    "decoder_sparse_step": [2],
    "dtype": ["bfloat16"],
    "embd_pdrop": [0.5],
    "eos_token_id": [3, [4, 5]],
    "final_logit_softcapping": [1.0, None],
    "head_dim": [8],
    "hidden_act": ["gelu", "relu", "mish"],
    "hidden_activation": ["gelu", "silu", "mish"],
    "hidden_dropout": [0.5],
    "hidden_size": [32],
    "id2label": [{"0": "a"}],
    "initializer_range": [0.5],
    "intermediate_size": [28],
    "is_decoder": [True],
    "is_encoder_decoder": [True],
    "label2id": [{"a": 0}],
    "layer_norm_eps": [0.1],
    "layer_norm_epsilon": [0.1],
    "layer_types": [["sliding_attention", "full_attention"], ["full_attention"] * 2],
    "max_position_embeddings": [64],
    "max_window_layers": [{**WINDOWS, "max_window_layers": n} for n in (0, 1, 2)],
    "mlp_bias": [True],
    "mlp_only_layers": [[0]],
    "moe_intermediate_size": [16],
    "n_embd": [32],
    "n_head": [2],
    "n_inner": [28],
    "n_layer": [3],
    "n_positions": [64],
    "no_rope_layer_interval": [{"no_rope_layer_interval": 1, "no_rope_layers": ABSENT}],
    "no_rope_layers": [[0, 1], [1, 1, 0]],
    "norm_topk_prob": [True, False],
    "num_attention_heads": [{"num_attention_heads": 2, "head_dim": 6}],
    "num_experts": [8],
    "num_experts_per_tok": [1],
    "num_hidden_layers": [
        {"num_hidden_layers": 3, "layer_types": ABSENT, "no_rope_layers": ABSENT}
    ],
    "num_key_value_heads": [1, None],
    "original_max_position_embeddings": [5],
    "output_hidden_states": [True],
    "output_router_logits": [True],
    "pad_token_id": [2],
    "pretraining_tp": [2],
    "problem_type": ["regression"],
    "query_pre_attn_scalar": [20],
    "reorder_and_upcast_attn": [True],
    "resid_pdrop": [0.5],
    "rms_norm_eps": [0.1],
    # in every spelling: test_rope.py
    "rope_parameters": [
        {"rope_parameters": ROPE},
        {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    ],
    "router_aux_loss_coef": [0.5],
    "scale_attn_by_inverse_layer_idx": [True],
    "scale_attn_weights": [False],
    "sliding_window": [2, 5, {**WINDOWS, "max_window_layers": 0}],
    "summary_activation": ["tanh"],
    "summary_first_dropout": [0.5],
    "summary_proj_to_labels": [False],
    "summary_type": ["mean"],
    "summary_use_proj": [False],
    "tie_word_embeddings": [True, False],
    "transformers_version": ["4.40.0"],
    "use_bidirectional_attention": [True],
    "use_cache": [False],
    "use_parallel_residual": [False],
    "use_sliding_window": [True, False, {**WINDOWS, "max_window_layers": 0}],
    "vocab_size": [33],
}
# entries that are no fields, and that transformers reads all the same
ENTRIES = [
    {"is_causal": False},
    {"sliding_window_pattern": 2, "layer_types": ABSENT},
    {"head_dim": 8},
    {"quantization_config": {"quant_method": "fp8"}},
    {"per_layer_config": {"0": {"rms_norm_eps": 0.5}}},
    {"a_name_of_no_model": 7},
]


@pytest.fixture(autouse=True)
def quick_compilation():
    """Many small programs, each run once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    torch.set_num_threads(threads)


QUICK = ("llama 3", "olmo 3", "phi 3")
SEEN = [pytest.param(case, marks=[pytest.mark.slow] * (case not in QUICK)) for case in EACH]


@pytest.mark.parametrize("case", SEEN)
def test_every_field_of_the_config_class(case, tmp_path):
    """oracle: transformers' logits with the field changed and without it; or a refusal by name."""
    reference = Reference(case, tmp_path / "base")
    assert reference.gap(reference.ours, reference.logits) < 1e-4
    names = [field.name for field in dataclasses.fields(getattr(transformers, CASES[case][0]))]
    names.remove("architectures")
    assert set(names) <= set(VALUES) | WITHOUT_EFFECT
    idle = WITHOUT_EFFECT | (IDLE[case] if case in IDLE else set())
    problems = []
    for name in names:
        values = VALUES.get(name, [])
        edits = [v if isinstance(v, dict) and name in v else {name: v} for v in values]
        moved = False
        for changes in [*edits, {name: ABSENT}]:
            changed, problem = outcome(reference, tmp_path / "edited", changes)
            moved |= changed
            problems += [problem] * (problem is not None)
        if moved == (name in idle) and name != TIED:
            problems.append(f"{name}: {'some' if moved else 'no'} value changes the logits")
    for changes in ENTRIES:
        problem = outcome(reference, tmp_path / "edited", changes)[1]
        problems += [problem] * (problem is not None)
    assert not problems, "\n".join(problems)


def outcome(reference, directory, changes):
    """Return True if the change matters or is refused, and a problem or None."""
    try:
        expected, ours = reference.edit(directory, changes)
    except ValueError as error:
        named = any(name in str(error) for name in changes)
        named |= TIED in changes and "lm_head.weight is missing" in str(error)
        named |= "short_factor must be" in str(error)  # in heads of another width
        return True, None if named else f"{changes}: refused without its name: {error}"
    except ReferenceError as error:
        # of a value's type, or of a token outside of the vocabulary
        illegal = any(text in str(error) for text in ("alidation error", "Padding_idx"))
        return False, None if illegal else f"read here: {error}"
    gap = reference.gap(expected, ours)
    problem = f"{changes}: logits differ by {gap:.2g}" if not gap < 1e-4 else None
    return reference.gap(expected, reference.logits) > 1e-4, problem
