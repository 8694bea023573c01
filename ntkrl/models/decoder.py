"""The decoder of every supported family, by its Config: norms, attention and MLP in two forms each.

GPT-2 and GPT-NeoX have LayerNorm, fused query-key-value products and a plain MLP; the others
RMSNorm, grouped queries and a gated MLP. A family file reads its config.json into `Config`
and lists its stored tensors.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ntkrl.models import layers as nn
from ntkrl.models.activations import ACTIVATIONS
from ntkrl.models.experts import Mixture, Routing
from ntkrl.models.positions import Positions, token_positions
from ntkrl.models.rope import Rope, rotary_tables, rotate
from ntkrl.types import Array, Cache

Sharding = tuple[tuple[str, tuple[str | None, ...]], ...]

# mesh axes per dimension; layers carry a leading stack axis
SHARDING: Sharding = (
    (r"embed/embedding|head/weight", ("tensor", "fsdp")),
    (r"positions/embedding", (None, "fsdp")),
    (
        r"layers/(attention/(query|key|value|qkv)|mlp/(gate|up|gate_up))/kernel",
        (None, "fsdp", "tensor"),
    ),
    (r"layers/(attention/out|mlp/down)/kernel", (None, "tensor", "fsdp")),
    (r"layers/(attention/(query|key|value|qkv)|mlp/(gate|up|gate_up))/bias", (None, "tensor")),
    (r".*", ()),
)


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """Differences between the layers of a stack.

    rope: rotary positions, or None.
    window: visible tokens per query, itself included; None for all before it.
    """

    rope: Rope | None
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of a decoder, in Hugging Face's names where they exist.

    architecture: Hugging Face's class name.
    head_dim: width of one head, E; H·E need not be D.
    norm: "rms" or "layer" (with bias); norm_eps: its ε; norm_offset: added to every RMSNorm scale.
    kinds, layer_kinds: the kinds of layers, and the index of each layer's kind.
    query_scale: factor on attention scores.
    fused_qkv: None for three products; for one, the order of its output: "qkv", all queries, then
      keys, then values; "head", query, key and value of each head in turn.
    attention_bias: biases on queries, keys and values; output_bias: on the product after them.
    query_key_norm: RMSNorm over E on queries and keys, before rotation; wide_query_key_norm: over
      all heads at once instead.
    gated_mlp: down(act(gate x) ⊙ up x) in place of down(act(up x)); fused_mlp: one product for
      gate and up, in this order.
    routing: of a mixture of gated experts in place of the MLP, or None.
    pre_norms: norms before attention and MLP; post_norms: after them, before the residual sum.
    parallel_residual: the MLP reads the layer's input, not the sum after attention.
    learned_positions: embeddings of positions are added to those of tokens.
    embedding_scale: factor on token embeddings.
    name: of the checkpoint as the user gave it, for export: a directory, hub name or file.
    extra: config.json as read, for export.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    hidden_act: str
    norm_eps: float
    tie_word_embeddings: bool
    initializer_range: float
    kinds: tuple[LayerKind, ...]
    layer_kinds: tuple[int, ...]
    query_scale: float
    norm: str = "rms"
    norm_offset: float = 0.0
    fused_qkv: str | None = None
    attention_bias: bool = False
    output_bias: bool = False
    query_key_norm: bool = False
    wide_query_key_norm: bool = False
    gated_mlp: bool = True
    fused_mlp: bool = False
    mlp_bias: bool = False
    routing: Routing | None = None
    pre_norms: bool = True
    post_norms: bool = False
    parallel_residual: bool = False
    learned_positions: bool = False
    embedding_scale: float = 1.0
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    adapters: nn.Adapters | None = None
    name: str | None = dataclasses.field(default=None, compare=False)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def decode_limit(self) -> int | None:
        """Longest sequence to decode; None without LongRoPE, whose factors must not change."""
        limits = (kind.rope.decode_limit for kind in self.kinds if kind.rope is not None)
        known = [limit for limit in limits if limit is not None]
        return min(known, default=None)


class Attention(nnx.Module):
    """Self-attention with grouped queries."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: Any):
        self.config = config
        linear = nn.linear(config, rngs, dtype)
        width, bias = config.hidden_size, config.attention_bias
        heads, shared = (
            count * config.head_dim
            for count in (config.num_attention_heads, config.num_key_value_heads)
        )
        if config.fused_qkv is not None:
            self.qkv = linear("attention/qkv", width, heads + 2 * shared, bias)
        else:
            self.query = linear("attention/query", width, heads, bias)
            self.key = linear("attention/key", width, shared, bias)
            self.value = linear("attention/value", width, shared, bias)
        self.out = linear("attention/out", heads, width, config.output_bias)
        if config.query_key_norm:
            wide = config.wide_query_key_norm
            sizes = (heads, shared) if wide else (config.head_dim, config.head_dim)
            self.query_norm, self.key_norm = (
                nn.RMSNorm(size, config.norm_eps, dtype, config.norm_offset) for size in sizes
            )

    def __call__(
        self, x_BTD: Array, inputs: nn.AttentionInputs, update_cache: nn.UpdateCache
    ) -> Array:
        queries, keys, values = self._project(x_BTD)
        if self.config.query_key_norm and not self.config.wide_query_key_norm:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        if inputs.rotary is not None:
            queries, keys = rotate(queries, inputs.rotary), rotate(keys, inputs.rotary)
        keys, values = update_cache(keys, values)
        scaling = (self.config.query_scale, self.config.attn_logit_softcapping)
        mixed = nn.attention(queries, keys, values, inputs.allowed, *scaling)
        return self.out(mixed.reshape(*x_BTD.shape[:2], -1))

    def _project(self, x_BTD: Array) -> tuple[Array, Array, Array]:
        """Return queries `[B, T, H, E]`, keys and values `[B, T, K, E]`."""
        rows, width = x_BTD.shape[:2], self.config.head_dim
        if self.config.fused_qkv == "head":
            parts = jnp.split(self.qkv(x_BTD).reshape(*rows, -1, 3, width), 3, axis=-2)
            queries, keys, values = (jnp.squeeze(part, -2) for part in parts)
            return queries, keys, values
        if self.config.fused_qkv == "qkv":
            heads = self.config.num_attention_heads * width
            ends = (heads, heads + self.config.num_key_value_heads * width)
            queries, keys, values = jnp.split(self.qkv(x_BTD), ends, axis=-1)
        else:
            queries, keys, values = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if self.config.wide_query_key_norm:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        shape = (*rows, -1, width)
        return queries.reshape(shape), keys.reshape(shape), values.reshape(shape)


