"""GPT-NeoX (Pythia): parallel or sequential residual, partial rotary, LayerNorm, untied or tied.

Source: Black et al. 2204.06745; tensor names and arithmetic as in transformers' GPTNeoXForCausalLM.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from flax import nnx

from ntkrl.models import layers as nn
from ntkrl.models import rotary
from ntkrl.models.family import Adapters, EqualHeads, Family, Running, Table
from ntkrl.models.reading import ConfigReader
from ntkrl.types import Array, Cache

ARCHITECTURE = "GPTNeoXForCausalLM"

# our name · Hugging Face name ({i}: the layer, stacked) · transpose (kernels are [in, out] here)
WEIGHTS: Table = (
    ("embed/embedding", "gpt_neox.embed_in.weight", False),
    ("layers/input_norm/scale", "gpt_neox.layers.{i}.input_layernorm.weight", False),
    ("layers/input_norm/bias", "gpt_neox.layers.{i}.input_layernorm.bias", False),
    ("layers/mlp_norm/scale", "gpt_neox.layers.{i}.post_attention_layernorm.weight", False),
    ("layers/mlp_norm/bias", "gpt_neox.layers.{i}.post_attention_layernorm.bias", False),
    ("layers/attention/qkv/kernel", "gpt_neox.layers.{i}.attention.query_key_value.weight", True),
    ("layers/attention/qkv/bias", "gpt_neox.layers.{i}.attention.query_key_value.bias", False),
    ("layers/attention/out/kernel", "gpt_neox.layers.{i}.attention.dense.weight", True),
    ("layers/attention/out/bias", "gpt_neox.layers.{i}.attention.dense.bias", False),
    ("layers/mlp/up/kernel", "gpt_neox.layers.{i}.mlp.dense_h_to_4h.weight", True),
    ("layers/mlp/up/bias", "gpt_neox.layers.{i}.mlp.dense_h_to_4h.bias", False),
    ("layers/mlp/down/kernel", "gpt_neox.layers.{i}.mlp.dense_4h_to_h.weight", True),
    ("layers/mlp/down/bias", "gpt_neox.layers.{i}.mlp.dense_4h_to_h.bias", False),
    ("final_norm/scale", "gpt_neox.final_layer_norm.weight", False),
    ("final_norm/bias", "gpt_neox.final_layer_norm.bias", False),
    ("head/weight", "embed_out.weight", False),
)

# buffers that older checkpoints store and that carry no parameter
IGNORED: tuple[str, ...] = (
    r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    r"gpt_neox\.rotary_emb\.inv_freq",
)

# axes per dimension; layers carry a leading stack axis
SHARDING: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed/embedding|head/weight", ("tensor", "fsdp")),
    (r"layers/(attention/qkv|mlp/up)/kernel", (None, "fsdp", "tensor")),
    (r"layers/(attention/out|mlp/down)/kernel", (None, "tensor", "fsdp")),
    (r"layers/(attention/qkv|mlp/up)/bias", (None, "tensor")),
    (r".*", ()),
)


@dataclasses.dataclass(frozen=True)
class Config(EqualHeads):
    """Shape of a GPT-NeoX model, in Hugging Face's names.

    rope: rotary positions.
    extra: config.json as it was read, for export.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    hidden_act: str
    rope: rotary.Rope
    layer_norm_eps: float
    use_parallel_residual: bool
    attention_bias: bool
    tie_word_embeddings: bool
    initializer_range: float
    adapters: Adapters | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    architecture: ClassVar[str] = ARCHITECTURE
    final_logit_softcapping: ClassVar[None] = None


