"""GPT-NeoX (Pythia): parallel or sequential residual, partial rotary, LayerNorm, untied or tied.

Source: Black et al. 2204.06745; tensor names and arithmetic as in transformers' GPTNeoXForCausalLM.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from ntkrl.models import layers as nn
from ntkrl.models.reading import ConfigReader
from ntkrl.types import Array, Cache

ARCHITECTURE = "GPTNeoXForCausalLM"

# our name · Hugging Face name ({i}: the layer, stacked) · transpose (kernels are [in, out] here)
WEIGHTS: tuple[tuple[str, str, bool], ...] = (
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

# leaves below carry a leading layer axis
STACKED: tuple[str, ...] = ("layers",)

# axes per dimension; layers carry a leading stack axis
SHARDING: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed/embedding|head/weight", ("tensor", "fsdp")),
    (r"layers/(attention/qkv|mlp/up)/kernel", (None, "fsdp", "tensor")),
    (r"layers/(attention/out|mlp/down)/kernel", (None, "tensor", "fsdp")),
    (r"layers/(attention/qkv|mlp/up)/bias", (None, "tensor")),
    (r".*", ()),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of a GPT-NeoX model, in Hugging Face's names.

    rotary_pct: share of each head's dimensions that is rotated, in (0, 1].
    rope_theta: base of the rotary frequencies.
    extra: config.json entries kept for export and otherwise unused.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    hidden_act: str = "gelu"
    rotary_pct: float = 0.25
    rope_theta: float = 10000.0
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = True
    attention_bias: bool = True
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_size(self) -> int:
        """Rotated dimensions of one head."""
        return int(self.head_size * self.rotary_pct)


def parse(raw: Mapping[str, Any]) -> Config:
    """Read config.json in either spelling of the rotary settings.

    Args:
      raw: the parsed JSON.

    Raises:
      ValueError: missing or impossible entries, all in one message.
    """
    reader = ConfigReader(raw)
    rope = reader.section("rope_parameters", "rope_scaling")
    sizes = {
        name: reader.integer(name)
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
        )
    }
    config = Config(
        **sizes,
        hidden_act=reader.choice("hidden_act", "gelu", nn.ACTIVATIONS),
        rotary_pct=reader.number("rotary_pct", 0.25, also=rope, under="partial_rotary_factor"),
        rope_theta=reader.number("rotary_emb_base", 10000.0, also=rope, under="rope_theta"),
        layer_norm_eps=reader.number("layer_norm_eps", 1e-5),
        use_parallel_residual=reader.boolean("use_parallel_residual", True),
        attention_bias=reader.boolean("attention_bias", True),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", False),
        initializer_range=reader.number("initializer_range", 0.02),
        extra=dict(raw),
    )
    reader.rope_type(rope)
    if not reader.problems:
        if config.hidden_size % config.num_attention_heads:
            reader.problems.append(
                f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads "
                f"{config.num_attention_heads}"
            )
        elif config.rotary_size % 2 or not 0 < config.rotary_pct <= 1:
            reader.problems.append(
                f"rotary_pct {config.rotary_pct} of a head of {config.head_size} gives "
                f"{config.rotary_size} rotated dimensions; it must be even and the share in (0, 1]"
            )
    reader.finish("GPT-NeoX")
    return config


def unparse(config: Config) -> dict[str, Any]:
    """Return the config.json of a model, both rotary spellings included."""
    fields = dataclasses.asdict(config)
    raw = {**fields.pop("extra"), **fields}
    theta = raw.pop("rope_theta")
    raw.update(
        model_type="gpt_neox",
        architectures=[ARCHITECTURE],
        rotary_emb_base=theta,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": theta,
            "partial_rotary_factor": config.rotary_pct,
        },
    )
    return raw


class Attention(nnx.Module):
    """Self-attention with one fused query-key-value product."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: Any):
        self.config = config
        bias = config.attention_bias
        make = _linear(config, rngs, dtype)
        self.qkv = make(config.hidden_size, 3 * config.hidden_size, use_bias=bias)
        self.out = make(config.hidden_size, config.hidden_size, use_bias=bias)

    def __call__(self, x_BTD: Array, reading: nn.Reading, remember) -> Array:
        batch, length, _ = x_BTD.shape
        heads, width = self.config.num_attention_heads, self.config.head_size
        # the fused output is laid out head by head, each head's q, k, v in turn
        fused = self.qkv(x_BTD).reshape(batch, length, heads, 3, width)
        queries, keys, values = fused[..., 0, :], fused[..., 1, :], fused[..., 2, :]
        queries, keys = nn.rotate(queries, reading.tables), nn.rotate(keys, reading.tables)
        keys, values = remember(keys, values)
        mixed = nn.attention(queries, keys, values, reading.allowed)
        return self.out(mixed.reshape(batch, length, heads * width))