class MLP(nnx.Module):
    """down(act(up x)), or gated down(act(gate x) ⊙ up x) (Shazeer 2002.05202)."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: Any):
        linear = nn.linear(config, rngs, dtype)
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = config.hidden_act
        self.gated, self.fused = config.gated_mlp, config.fused_mlp
        if self.fused:
            self.gate_up = linear("mlp/gate_up", width, 2 * inner, bias)
        else:
            if self.gated:
                self.gate = linear("mlp/gate", width, inner, bias)
            self.up = linear("mlp/up", width, inner, bias)
        self.down = linear("mlp/down", inner, width, bias)

    def __call__(self, x_BTD: Array, mesh: Mesh | None = None) -> Array:
        activation = ACTIVATIONS[self.activation]
        if self.fused:
            gate, up = jnp.split(self.gate_up(x_BTD), 2, axis=-1)
            return self.down(activation(gate) * up)
        if self.gated:
            return self.down(activation(self.gate(x_BTD)) * self.up(x_BTD))
        return self.down(activation(self.up(x_BTD)))


class DecoderLayer(nnx.Module):
    """One decoder layer."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: Any):
        self.pre, self.post = config.pre_norms, config.post_norms
        self.parallel = config.parallel_residual
        if self.pre:
            self.input_norm = _norm(config, rngs, dtype)
            self.mlp_norm = _norm(config, rngs, dtype)
        if self.post:
            self.attention_out_norm = _norm(config, rngs, dtype)
            self.mlp_out_norm = _norm(config, rngs, dtype)
        self.attention = Attention(config, rngs, dtype)
        self.mlp = (MLP if config.routing is None else Mixture)(config, rngs, dtype)

    def __call__(
        self,
        x_BTD: Array,
        inputs: nn.AttentionInputs,
        update_cache: nn.UpdateCache,
        mesh: Mesh | None = None,
    ) -> Array:
        attended = self.attention(
            self.input_norm(x_BTD) if self.pre else x_BTD, inputs, update_cache
        )
        y_BTD = x_BTD + (self.attention_out_norm(attended) if self.post else attended)
        z_BTD = x_BTD if self.parallel else y_BTD
        transformed = self.mlp(self.mlp_norm(z_BTD) if self.pre else z_BTD, mesh)
        return y_BTD + (self.mlp_out_norm(transformed) if self.post else transformed)


