"""Small helpers that tests share: a toy policy, tiny GPT-NeoX configs, torch checkpoints."""

from pathlib import Path

import jax
import jax.numpy as jnp

from ntkrl.types import Cache, Policy

TINY = {
    "vocab_size": 23,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "rotary_pct": 0.5,
    "initializer_range": 0.3,
}


def toy_policy(vocab: int = 7, width: int = 5) -> Policy:
    """A policy of ten lines: features are a decayed running sum of embeddings through a tanh.

    Its cache keeps the running sum in `keys[0][:, 0, 0]`, so decode = features by construction
    of the recurrence h_t = ½ h_{t−1} + e_t and nothing else.
    """

    def run(params, state, tokens, mask):
        def step(state, column):
            token, real = column
            moved = 0.5 * state + params["embed"][token]
            state = jnp.where(real[:, None], moved, state)
            return state, jnp.tanh(state @ params["mix"])

        state, out = jax.lax.scan(step, state, (tokens.T, mask.T))
        return state, jnp.swapaxes(out, 0, 1)

    def features(params, tokens, mask=None):
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        start = jnp.zeros((tokens.shape[0], width), params["embed"].dtype)
        return run(params, start, tokens, mask)[1]

    def init_cache(batch_size, length, dtype=None):
        empty = (jnp.zeros((batch_size, 1, 1, width), dtype),)
        return Cache(
            keys=empty,
            values=empty,
            mask=jnp.zeros((batch_size, length), bool),
            length=jnp.zeros((), jnp.int32),
        )

    def decode(params, cache, tokens, mask):
        state, out = run(params, cache.keys[0][:, 0, 0], tokens, mask)
        return out, cache.replace(
            keys=(state[:, None, None],), length=cache.length + tokens.shape[1]
        )

    return Policy(
        features=features,
        head=lambda params, phi: jnp.einsum("...d,vd->...v", phi, params["head"]),
        init_cache=init_cache,
        decode=decode,
        head_weight="head",
        tied=False,
        vocab_size=vocab,
        feature_size=width,
        max_tokens=64,
    )


def toy_params(policy: Policy, seed: int = 0, dtype=jnp.float32):
    """Random params of a toy policy."""
    keys = jax.random.split(jax.random.key(seed), 3)
    vocab, width = policy.vocab_size, policy.feature_size
    return {
        "embed": jax.random.normal(keys[0], (vocab, width), dtype),
        "mix": jax.random.normal(keys[1], (width, width), dtype) / width**0.5,
        "head": jax.random.normal(keys[2], (vocab, width), dtype),
    }


def torch_neox(directory: Path | str | None = None, seed: int = 0, dtype=None, **overrides):
    """Build transformers' GPT-NeoX with random weights; save it if a directory is passed."""
    import torch
    import transformers

    settings = {**TINY, **overrides}
    pct = settings.pop("rotary_pct")
    torch.manual_seed(seed)
    config = transformers.GPTNeoXConfig(
        **settings,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": settings.pop("rotary_emb_base", 10000.0),
            "partial_rotary_factor": pct,
        },
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPTNeoXForCausalLM(config).eval()
    with torch.no_grad():  # biases and norms start at 0 and 1, which would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if dtype is not None:
        model = model.to(dtype)
    if directory is not None:
        model.save_pretrained(directory)
    return model