class MLP(nnx.Module):
    """Two products around an activation."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: Any):
        make = _linear(config, rngs, dtype)
        self.activation = config.hidden_act
        self.up = make(config.hidden_size, config.intermediate_size)
        self.down = make(config.intermediate_size, config.hidden_size)

    def __call__(self, x_BTD: Array) -> Array:
        return self.down(nn.ACTIVATIONS[self.activation](self.up(x_BTD)))


class Layer(nnx.Module):
    """One decoder layer."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: Any):
        self.parallel = config.use_parallel_residual
        self.input_norm = _norm(config, rngs, dtype)
        self.mlp_norm = _norm(config, rngs, dtype)
        self.attention = Attention(config, rngs, dtype)
        self.mlp = MLP(config, rngs, dtype)

    def __call__(self, x_BTD: Array, reading: nn.Reading, remember) -> Array:
        attended = x_BTD + self.attention(self.input_norm(x_BTD), reading, remember)
        source = x_BTD if self.parallel else attended
        return attended + self.mlp(self.mlp_norm(source))


class Head(nnx.Module):
    """The classifier W `[V, D]`, without bias."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: Any):
        init = nnx.initializers.normal(config.initializer_range)
        self.weight = nnx.Param(init(rngs.params(), (config.vocab_size, config.hidden_size), dtype))


class GPTNeoX(nnx.Module):
    """Decoder and head; `features` are the output of the final norm."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        self.config = config
        init = nnx.initializers.normal(config.initializer_range)
        self.embed = nnx.Embed(
            config.vocab_size, config.hidden_size, embedding_init=init, param_dtype=dtype, rngs=rngs
        )
        self.layers = nn.stacked(
            lambda rngs: Layer(config, rngs, dtype), config.num_hidden_layers, rngs
        )
        self.final_norm = _norm(config, rngs, dtype)
        if not config.tie_word_embeddings:
            self.head = Head(config, rngs, dtype)

    def features(
        self, tokens_BT: Array, mask_BT: Array, cache: Cache | None, remat: bool
    ) -> tuple[Array, Cache | None]:
        """Return the head's input `[B, T, D]` and the cache after reading the tokens."""
        start = None if cache is None else cache.length
        positions_BT, allowed_BTS, cache = nn.positions_and_mask(mask_BT, cache)
        tables = nn.rotary_tables(positions_BT, self.config.rotary_size, self.config.rope_theta)
        reading = nn.Reading(tables, allowed_BTS, start)
        x_BTD = jnp.take(self.embed.embedding[...], tokens_BT, axis=0)
        x_BTD, cache = nn.scan_layers(self.layers, x_BTD, reading, cache, remat)
        return self.final_norm(x_BTD), cache

    def logits(self, features: Array) -> Array:
        """Multiply features `[..., D]` by W: `[..., V]`."""
        tied = self.config.tie_word_embeddings
        weight_VD = self.embed.embedding[...] if tied else self.head.weight[...]
        return jnp.einsum("...d,vd->...v", features, weight_VD)


def _linear(config: Config, rngs: nnx.Rngs, dtype: Any):
    init = nnx.initializers.normal(config.initializer_range)

    def make(inputs: int, outputs: int, use_bias: bool = True) -> nnx.Linear:
        return nnx.Linear(
            inputs, outputs, use_bias=use_bias, kernel_init=init, param_dtype=dtype, rngs=rngs
        )

    return make


def _norm(config: Config, rngs: nnx.Rngs, dtype: Any) -> nnx.LayerNorm:
    # the fast variance E[x²] − E[x]² loses digits that parity with the reference needs
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_eps,
        use_fast_variance=False,
        param_dtype=dtype,
        rngs=rngs,
    )


def cache_shape(config: Config, batch_size: int, length: int) -> tuple[int, ...]:
    """Return `(L, B, S, K, E)`."""
    heads = config.num_attention_heads
    return (config.num_hidden_layers, batch_size, length, heads, config.head_size)


model = GPTNeoX


def init_params(config: Config, key: Array, dtype: Any) -> Any:
    """Draw fresh parameters (normal, `initializer_range`; biases zero) as a nested dict."""
    return nnx.to_pure_dict(nnx.split(GPTNeoX(config, nnx.Rngs(key), dtype))[1])