class Transformer(nnx.Module):
    """The trunk of a language model: all but its output head."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: Any):
        self.config = config
        width, deviation = config.hidden_size, config.initializer_range
        self.embed = nn.embedding(config.vocab_size, width, deviation, rngs, dtype)
        if config.learned_positions:
            rows = config.max_position_embeddings
            self.positions = nn.embedding(rows, width, deviation, rngs, dtype)
        self.layers = nn.stack_layers(
            lambda rngs: DecoderLayer(config, rngs, dtype), config.num_hidden_layers, rngs
        )
        self.final_norm = _norm(config, rngs, dtype)

    def features(self, tokens_BT: Array, mask_BT: Array, execution: nn.Execution) -> Array:
        """Return the output `[B, T, D]` of the final norm."""
        positions, _ = token_positions(mask_BT, None)
        x_BTD, inputs = self._layer_inputs(tokens_BT, positions, execution.mesh)
        kinds = self.config.layer_kinds
        return self.final_norm(nn.scan_layers(self.layers, x_BTD, inputs, kinds, execution))

    def decode(
        self,
        layers: Sequence[DecoderLayer],
        tokens_BT: Array,
        mask_BT: Array,
        cache: Cache,
        mesh: Mesh | None,
    ) -> tuple[Array, Cache]:
        """Return the output `[B, T, D]` of the final norm, and the cache after the tokens.

        Args:
          layers: separate layers, in place of the stacked ones.
          tokens_BT, mask_BT, cache, mesh: as in `types.Policy`.
        """
        positions, extended = token_positions(mask_BT, cache)
        assert extended is not None  # as there was a cache
        x_BTD, inputs = self._layer_inputs(tokens_BT, positions, mesh)
        kinds = self.config.layer_kinds
        x_BTD, cache = nn.decode_layers(layers, x_BTD, inputs, kinds, extended, mesh)
        return self.final_norm(x_BTD), cache

    def _layer_inputs(
        self, tokens_BT: Array, positions: Positions, mesh: Mesh | None
    ) -> tuple[Array, list[nn.AttentionInputs]]:
        """Return the input `[B, T, D]` of the first layer, and one AttentionInputs per kind."""
        config = self.config
        inputs = [
            nn.AttentionInputs(
                None
                if kind.rope is None
                else rotary_tables(positions.position, positions.length, kind.rope),
                positions.within(kind.window),
            )
            for kind in config.kinds
        ]
        x_BTD = nn.embed_tokens(self.embed, tokens_BT, mesh)
        if config.embedding_scale != 1.0:  # rounded to the compute dtype, as in training
            x_BTD = x_BTD * jnp.asarray(config.embedding_scale, x_BTD.dtype)
        if config.learned_positions:
            x_BTD = x_BTD + jnp.take(self.positions.embedding[...], positions.position, axis=0)
        return x_BTD, inputs


def _norm(config: Config, rngs: nnx.Rngs, dtype: Any) -> nnx.Module:
    if config.norm == "layer":
        return nn.layer_norm(config.hidden_size, config.norm_eps, rngs, dtype)
    return nn.RMSNorm(config.hidden_size, config.norm_eps, dtype, config.norm_offset)
