"""Qwen3-MoE: Qwen3 with a mixture of experts in place of every MLP.

`output_router_logits` and `router_aux_loss_coef` change only the loss that transformers computes,
which is not used.

Source: Yang et al. 2505.09388; tensor names and arithmetic as in transformers' Qwen3MoeForCausalLM.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ntkrl.messages import quoted
from ntkrl.models import experts, llama
from ntkrl.models.decoder import Config
from ntkrl.models.family import MOST_COLUMNS, MOST_LAYERS, ConfigReader, Family, Table
from ntkrl.models.rope_config import read_rope

ARCHITECTURE = "Qwen3MoeForCausalLM"

_MIXTURE: Table = (
    ("layers/mlp/router/kernel", "model.layers.{i}.mlp.gate.weight", True),
    *(
        (
            f"layers/mlp/experts/{part}/kernel",
            f"model.layers.{{i}}.mlp.experts.{{e}}.{part}_proj.weight",
            True,
        )
        for part in ("gate", "up", "down")
    ),
)


def read_routing(reader: ConfigReader) -> experts.Routing:
    """Read the entries of the mixture, which every layer must have."""
    step, dense = reader.integer("decoder_sparse_step", 1), reader.raw.get("mlp_only_layers")
    if step != 1 or dense:
        reader.problems.append(
            f"decoder_sparse_step {step} and mlp_only_layers {quoted(dense)} give some layers a "
            "plain MLP, which is not supported: all layers must be mixtures (1 and [])"
        )
    # transformers 5 writes the second name; published files have the first
    names = [name for name in ("num_experts", "num_local_experts") if name in reader.raw]
    counts = [reader.integer(name, most=MOST_LAYERS) for name in names or ["num_experts"]]
    if len(set(counts)) > 1:
        reader.problems.append(f"num_experts {counts[0]} is not num_local_experts {counts[1]}")
    per_token = reader.integer("num_experts_per_tok")
    if per_token > counts[0]:
        reader.problems.append(f"num_experts_per_tok {per_token} exceeds num_experts {counts[0]}")
    width = reader.integer("moe_intermediate_size", most=MOST_COLUMNS)
    return experts.Routing(counts[0], per_token, width, reader.boolean("norm_topk_prob", False))


def parse(raw: Mapping[str, Any]) -> Config:
    """Read config.json."""
    reader = ConfigReader({"intermediate_size": 1, **raw})  # of plain MLPs, of which there are none
    sizes = llama.read_sizes(reader, key_value_heads=4)
    window = None
    if reader.boolean("use_sliding_window", False):  # in every layer
        window = reader.optional_integer("sliding_window", 4096)
    bias = reader.boolean("attention_bias", False)
    config = Config(
        architecture=ARCHITECTURE,
        **sizes,
        tie_word_embeddings=reader.boolean("tie_word_embeddings", False),
        **llama.uniform_kinds(sizes, read_rope(reader, sizes["head_dim"]), window),
        attention_bias=bias,
        output_bias=bias,
        query_key_norm=True,
        routing=read_routing(reader),
        extra={"model_type": "qwen3_moe", **raw},
    )
    reader.finish("Qwen3-MoE")
    return config


def _family() -> Family:
    dense = llama.family(ARCHITECTURE, "Qwen3-MoE", parse, "Qwen3MoeForSequenceClassification")
    rows = [row for row in dense.weights if not row[0].startswith("layers/mlp/")]
    first = next(number for number, row in enumerate(rows) if row[0] == "final_norm/scale")
    weights = (*rows[:first], *_MIXTURE, *rows[first:])
    sharding = (*experts.SHARDING, *dense.sharding)
    return dataclasses.replace(dense, weights=weights, sharding=sharding)


FAMILIES = (_family(),)
