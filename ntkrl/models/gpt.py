"""GPT-2 (Radford et al. 2019) and GPT-NeoX (Black et al. 2204.06745; the Pythia models).

GPT-2 has learned positions and a tied head; GPT-NeoX rotary positions and, as a rule, a parallel
residual. Tensor names and arithmetic as in transformers' GPT2LMHeadModel and GPTNeoXForCausalLM.
"""

from collections.abc import Mapping
from typing import Any

from ntkrl.models.activations import ACTIVATIONS
from ntkrl.models.decoder import Config, LayerKind
from ntkrl.models.family import MOST_COLUMNS, MOST_LAYERS, ConfigReader, Family, Table
from ntkrl.models.rope_config import RopeRules, read_rope

GPT2 = "GPT2LMHeadModel"
NEOX = "GPTNeoXForCausalLM"
ROPE = RopeRules(theta=("rotary_emb_base", 10000.0), share=("rotary_pct", 0.25))
BLOCK: dict[str, Any] = {"norm": "layer", "gated_mlp": False, "mlp_bias": True}

# names within a layer: ours · GPT-2's · GPT-NeoX's
_LAYER = (
    ("input_norm/scale", "ln_1.weight", "input_layernorm.weight"),
    ("input_norm/bias", "ln_1.bias", "input_layernorm.bias"),
    ("attention/qkv/kernel", "attn.c_attn.weight", "attention.query_key_value.weight"),
    ("attention/qkv/bias", "attn.c_attn.bias", "attention.query_key_value.bias"),
    ("attention/out/kernel", "attn.c_proj.weight", "attention.dense.weight"),
    ("attention/out/bias", "attn.c_proj.bias", "attention.dense.bias"),
    ("mlp_norm/scale", "ln_2.weight", "post_attention_layernorm.weight"),
    ("mlp_norm/bias", "ln_2.bias", "post_attention_layernorm.bias"),
    ("mlp/up/kernel", "mlp.c_fc.weight", "mlp.dense_h_to_4h.weight"),
    ("mlp/up/bias", "mlp.c_fc.bias", "mlp.dense_h_to_4h.bias"),
    ("mlp/down/kernel", "mlp.c_proj.weight", "mlp.dense_4h_to_h.weight"),
    ("mlp/down/bias", "mlp.c_proj.bias", "mlp.dense_4h_to_h.bias"),
)
GPT2_WEIGHTS: Table = (
    ("embed/embedding", "transformer.wte.weight", False),
    ("positions/embedding", "transformer.wpe.weight", False),
    # kernels are stored [in, out], as here
    *((f"layers/{ours}", f"transformer.h.{{i}}.{stored}", False) for ours, stored, _ in _LAYER),
    ("final_norm/scale", "transformer.ln_f.weight", False),
    ("final_norm/bias", "transformer.ln_f.bias", False),
    ("head/weight", "lm_head.weight", False),
)
NEOX_WEIGHTS: Table = (
    ("embed/embedding", "gpt_neox.embed_in.weight", False),
    *(
        (f"layers/{ours}", f"gpt_neox.layers.{{i}}.{stored}", ours.endswith("kernel"))
        for ours, _, stored in _LAYER
    ),
    ("final_norm/scale", "gpt_neox.final_layer_norm.weight", False),
    ("final_norm/bias", "gpt_neox.final_layer_norm.bias", False),
    ("head/weight", "embed_out.weight", False),
)
# buffers that older checkpoints store
GPT2_IGNORED = (r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",)
NEOX_IGNORED = (
    r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    r"gpt_neox\.rotary_emb\.inv_freq",
)


def parse_gpt2(raw: Mapping[str, Any]) -> Config:
    """Read the config.json of GPT-2."""
    reader = ConfigReader(raw)
    width = reader.integer("n_embd", most=MOST_COLUMNS)
    heads = reader.integer("n_head", most=MOST_COLUMNS)
    reader.divides("n_embd", width, "n_head", heads)
    head_dim = max(width // heads, 1)
    reader.refuse_variants()
    reader.fixed("add_cross_attention", False)
    reader.fixed("scale_attn_by_inverse_layer_idx", False)
    scaled = reader.boolean("scale_attn_weights", True)
    count = reader.integer("n_layer", most=MOST_LAYERS)
    config = Config(
        architecture=GPT2,
        vocab_size=reader.integer("vocab_size"),
        hidden_size=width,
        num_hidden_layers=count,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_dim,
        intermediate_size=reader.integer("n_inner", 4 * width, most=4 * MOST_COLUMNS),
        max_position_embeddings=reader.integer("n_positions"),
        hidden_act=reader.choice("activation_function", "gelu_new", ACTIVATIONS),
        norm_eps=reader.number("layer_norm_epsilon", 1e-5, least=0.0),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", True),
        initializer_range=reader.number("initializer_range", 0.02),
        kinds=(LayerKind(None),),
        layer_kinds=(0,) * count,
        query_scale=head_dim**-0.5 if scaled else 1.0,
        fused_qkv="qkv",
        attention_bias=True,
        output_bias=True,
        learned_positions=True,
        **BLOCK,
        extra={"model_type": "gpt2", **raw},
    )
    reader.finish("GPT-2")
    return config


def parse_neox(raw: Mapping[str, Any]) -> Config:
    """Read the config.json of GPT-NeoX, in either spelling of the rotary settings."""
    reader = ConfigReader(raw)
    width = reader.integer("hidden_size", most=MOST_COLUMNS)
    heads = reader.integer("num_attention_heads", most=MOST_COLUMNS)
    reader.divides("hidden_size", width, "num_attention_heads", heads)
    head_dim = max(width // heads, 1)
    reader.refuse_variants()
    reader.fixed("head_dim", head_dim)
    rope = read_rope(reader, head_dim, ROPE)
    count = reader.integer("num_hidden_layers", most=MOST_LAYERS)
    bias = reader.boolean("attention_bias", True)
    config = Config(
        architecture=NEOX,
        vocab_size=reader.integer("vocab_size"),
        hidden_size=width,
        num_hidden_layers=count,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_dim,
        intermediate_size=reader.integer("intermediate_size", most=MOST_COLUMNS),
        max_position_embeddings=reader.integer("max_position_embeddings"),
        hidden_act=reader.choice("hidden_act", "gelu", ACTIVATIONS),
        norm_eps=reader.number("layer_norm_eps", 1e-5, least=0.0),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", False),
        initializer_range=reader.number("initializer_range", 0.02),
        kinds=(LayerKind(rope),),
        layer_kinds=(0,) * count,
        query_scale=head_dim**-0.5,
        fused_qkv="head",
        attention_bias=bias,
        output_bias=bias,
        parallel_residual=reader.boolean("use_parallel_residual", True),
        **BLOCK,
        extra={"model_type": "gpt_neox", **raw},
    )
    reader.finish("GPT-NeoX")
    return config


FAMILIES = (
    Family(
        architecture=NEOX,
        label="GPT-NeoX (Pythia)",
        prefix="gpt_neox.",
        weights=NEOX_WEIGHTS,
        ignored=NEOX_IGNORED,
        parse=parse_neox,
        scorer="GPTNeoXForSequenceClassification",
    ),
    Family(
        architecture=GPT2,
        label="GPT-2",
        prefix="transformer.",
        weights=GPT2_WEIGHTS,
        ignored=GPT2_IGNORED,
        parse=parse_gpt2,
        scorer="GPT2ForSequenceClassification",
    ),
)
