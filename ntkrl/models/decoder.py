"""The decoder that Llama, Qwen and Gemma are variants of: RMSNorm, gated MLP, grouped queries.

A family file reads its config.json into the `Config` here and says which tensors it stores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from ntkrl.models import layers as nn
from ntkrl.models import rotary
from ntkrl.models.family import Adapters, Family, Running, Table
from ntkrl.models.reading import ConfigReader
from ntkrl.types import Array, Cache

ACTIVATIONS = nn.ACTIVATIONS
FULL, SLIDING = "full_attention", "sliding_attention"

# our name · Hugging Face name ({i}: the layer, stacked) · transpose (kernels are [in, out] here)
_NAMES: tuple[tuple[str, str], ...] = (
    ("input_norm/scale", "input_layernorm.weight"),
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
# a layer has two norms, before attention and before the MLP, or four: after each as well
_TWO_NORMS = (("mlp_norm/scale", "post_attention_layernorm.weight"),)
_FOUR_NORMS = (
    ("attention_out_norm/scale", "post_attention_layernorm.weight"),
    ("mlp_norm/scale", "pre_feedforward_layernorm.weight"),
    ("mlp_out_norm/scale", "post_feedforward_layernorm.weight"),
)

# buffers that older checkpoints store and that carry no parameter
IGNORED: tuple[str, ...] = (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)

# axes per dimension; layers carry a leading stack axis
SHARDING: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed/embedding|head/weight", ("tensor", "fsdp")),
    (r"layers/(attention/(query|key|value)|mlp/(gate|up))/kernel", (None, "fsdp", "tensor")),
    (r"layers/(attention/out|mlp/down)/kernel", (None, "tensor", "fsdp")),
    (r"layers/(attention/(query|key|value)|mlp/(gate|up))/bias", (None, "tensor")),
    (r".*", ()),
)


def weights(four_norms: bool) -> Table:
    """Return the table of tensors: our name, stored name, transpose."""
    names = _NAMES + (_FOUR_NORMS if four_norms else _TWO_NORMS)
    return (
        ("embed/embedding", "model.embed_tokens.weight", False),
        *(
            (f"layers/{ours}", f"model.layers.{{i}}.{stored}", ours.endswith("kernel"))
            for ours, stored in names
        ),
        ("final_norm/scale", "model.norm.weight", False),
        ("head/weight", "lm_head.weight", False),
    )


@dataclasses.dataclass(frozen=True)
class Kind:
    """What differs between layers of a stack.

    rope: rotary positions.
    window: tokens that a query sees, itself included; None for all before it.
    """

    rope: rotary.Rope
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of a decoder, in Hugging Face's names where they exist.

    architecture: Hugging Face's class name.
    head_dim: width of one head, E; H·E need not be D.
    kinds, layer_kinds: the kinds of layers, and the index of each layer's kind.
    query_scale: factor on attention scores.
    attention_bias: whether queries, keys and values have one; output_bias: the product after them.
    query_key_norm: RMSNorm over E on queries and keys, before they are rotated.
    four_norms: norms after attention and MLP too, before they are added.
    norm_offset: added to the stored scale of every RMSNorm.
    embedding_scale: factor on embeddings as they enter.
    extra: config.json as it was read, for export.
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
    rms_norm_eps: float
    tie_word_embeddings: bool
    initializer_range: float
    kinds: tuple[Kind, ...]
    layer_kinds: tuple[int, ...]
    query_scale: float
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: bool = False
    four_norms: bool = False
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    adapters: Adapters | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)


def read_sizes(reader: ConfigReader, head_dim: int | None = None) -> dict[str, Any]:
    """Read the entries all variants share.

    Args:
      reader: of config.json.
      head_dim: width of a head where the file gives none; None for D/H.

    Returns:
      Arguments of `Config`.
    """
    width, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    shared = reader.integer("num_key_value_heads", heads)
    reader.divides("num_attention_heads", heads, "num_key_value_heads", shared)
    given = reader.optional_integer("head_dim", head_dim)
    if given is None:
        reader.divides("hidden_size", width, "num_attention_heads", heads)
    elif given % 2:
        reader.problems.append(f"head_dim {given} must be even")
    return {
        "vocab_size": reader.integer("vocab_size"),
        "hidden_size": width,
        "num_hidden_layers": reader.integer("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "head_dim": width // heads if given is None else given,
        "intermediate_size": reader.integer("intermediate_size"),
        "max_position_embeddings": reader.integer("max_position_embeddings"),
        "rms_norm_eps": reader.number("rms_norm_eps", 1e-6),
        "initializer_range": reader.number("initializer_range", 0.02),
    }


def read_kinds(
    reader: ConfigReader,
    usual: Sequence[str],
    window: int | None,
    ropes: Mapping[str, rotary.Rope],
    rope: rotary.Rope,
) -> tuple[tuple[Kind, ...], tuple[int, ...]]:
    """Return the kinds of layers and each layer's, from `layer_types` or the usual order.

    Args:
      reader: of config.json.
      usual: FULL or SLIDING per layer where the file does not say.
      window: of sliding layers; None for none.
      ropes: by type; missing ones are `rope`.
      rope: rotary positions.
    """
    types = reader.words("layer_types", usual, (FULL, SLIDING))
    of_type = {
        kind: Kind(ropes[kind] if kind in ropes else rope, window if kind == SLIDING else None)
        for kind in types
    }
    kinds = tuple(dict.fromkeys(of_type.values()))
    return kinds, tuple(kinds.index(of_type[kind]) for kind in types)


class Attention(nnx.Module):
    """Self-attention with grouped queries."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: Any):
        self.config = config
        make = nn.linear(config, rngs, dtype)
        width, bias = config.hidden_size, config.attention_bias
        heads, shared = (
            count * config.head_dim
            for count in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.query = make("attention/query", width, heads, bias)
        self.key = make("attention/key", width, shared, bias)
        self.value = make("attention/value", width, shared, bias)
        self.out = make("attention/out", heads, width, config.output_bias)
        if config.query_key_norm:
            self.query_norm = _norm(config, config.head_dim, dtype)
            self.key_norm = _norm(config, config.head_dim, dtype)

    def __call__(self, x_BTD: Array, reading: nn.Reading, remember: Callable) -> Array:
        config, shape = self.config, (*x_BTD.shape[:2], -1, self.config.head_dim)
        queries, keys = self.query(x_BTD).reshape(shape), self.key(x_BTD).reshape(shape)
        if config.query_key_norm:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        queries, keys = rotary.rotate(queries, reading.turns), rotary.rotate(keys, reading.turns)
        keys, values = remember(keys, self.value(x_BTD).reshape(shape))
        scaling = (config.query_scale, config.attn_logit_softcapping)
        mixed = nn.attention(queries, keys, values, reading.allowed, *scaling)
        return self.out(mixed.reshape(*x_BTD.shape[:2], -1))


class GatedMLP(nnx.Module):
    """down(act(gate x) ⊙ up x); Shazeer 2002.05202."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: Any):
        make = nn.linear(config, rngs, dtype)
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = config.hidden_act
        self.gate = make("mlp/gate", width, inner, bias)
        self.up = make("mlp/up", width, inner, bias)
        self.down = make("mlp/down", inner, width, bias)

    def __call__(self, x_BTD: Array) -> Array:
        return self.down(nn.ACTIVATIONS[self.activation](self.gate(x_BTD)) * self.up(x_BTD))


class Layer(nnx.Module):
    """One decoder layer, with two norms or four."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: Any):
        self.four_norms = config.four_norms
        self.input_norm = _norm(config, config.hidden_size, dtype)
        self.mlp_norm = _norm(config, config.hidden_size, dtype)
        if config.four_norms:
            self.attention_out_norm = _norm(config, config.hidden_size, dtype)
            self.mlp_out_norm = _norm(config, config.hidden_size, dtype)
        self.attention = Attention(config, rngs, dtype)
        self.mlp = GatedMLP(config, rngs, dtype)

    def __call__(self, x_BTD: Array, reading: nn.Reading, remember: Callable) -> Array:
        attended = self.attention(self.input_norm(x_BTD), reading, remember)
        x_BTD = x_BTD + (self.attention_out_norm(attended) if self.four_norms else attended)
        made = self.mlp(self.mlp_norm(x_BTD))
        return x_BTD + (self.mlp_out_norm(made) if self.four_norms else made)


class Model(nnx.Module):
    """The decoder; `features` are the output of the final norm."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: Any):
        self.config = config
        sizes = (config.vocab_size, config.hidden_size, config.initializer_range)
        self.embed = nn.embedding(*sizes, rngs, dtype)
        self.layers = nn.stacked(
            lambda rngs: Layer(config, rngs, dtype), config.num_hidden_layers, rngs
        )
        self.final_norm = _norm(config, config.hidden_size, dtype)

    def features(
        self, tokens_BT: Array, mask_BT: Array, cache: Cache | None, running: Running
    ) -> tuple[Array, Cache | None]:
        """Return the head's input `[B, T, D]` and the cache after reading the tokens."""
        places, cache = nn.places(mask_BT, cache)
        sights = [
            nn.Sight(rotary.tables(places.positions, kind.rope), places.within(kind.window))
            for kind in self.config.kinds
        ]
        x_BTD = nn.look_up(self.embed, tokens_BT, running)
        if self.config.embedding_scale != 1.0:  # rounded to the compute dtype, as in training
            x_BTD = x_BTD * jnp.asarray(self.config.embedding_scale, x_BTD.dtype)
        kinds = self.config.layer_kinds if len(sights) > 1 else None
        x_BTD, cache = nn.scan_layers(self.layers, x_BTD, sights, kinds, cache, running)
        return self.final_norm(x_BTD), cache


def _norm(config: Config, width: int, dtype: Any) -> nn.RMSNorm:
    return nn.RMSNorm(width, config.rms_norm_eps, dtype, config.norm_offset)


def family(
    architecture: str,
    label: str,
    parse: Callable[[Mapping[str, Any]], Config],
    scorer: str,
    four_norms: bool = False,
) -> Family:
    """Return a variant as a Family."""
    table = weights(four_norms)
    return Family(architecture, label, "model.", table, IGNORED, SHARDING, parse, Model, scorer)
