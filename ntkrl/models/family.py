"""What a model family hands to the loader."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import nnx
from jax.sharding import Mesh

Table = tuple[tuple[str, str, bool], ...]
"""Rows: our name · stored name, `{i}` for the layer of a stacked leaf · transposed or not."""


REMAT = ("none", "products", "all")
"""What the backward pass makes again: nothing, all but products with weights, whole layers."""


class Running(NamedTuple):
    """How a network runs.

    remat: one of REMAT. mesh: that activations are spread over, rows by data and fsdp, heads by
    tensor; None for wherever they come to lie.
    """

    remat: str = "products"
    mesh: Mesh | None = None


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Low-rank adapters (LoRA) on some matrix products of every layer.

    modules: our names within a layer, such as "attention/query".
    rank: r ≥ 1.
    scaling: factor α/r on what they add.
    """

    modules: tuple[str, ...]
    rank: int
    scaling: float


class EqualHeads:
    """A config whose queries, keys and values have as many heads, which share the width."""

    hidden_size: int
    num_attention_heads: int

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Heads that the cache holds."""
        return self.num_attention_heads


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """One architecture of Hugging Face's.

    architecture: its class name with the language model's head.
    label: how people call it.
    prefix: of stored trunk tensors; absent where the trunk alone was saved.
    weights: the table of tensors, the head's row `head/weight` last.
    ignored: regular expressions of stored buffers that carry no parameter.
    sharding: ordered `(pattern, mesh axes per dimension)` list over our names.
    parse: config.json to the family's frozen config.
    model: `(config, rngs, dtype) -> nnx.Module` with `features`, the trunk without head.
    scorer: class name of the same trunk with a sequence-classification head.
    stacked: prefixes of our names whose leaves carry a leading layer axis.

    Every config has architecture, vocab_size, hidden_size, num_hidden_layers, num_key_value_heads,
    head_dim, max_position_embeddings, tie_word_embeddings, initializer_range, adapters,
    final_logit_softcapping and `extra`, config.json as it was read.
    """

    architecture: str
    label: str
    prefix: str
    weights: Table
    ignored: tuple[str, ...]
    sharding: tuple[tuple[str, tuple[str | None, ...]], ...]
    parse: Callable[[Mapping[str, Any]], Any]
    model: Callable[..., nnx.Module]
    scorer: str
    stacked: tuple[str, ...] = ("layers",)

    @property
    def head_name(self) -> str:
        """The head's stored name."""
        return self.weights[-1][1]

    def unparse(self, config: Any) -> dict[str, Any]:
        """Return the config.json of a model: what was read, with what may have changed."""
        return {
            **config.extra,
            "architectures": [config.architecture],
            "vocab_size": config.vocab_size,
            "tie_word_embeddings": config.tie_word_embeddings,
        }