def parse(raw: Mapping[str, Any]) -> Config:
    """Read config.json in either spelling of the rotary settings.

    Args:
      raw: the parsed JSON.

    Raises:
      ValueError: missing or impossible entries, all in one message.
    """
    reader = ConfigReader(raw)
    width, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    reader.divides("hidden_size", width, "num_attention_heads", heads)
    rope = reader.rope(width // heads, 10000.0, "rotary_emb_base", share=("rotary_pct", 0.25))
    config = Config(
        vocab_size=reader.integer("vocab_size"),
        hidden_size=width,
        num_hidden_layers=reader.integer("num_hidden_layers"),
        num_attention_heads=heads,
        intermediate_size=reader.integer("intermediate_size"),
        max_position_embeddings=reader.integer("max_position_embeddings"),
        hidden_act=reader.choice("hidden_act", "gelu", nn.ACTIVATIONS),
        rope=rope,
        layer_norm_eps=reader.number("layer_norm_eps", 1e-5),
        use_parallel_residual=reader.boolean("use_parallel_residual", True),
        attention_bias=reader.boolean("attention_bias", True),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", False),
        initializer_range=reader.number("initializer_range", 0.02),
        extra={"model_type": "gpt_neox", **raw},
    )
    reader.finish("GPT-NeoX")
    return config


class Attention(nnx.Module):
    """Self-attention with one fused query-key-value product."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: Any):
        self.config = config
        width, bias = config.hidden_size, config.attention_bias
        make = nn.linear(config, rngs, dtype)
        self.qkv = make("attention/qkv", width, 3 * width, bias)
        self.out = make("attention/out", width, width, bias)

    def __call__(self, x_BTD: Array, reading: nn.Reading, remember: Callable) -> Array:
        batch, length, _ = x_BTD.shape
        heads, width = self.config.num_attention_heads, self.config.head_dim
        # the fused output is laid out head by head, each head's q, k, v in turn
        fused = self.qkv(x_BTD).reshape(batch, length, heads, 3, width)
        queries, keys, values = fused[..., 0, :], fused[..., 1, :], fused[..., 2, :]
        queries, keys = rotary.rotate(queries, reading.turns), rotary.rotate(keys, reading.turns)
        keys, values = remember(keys, values)
        mixed = nn.attention(queries, keys, values, reading.allowed)
        return self.out(mixed.reshape(batch, length, heads * width))


class Layer(nnx.Module):
    """One decoder layer."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: Any):
        width = config.hidden_size
        self.parallel = config.use_parallel_residual
        self.input_norm = nn.layer_norm(width, config.layer_norm_eps, rngs, dtype)
        self.mlp_norm = nn.layer_norm(width, config.layer_norm_eps, rngs, dtype)
        self.attention = Attention(config, rngs, dtype)
        self.mlp = nn.MLP(config, rngs, dtype)

    def __call__(self, x_BTD: Array, reading: nn.Reading, remember: Callable) -> Array:
        attended = x_BTD + self.attention(self.input_norm(x_BTD), reading, remember)
        source = x_BTD if self.parallel else attended
        return attended + self.mlp(self.mlp_norm(source))


class Model(nnx.Module):
    """The decoder; `features` are the output of the final norm."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: Any):
        self.config = config
        width, deviation = config.hidden_size, config.initializer_range
        self.embed = nn.embedding(config.vocab_size, width, deviation, rngs, dtype)
        self.layers = nn.stacked(
            lambda rngs: Layer(config, rngs, dtype), config.num_hidden_layers, rngs
        )
        self.final_norm = nn.layer_norm(width, config.layer_norm_eps, rngs, dtype)

    def features(
        self, tokens_BT: Array, mask_BT: Array, cache: Cache | None, running: Running
    ) -> tuple[Array, Cache | None]:
        """Return the head's input `[B, T, D]` and the cache after reading the tokens."""
        places, cache = nn.places(mask_BT, cache)
        turns = rotary.tables(places.positions, self.config.rope)
        sight = nn.Sight(turns, places.allowed)
        x_BTD = nn.look_up(self.embed, tokens_BT, running)
        x_BTD, cache = nn.scan_layers(self.layers, x_BTD, [sight], None, cache, running)
        return self.final_norm(x_BTD), cache


FAMILIES = (
    Family(
        ARCHITECTURE,
        "GPT-NeoX (Pythia)",
        "gpt_neox.",
        WEIGHTS,
        IGNORED,
        SHARDING,
        parse,
        Model,
        "GPTNeoXForSequenceClassification",
    ),
)
