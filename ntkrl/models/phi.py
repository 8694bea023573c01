"""Phi-3, Phi-3.5 and Phi-4: fused products for queries, keys and values, and for gate and up.

Phi-4-mini rotates a part of each head; longer contexts by LongRoPE. Source: Abdin et al.
2404.14219, 2503.01743; tensor names and arithmetic as in transformers' Phi3ForCausalLM.
"""

from collections.abc import Mapping
from typing import Any

from ntkrl.models import llama
from ntkrl.models.decoder import Config
from ntkrl.models.family import ConfigReader
from ntkrl.models.rope_config import RopeRules, read_rope

ARCHITECTURE = "Phi3ForCausalLM"
ROPE = RopeRules(
    share=("partial_rotary_factor", 1.0),
    # two older names of the same
    scalings={"default": "default", **dict.fromkeys(("longrope", "su", "yarn"), "longrope")},
    original=4096,
)


def parse(raw: Mapping[str, Any]) -> Config:
    """Read config.json."""
    reader = ConfigReader(raw)
    sizes = llama.read_sizes(reader, norm_eps=1e-5)
    rope = read_rope(reader, sizes["head_dim"], ROPE)
    config = Config(
        architecture=ARCHITECTURE,
        **sizes,
        **llama.uniform_kinds(sizes, rope, reader.optional_integer("sliding_window", None)),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", False),
        fused_qkv="qkv",
        fused_mlp=True,
        extra={"model_type": "phi3", **raw},
    )
    reader.finish("Phi-3")
    return config


FAMILIES = (
    llama.family(ARCHITECTURE, "Phi-3 / 4", parse, "Phi3ForSequenceClassification", fused=True),
)
