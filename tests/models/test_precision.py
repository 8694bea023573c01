"""Full float32 precision in every matrix product, whatever a chip's default is."""

import jax
import jax.numpy as jnp
import pytest

from ntkrl import models, rollout, scoring
from ntkrl.rollout.decode import Decoder
from ntkrl.types import PromptBatch

NEOX = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
NEOX |= {"intermediate_size": 32, "max_position_embeddings": 32, "rotary_pct": 0.5}
LLAMA = {**NEOX, "num_key_value_heads": 1, "tie_word_embeddings": True}
LLAMA.pop("rotary_pct")


def products(function, *arguments):
    """Return the matrix products of a program before compilation."""
    text = jax.jit(function).lower(*arguments).as_text()
    result = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert result
    return result


@pytest.mark.parametrize(
    ("architecture", "config"), [("GPTNeoXForCausalLM", NEOX), ("LlamaForCausalLM", LLAMA)]
)
def test_reading_and_drawing(architecture, config):
    """law: products of scoring, its gradients and decoding request the highest precision."""
    policy, shapes = models.describe(architecture, config)
    tokens = jax.ShapeDtypeStruct((2, 9), jnp.int32)

    def read(params, tokens):
        return scoring.score(policy, params, tokens, tokens > 0, 4).log_probs.sum()

    def logits(params, tokens):
        return policy.head(params, policy.features(params, tokens, tokens > 0))

    def draw(params, tokens):
        settings = rollout.SamplerSettings(2, 4, 1.0, end_ids=(0,), pad_id=1)
        rows = jnp.arange(2)
        batch = PromptBatch(tokens=tokens, mask=tokens > 0, rows=rows, copies=rows)
        key = jax.random.key(0)
        copy = policy.decode_params(params)
        return Decoder(policy, settings, None, None, 4).prefill(12, copy, batch, key)[2]

    for function in (jax.grad(read), logits, draw):
        for line in products(function, shapes, tokens):
            assert "precision = [HIGHEST, HIGHEST]" in line, line
