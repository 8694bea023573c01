"""ArmoRM: a Llama trunk, 19 attribute rewards, and a gate that reads the prompt alone.

With h the trunk's features, i the last token and j the end-of-turn token that closes the user's
last message (the start of GATE):

    r = R h_i    w = softmax(MLP(h_j) / temperature) · scale    score = Σ_k w_k (r T)_k

T subtracts from each attribute what verbosity explains of it. Source: Wang et al. 2406.12845,
checkpoint RLHFlow/ArmoRM-Llama3-8B-v0.1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ntkrl.models.family import Family
from ntkrl.models.reading import ConfigReader
from ntkrl.numerics import einsum
from ntkrl.types import Array, Params, Policy, Scorer

ARCHITECTURE = "LlamaForRewardModelWithGating"

# end of turn, start of header, "assistant", end of header, blank line: Llama 3's token ids
GATE = (128009, 128006, 78191, 128007, 271)

ATTRIBUTES = (
    "helpsteer-helpfulness",
    "helpsteer-correctness",
    "helpsteer-coherence",
    "helpsteer-complexity",
    "helpsteer-verbosity",
    "ultrafeedback-overall_score",
    "ultrafeedback-instruction_following",
    "ultrafeedback-truthfulness",
    "ultrafeedback-honesty",
    "ultrafeedback-helpfulness",
    "beavertails-is_safe",
    "prometheus-score",
    "argilla-overall_quality",
    "argilla-judge_lm",
    "code-complexity",
    "code-style",
    "code-explanation",
    "code-instruction-following",
    "code-readability",
)


Described = tuple[Family, Any, Params, Callable[[Policy], Scorer]]
"""Family with the heads' tensors, config of the trunk, shapes of the heads, and the Scorer of a
trunk."""


def described(raw: dict[str, Any], llama: Family, dtype: Any) -> Described:
    """Describe a checkpoint.

    Args:
      raw: config.json.
      llama: family of the trunk.
      dtype: of the heads, float32 or better whatever the trunk's.

    Raises:
      ValueError: impossible entries, all in one message.
    """
    parsed = llama.parse(raw)
    reader = ConfigReader(raw)
    count = reader.integer("num_objectives", len(ATTRIBUTES))
    inner, hidden = reader.integer("gating_hidden_dim", 1024), reader.integer("gating_n_hidden", 3)
    temperature = reader.number("gating_temperature", 10.0)
    pad_id = reader.token("pad_token_id")
    if parsed.vocab_size <= max(GATE):
        reader.problems.append(
            f"vocab_size {parsed.vocab_size} does not hold Llama 3's special tokens (up to "
            f"{max(GATE)}), by which the gate's position is found"
        )
    reader.finish("ArmoRM")
    sizes = [parsed.hidden_size, *[inner] * hidden, count]
    rows = [
        ("reward/weight", "regression_layer.weight", False),
        ("reward/transform", "reward_transform_matrix", False),
        ("gate/scale", "gating.logit_scale", False),
    ]
    shapes: dict[str, Any] = {
        "reward": {
            "weight": jax.ShapeDtypeStruct((count, parsed.hidden_size), dtype),
            "transform": jax.ShapeDtypeStruct((count, count), dtype),
        },
        "gate": {"scale": jax.ShapeDtypeStruct((1,), dtype)},
    }
    for i, (width, out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        rows.append((f"gate/{i}/kernel", f"gating.layers.{i}.weight", True))
        rows.append((f"gate/{i}/bias", f"gating.layers.{i}.bias", False))
        shapes["gate"][str(i)] = {
            "kernel": jax.ShapeDtypeStruct((width, out), dtype),
            "bias": jax.ShapeDtypeStruct((out,), dtype),
        }
    family = dataclasses.replace(llama, weights=(*llama.weights[:-1], *rows))
    names = (
        ATTRIBUTES if count == len(ATTRIBUTES) else tuple(f"attribute-{k}" for k in range(count))
    )
    return family, parsed, shapes, lambda policy: _scorer(policy, names, temperature, pad_id)


def _scorer(policy: Policy, names: tuple[str, ...], temperature: float, pad_id: int) -> Scorer:
    def score(params: Params, tokens: Array, mask: Array, gates: Array) -> dict[str, Array]:
        heads = {name: params[name] for name in ("reward", "gate")}
        trunk = {name: leaves for name, leaves in params.items() if name not in heads}
        dtype, rows = heads["reward"]["weight"].dtype, jnp.arange(tokens.shape[0])
        phi_NTD = policy.features(trunk, tokens, mask)
        last_N = tokens.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        rewards_NK = einsum(
            "nd,kd->nk", phi_NTD[rows, last_N].astype(dtype), heads["reward"]["weight"]
        )
        gate_NK = _gate(heads["gate"], phi_NTD[rows, gates].astype(dtype), temperature)
        adjusted_NK = einsum("nk,kl->nl", rewards_NK, heads["reward"]["transform"])
        found = {name: rewards_NK[:, k] for k, name in enumerate(names)}
        return {"score": jnp.sum(gate_NK * adjusted_NK, axis=1), **found}

    return Scorer(
        score=score,
        names=("score", *names),
        pad_id=pad_id,
        gate=GATE,
        max_tokens=policy.max_tokens,
        vocab_size=policy.vocab_size,
        sharding=policy.sharding,
        config=policy.config,
        source=policy.source,
        stacked=policy.stacked,
    )


def _gate(leaves: Params, features_ND: Array, temperature: float) -> Array:
    """Return the attributes' weights `[N, K]`."""
    x, layers = features_ND, len(leaves) - 1
    for i in range(layers):
        x = einsum("ni,io->no", x, leaves[str(i)]["kernel"]) + leaves[str(i)]["bias"][None]
        x = jax.nn.relu(x) if i < layers - 1 else x
    return jax.nn.softmax(x / temperature, axis=1) * leaves["scale"][None]
