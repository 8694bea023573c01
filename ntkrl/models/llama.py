"""Llama 2 and 3; the names of tensors and entries that most other families share.

Source: Touvron et al. 2307.09288, Grattafiori et al. 2407.21783; tensor names and arithmetic as in
transformers' LlamaForCausalLM.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ntkrl.models.activations import ACTIVATIONS
from ntkrl.models.decoder import Config, LayerKind
from ntkrl.models.family import MOST_COLUMNS, MOST_LAYERS, ConfigReader, Family, Table
from ntkrl.models.rope import Rope
from ntkrl.models.rope_config import read_rope

ARCHITECTURE = "LlamaForCausalLM"
FULL, SLIDING = "full_attention", "sliding_attention"

# names within a layer: ours · stored
_LAYER = (
    ("attention/query/kernel", "self_attn.q_proj.weight"),
    ("attention/query/bias", "self_attn.q_proj.bias"),
    ("attention/key/kernel", "self_attn.k_proj.weight"),
    ("attention/key/bias", "self_attn.k_proj.bias"),
    ("attention/value/kernel", "self_attn.v_proj.weight"),
    ("attention/value/bias", "self_attn.v_proj.bias"),
    ("attention/query_norm/scale", "self_attn.q_norm.weight"),
    ("attention/key_norm/scale", "self_attn.k_norm.weight"),
    ("attention/out/kernel", "self_attn.o_proj.weight"),
    ("attention/out/bias", "self_attn.o_proj.bias"),
    ("mlp/gate/kernel", "mlp.gate_proj.weight"),
    ("mlp/gate/bias", "mlp.gate_proj.bias"),
    ("mlp/up/kernel", "mlp.up_proj.weight"),
    ("mlp/up/bias", "mlp.up_proj.bias"),
    ("mlp/down/kernel", "mlp.down_proj.weight"),
    ("mlp/down/bias", "mlp.down_proj.bias"),
)
# of families with one product for queries, keys and values, and one for gate and up
_FUSED_LAYER = (
    ("attention/qkv/kernel", "self_attn.qkv_proj.weight"),
    ("attention/out/kernel", "self_attn.o_proj.weight"),
    ("mlp/gate_up/kernel", "mlp.gate_up_proj.weight"),
    ("mlp/down/kernel", "mlp.down_proj.weight"),
)
# norms of a layer: before attention and MLP, after them, or both
_NORMS = {
    "before": (
        ("input_norm/scale", "input_layernorm.weight"),
        ("mlp_norm/scale", "post_attention_layernorm.weight"),
    ),
    "after": (
        ("attention_out_norm/scale", "post_attention_layernorm.weight"),
        ("mlp_out_norm/scale", "post_feedforward_layernorm.weight"),
    ),
    "both": (
        ("input_norm/scale", "input_layernorm.weight"),
        ("attention_out_norm/scale", "post_attention_layernorm.weight"),
        ("mlp_norm/scale", "pre_feedforward_layernorm.weight"),
        ("mlp_out_norm/scale", "post_feedforward_layernorm.weight"),
    ),
}
# buffers that older checkpoints store
_IGNORED = (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)


def family(
    architecture: str,
    label: str,
    parse: Callable[[Mapping[str, Any]], Config],
    scorer: str,
    norms: str = "before",
    fused: bool = False,
) -> Family:
    """Return a family with Llama's tensor names.

    Args:
      architecture, label, parse, scorer: of the family.
      norms: "before" attention and MLP, "after" them, or "both".
      fused: one product for queries, keys and values, and one for gate and up.
    """
    weights: Table = (
        ("embed/embedding", "model.embed_tokens.weight", False),
        *(
            (f"layers/{ours}", f"model.layers.{{i}}.{stored}", ours.endswith("kernel"))
            for ours, stored in _NORMS[norms] + (_FUSED_LAYER if fused else _LAYER)
        ),
        ("final_norm/scale", "model.norm.weight", False),
        ("head/weight", "lm_head.weight", False),
    )
    return Family(architecture, label, "model.", weights, _IGNORED, parse, scorer)


def read_sizes(
    reader: ConfigReader,
    head_dim: int | None = None,
    key_value_heads: int | None = None,
    norm_eps: float = 1e-6,
) -> dict[str, Any]:
    """Read the entries shared by all variants.

    Args:
      reader: of config.json.
      head_dim: default width of a head; None for D/H.
      key_value_heads: default number of heads of keys and values; None for H.
      norm_eps: default ε of norms.

    Returns:
      Arguments of `Config`.
    """
    reader.refuse_variants()
    width = reader.integer("hidden_size", most=MOST_COLUMNS)
    heads = reader.integer("num_attention_heads", most=MOST_COLUMNS)
    shared = reader.optional_integer("num_key_value_heads", key_value_heads) or heads
    reader.divides("num_attention_heads", heads, "num_key_value_heads", shared)
    head_dim = reader.optional_integer("head_dim", head_dim)
    if head_dim is None:
        reader.divides("hidden_size", width, "num_attention_heads", heads)
        head_dim = max(width // heads, 1)
    if head_dim % 2:
        reader.problems.append(f"head_dim {head_dim} must be even")
    if heads * head_dim > MOST_COLUMNS:
        reader.problems.append(
            f"{heads} heads of head_dim {head_dim} have more than {MOST_COLUMNS} columns"
        )
        head_dim = 2
    return {
        "vocab_size": reader.integer("vocab_size"),
        "hidden_size": width,
        "num_hidden_layers": reader.integer("num_hidden_layers", most=MOST_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "head_dim": head_dim,
        "intermediate_size": reader.integer("intermediate_size", most=MOST_COLUMNS),
        "max_position_embeddings": reader.integer("max_position_embeddings"),
        "hidden_act": reader.choice("hidden_act", "silu", ACTIVATIONS),
        "norm_eps": reader.number("rms_norm_eps", norm_eps, least=0.0),
        "initializer_range": reader.number("initializer_range", 0.02),
        "query_scale": head_dim**-0.5,
    }


def read_kinds(
    reader: ConfigReader, default: Sequence[str], window: int | None, ropes: Mapping[str, Rope]
) -> dict[str, Any]:
    """Read the kinds of layers from `layer_types`.

    Args:
      reader: of config.json.
      default: FULL or SLIDING per layer of files without `layer_types`.
      window: of sliding layers.
      ropes: rotary positions by type.

    Returns:
      Arguments `kinds` and `layer_kinds` of `Config`.
    """
    types = reader.words("layer_types", default, (FULL, SLIDING))
    if SLIDING in types and window is None:
        reader.problems.append(
            f"layer_types has {SLIDING}, which needs a sliding_window (and use_sliding_window, "
            "where the family has it)"
        )
    by_type = {name: LayerKind(ropes[name], window if name == SLIDING else None) for name in types}
    kinds = tuple(dict.fromkeys(by_type.values()))
    return {"kinds": kinds, "layer_kinds": tuple(kinds.index(by_type[name]) for name in types)}


def uniform_kinds(sizes: Mapping[str, Any], rope: Rope, window: int | None) -> dict[str, Any]:
    """Return arguments `kinds` and `layer_kinds` of `Config` for layers that are all of a kind."""
    return {
        "kinds": (LayerKind(rope, window),),
        "layer_kinds": (0,) * sizes["num_hidden_layers"],
    }


def parse(raw: Mapping[str, Any]) -> Config:
    """Read config.json."""
    reader = ConfigReader(raw)
    sizes = read_sizes(reader)
    bias = reader.boolean("attention_bias", False)
    reader.fixed("pretraining_tp", 1)
    config = Config(
        architecture=ARCHITECTURE,
        **sizes,
        **uniform_kinds(sizes, read_rope(reader, sizes["head_dim"]), None),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", False),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=reader.boolean("mlp_bias", False),
        extra={"model_type": "llama", **raw},
    )
    reader.finish("Llama")
    return config


FAMILIES = (family(ARCHITECTURE, "Llama 2 / 3", parse, "LlamaForSequenceClassification"),)
