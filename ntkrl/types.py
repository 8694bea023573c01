"""Data types shared by all subpackages; no logic.

Dimension key of array suffixes, shape checks and einsum strings (`ntk/` and `attribution/` add
letters of their own: ntk/jacobian_gram.py, attribution/linear_maps.py):

    P  prompts in the batch              D     model (feature) width
    N  completions per prompt            H, K  query heads, key/value heads
    B  sequences, B = P * N              E     width of one head
    T  token positions                   F     MLP width
    C  completion positions              V     vocabulary
    S  cache positions attended to       O, U  observed / updated positions of a kernel
    L  layers

A sequence is a left-padded prompt followed by its completion, so the completions of a
batch start at the same column. Everything here may be imported by every room.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax

Array = jax.Array
Params = Any
"""A tree of arrays: nested dicts for the models of this package, any pytree for `ntk`."""


class Total(NamedTuple):
    """A sum and the count it is to be divided by; only the outermost reducer divides.

    total: scalar sum.
    count: scalar number of items (sequences or tokens, as the producer documents).
    """

    total: Array
    count: Array  # type: ignore[assignment]  # shadows tuple.count


@chex.dataclass(frozen=True)
class Cache:
    """Keys and values of the positions read so far.

    keys, values: one array `[B, K, S, E]` per layer, so that a head's rows are adjacent and a
        decode step updates each in place.
    mask: `[B, S]` bool, True where a real token was written.
    length: scalar int32, columns written so far (equal for all rows).
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    mask: Array
    length: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """Pure functions over a params tree: the only interface to a network.

    features: `(params, tokens [N, T], mask [N, T] | None) -> [N, T, D]`, the head's input. The mask
        is bool, True on real tokens. An integer one holds segment numbers: 0 on padding, 1, 2, … on
        sequences packed into the row one after the other, each in adjacent columns; they neither
        see each other nor count each other's positions.
    head: `(params, features [..., D]) -> logits [..., V]`.
    init_cache: `(batch_size, length, dtype) -> Cache`.
    decode: `(copy, cache, tokens [B, T], mask [B, T]) -> (features [B, T, D], Cache)`;
        reads T further columns, so it serves the prefill and the single step alike. The mask is
        bool.
    decode_params: `params -> copy`, what `decode` reads: cast to the compute dtype, and each layer
        an array of its own (`layers/3/…`), since a layer cut out of a stack is copied for every
        token. `head_weight` and `head_bias` name the head's arrays in both. The params by default.
    decode_sharding: as `sharding`, over paths of the copy; None for `sharding`.
    head_weight: path of the `[V, D]` matrix the head multiplies by.
    head_bias: path of the `[V]` bias added to W φ, or None.
    head_scale: factor s on W φ + b.
    head_soft_cap: κ of κ tanh(s (W φ + b) / κ), or None for no cap.
    tied: True when the head's matrix is also the input embedding.
    stacked: prefixes of parameter paths whose leaves carry a leading layer axis.
    vocab_size, feature_size, max_tokens: V, D and the longest sequence allowed (tokens).
    max_decoded_tokens: longest sequence that `decode` continues as `features` reads it; None for
      max_tokens.
    sharding: ordered `(pattern, axes per dimension)` list over parameter paths.
    config: the family's frozen configuration (what export writes).
    source: directory the weights came from, or None.
    rebuild: `config -> Policy`, the same network under a changed configuration, or None.
    on_mesh: `mesh -> Policy`, the same network with its activations and cache on another mesh, or
        None for a network that is placed on none.
    """

    features: Callable[..., Array]
    head: Callable[[Params, Array], Array]
    init_cache: Callable[..., Cache]
    decode: Callable[..., tuple[Array, Cache]]
    head_weight: str
    tied: bool
    vocab_size: int
    feature_size: int
    max_tokens: int
    sharding: tuple[tuple[str, tuple[str | None, ...]], ...] = ((r".*", ()),)
    config: Any = None
    source: str | None = None
    head_bias: str | None = None
    head_scale: float = 1.0
    head_soft_cap: float | None = None
    stacked: tuple[str, ...] = ()
    rebuild: Callable[[Any], Policy] | None = None
    on_mesh: Callable[[Any], Policy] | None = None
    max_decoded_tokens: int | None = None
    decode_params: Callable[[Params], Params] = lambda params: params
    decode_sharding: tuple[tuple[str, tuple[str | None, ...]], ...] | None = None

    def __repr__(self) -> str:
        name = "of a network" if self.config is None else self.config.architecture
        source = "" if self.source is None else f" from {self.source}"
        tied = ", tied to the input embedding" if self.tied else ""
        return (
            f"Policy {name}{source}\n"
            f"  V = {self.vocab_size}, D = {self.feature_size}, at most {self.max_tokens} tokens\n"
            f"  head {self.head_weight}{tied}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
    """Pure functions of a reward model over a params tree.

    score: `(params, tokens [N, T], mask [N, T], gates [N]) -> {name: [N]}`, float32 or better;
        tokens are right-padded, gates are the columns where `gate` begins (0 without one).
    names: names of the results, the reward first; others are logged.
    pad_id: padding token id.
    gate: token ids whose last occurrence in the prompt the gate reads; empty without a gate.
    max_tokens, vocab_size: the longest sequence allowed (tokens), and V.
    sharding: ordered `(pattern, axes per dimension)` list over parameter paths.
    config: the trunk's frozen configuration.
    source: directory the weights came from.
    stacked: prefixes of parameter paths whose leaves carry a leading layer axis.
    """

    score: Callable[..., dict[str, Array]]
    names: tuple[str, ...]
    pad_id: int
    gate: tuple[int, ...]
    max_tokens: int
    vocab_size: int
    sharding: tuple[tuple[str, tuple[str | None, ...]], ...]
    config: Any
    source: str | None
    stacked: tuple[str, ...] = ()


@chex.dataclass(frozen=True)
class PromptBatch:
    """Tokenised prompts.

    tokens: `[P, T]` int32, left-padded.
    mask: `[P, T]` bool, True on real tokens.
    rows: `[P]` int32, row of each prompt in its prompt set.
    copies: `[P]` int32, number of earlier prompts of that row sampled with this key.
    """

    tokens: Array
    mask: Array
    rows: Array
    copies: Array


@chex.dataclass(frozen=True)
class Rollout:
    """Everything recorded while sampling; the N completions of a prompt are consecutive rows.

    tokens: `[B, T]` int32, prompt then completion (pad after the end).
    mask: `[B, T]` bool, True on real tokens.
    completion_mask: `[B, C]` bool, True on tokens that count in the loss (includes the
        end-of-sequence token).
    sampler_log_probs: `[B, C]` float32, log π of each sampled token at the sampling
        temperature, before any truncation (nats), 0 where masked.
    kept_log_mass: `[B, C]` float32, log of the mass that top-k, top-p and min-p left (nats, ≤ 0),
        so that tokens were drawn with sampler_log_probs − kept_log_mass; 0 where masked.
    finished: `[B]` bool, False where the completion was cut by the budget.
    features: `[B, C, D]` that predicted each token, or None if they were not requested.
    entropy: `[B, C]` float32, of the distribution at the sampling temperature that each token was
        sampled from, before any truncation (nats), 0 where masked; None from `rollout.engine`.
    """

    tokens: Array
    mask: Array
    completion_mask: Array
    sampler_log_probs: Array
    kept_log_mass: Array
    finished: Array
    features: Array | None = None
    entropy: Array | None = None


@chex.dataclass(frozen=True)
class UpdateBatch:
    """The batch of one optimizer step.

    tokens, mask: `[B, T]`, as in Rollout; or packed rows with segment numbers (see Policy).
    completion_mask: `[B, C]` bool.
    old_log_probs: `[B, C]` log-probs before the update (nats).
    ref_log_probs: `[B, C]` log-probs of the reference policy (nats).
    advantages: `[B, C]` weight on each token's score function, any correction folded in.
    penalties: `[B, C]` coefficient of |log π − log π_old| at each token, or None for none.
    kl_advantages: `[B, C]` the part of the advantages that comes from the KL in the reward; None
        without one, and where advantages do not split.
    features: `[B, C, D]` that predict each completion token, where the body need not be read
        again because the step does not move it; or None.
    ref_features: `[B, C, D]` of the reference policy, where its whole distribution is needed.
    """

    tokens: Array
    mask: Array
    completion_mask: Array
    old_log_probs: Array
    ref_log_probs: Array
    advantages: Array
    penalties: Array | None = None
    kl_advantages: Array | None = None
    features: Array | None = None
    ref_features: Array | None = None


@chex.dataclass(frozen=True)
class PreferenceBatch:
    """Pairs of texts, the chosen one first.

    tokens: `[B, 2, T]` int32, right-padded.
    mask: `[B, 2, T]` bool, True on real tokens.
    gates: `[B, 2]` int32, columns a Scorer's gate reads.
    """

    tokens: Array
    mask: Array
    gates: Array


@chex.dataclass(frozen=True)
class TrainState:
    """Arrays only; what is static (policy, optimizer, labels) is closed over by the step.

    step: scalar int32, optimizer steps taken in all stages together.
    params: the whole params tree.
    opt_state: state of the current stage's optimizer, trained leaves only.
    key: PRNG key of the run, consumed by splitting once per rollout step.
    reference: params of the reference policy where they move, None where they are the first ones.
    """

    step: Array
    params: Params
    opt_state: Any
    key: Array
    reference: Params | None = None


@chex.dataclass(frozen=True)
class ProbeSet:
    """A fixed set of completions read over and over during training.

    tokens, mask: `[B, T]`, as in Rollout.
    completion_mask: `[B, C]` bool, the observed tokens.
    groups: `[B]` int32, rows with equal entries answer the same prompt.
    """

    tokens: Array
    mask: Array
    completion_mask: Array
    groups: Array
