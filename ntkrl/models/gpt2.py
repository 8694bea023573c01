"""GPT-2: learned positions, LayerNorm before each block, fused query-key-value, tied head.

Source: Radford et al. 2019; tensor names and arithmetic as in transformers' GPT2LMHeadModel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from ntkrl.models import layers as nn
from ntkrl.models.family import Adapters, EqualHeads, Family, Running, Table
from ntkrl.models.reading import ConfigReader
from ntkrl.types import Array, Cache

ARCHITECTURE = "GPT2LMHeadModel"

# our name · Hugging Face name ({i}: the layer, stacked) · transpose (stored [in, out] as here)
WEIGHTS: Table = (
    ("embed/embedding", "transformer.wte.weight", False),
    ("positions/embedding", "transformer.wpe.weight", False),
    ("layers/input_norm/scale", "transformer.h.{i}.ln_1.weight", False),
    ("layers/input_norm/bias", "transformer.h.{i}.ln_1.bias", False),
    ("layers/attention/qkv/kernel", "transformer.h.{i}.attn.c_attn.weight", False),
    ("layers/attention/qkv/bias", "transformer.h.{i}.attn.c_attn.bias", False),
    ("layers/attention/out/kernel", "transformer.h.{i}.attn.c_proj.weight", False),
    ("layers/attention/out/bias", "transformer.h.{i}.attn.c_proj.bias", False),
    ("layers/mlp_norm/scale", "transformer.h.{i}.ln_2.weight", False),
    ("layers/mlp_norm/bias", "transformer.h.{i}.ln_2.bias", False),
    ("layers/mlp/up/kernel", "transformer.h.{i}.mlp.c_fc.weight", False),
    ("layers/mlp/up/bias", "transformer.h.{i}.mlp.c_fc.bias", False),
    ("layers/mlp/down/kernel", "transformer.h.{i}.mlp.c_proj.weight", False),
    ("layers/mlp/down/bias", "transformer.h.{i}.mlp.c_proj.bias", False),
    ("final_norm/scale", "transformer.ln_f.weight", False),
    ("final_norm/bias", "transformer.ln_f.bias", False),
    ("head/weight", "lm_head.weight", False),
)

# causal masks that older checkpoints store
IGNORED: tuple[str, ...] = (r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",)

SHARDING: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed/embedding|head/weight", ("tensor", "fsdp")),
    (r"positions/embedding", (None, "fsdp")),
    (r"layers/(attention/qkv|mlp/up)/kernel", (None, "fsdp", "tensor")),
    (r"layers/(attention/out|mlp/down)/kernel", (None, "tensor", "fsdp")),
    (r"layers/(attention/qkv|mlp/up)/bias", (None, "tensor")),
    (r".*", ()),
)


@dataclasses.dataclass(frozen=True)
class Config(EqualHeads):
    """Shape of a GPT-2 model.

    query_scale: factor on attention scores.
    extra: config.json as it was read, for export.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    hidden_act: str
    layer_norm_eps: float
    query_scale: float
    tie_word_embeddings: bool
    initializer_range: float
    adapters: Adapters | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    architecture: ClassVar[str] = ARCHITECTURE
    final_logit_softcapping: ClassVar[None] = None


def parse(raw: Mapping[str, Any]) -> Config:
    """Read config.json.

    Args:
      raw: the parsed JSON.

    Raises:
      ValueError: missing or impossible entries, all in one message.
    """
    reader = ConfigReader(raw)
    width, heads = reader.integer("n_embd"), reader.integer("n_head")
    reader.divides("n_embd", width, "n_head", heads)
    reader.fixed("add_cross_attention", False)
    reader.fixed("scale_attn_by_inverse_layer_idx", False)
    scaled = reader.boolean("scale_attn_weights", True)
    config = Config(
        vocab_size=reader.integer("vocab_size"),
        hidden_size=width,
        num_hidden_layers=reader.integer("n_layer"),
        num_attention_heads=heads,
        intermediate_size=reader.integer("n_inner", 4 * width),
        max_position_embeddings=reader.integer("n_positions"),
        hidden_act=reader.choice("activation_function", "gelu_new", nn.ACTIVATIONS),
        layer_norm_eps=reader.number("layer_norm_epsilon", 1e-5),
        query_scale=(width // heads) ** -0.5 if scaled else 1.0,
        tie_word_embeddings=reader.boolean("tie_word_embeddings", True),
        initializer_range=reader.number("initializer_range", 0.02),
        extra={"model_type": "gpt2", **raw},
    )
    reader.finish("GPT-2")
    return config


class Attention(nnx.Module):
    """Self-attention with one fused query-key-value product."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: Any):
        self.config, width = config, config.hidden_size
        make = nn.linear(config, rngs, dtype)
        self.qkv = make("attention/qkv", width, 3 * width, True)
        self.out = make("attention/out", width, width, True)

    def __call__(self, x_BTD: Array, reading: nn.Reading, remember: Callable) -> Array:
        shape = (*x_BTD.shape[:2], self.config.num_attention_heads, self.config.head_dim)
        queries, keys, values = (
            part.reshape(shape) for part in jnp.split(self.qkv(x_BTD), 3, axis=-1)
        )
        keys, values = remember(keys, values)
        scale = self.config.query_scale
        mixed = nn.attention(queries, keys, values, reading.allowed, scale)
        return self.out(mixed.reshape(x_BTD.shape))


class Layer(nnx.Module):
    """One decoder layer."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: Any):
        width = config.hidden_size
        self.input_norm = nn.layer_norm(width, config.layer_norm_eps, rngs, dtype)
        self.mlp_norm = nn.layer_norm(width, config.layer_norm_eps, rngs, dtype)
        self.attention = Attention(config, rngs, dtype)
        self.mlp = nn.MLP(config, rngs, dtype)

    def __call__(self, x_BTD: Array, reading: nn.Reading, remember: Callable) -> Array:
        x_BTD = x_BTD + self.attention(self.input_norm(x_BTD), reading, remember)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class Model(nnx.Module):
    """The decoder; `features` are the output of the final norm."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: Any):
        width, deviation = config.hidden_size, config.initializer_range
        self.embed = nn.embedding(config.vocab_size, width, deviation, rngs, dtype)
        self.positions = nn.embedding(config.max_position_embeddings, width, deviation, rngs, dtype)
        self.layers = nn.stacked(
            lambda rngs: Layer(config, rngs, dtype), config.num_hidden_layers, rngs
        )
        self.final_norm = nn.layer_norm(width, config.layer_norm_eps, rngs, dtype)

    def features(
        self, tokens_BT: Array, mask_BT: Array, cache: Cache | None, running: Running
    ) -> tuple[Array, Cache | None]:
        """Return the head's input `[B, T, D]` and the cache after reading the tokens."""
        places, cache = nn.places(mask_BT, cache)
        x_BTD = nn.look_up(self.embed, tokens_BT, running)
        x_BTD = x_BTD + jnp.take(self.positions.embedding[...], places.positions, axis=0)
        sights = [nn.Sight(None, places.allowed)]
        x_BTD, cache = nn.scan_layers(self.layers, x_BTD, sights, None, cache, running)
        return self.final_norm(x_BTD), cache


FAMILIES = (
    Family(
        ARCHITECTURE,
        "GPT-2",
        "transformer.",
        WEIGHTS,
        IGNORED,
        SHARDING,
        parse,
        Model,
        "GPT2ForSequenceClassification",
    ),
)
