"""Sample a group of completions per prompt: one prefill a prompt, then one token at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ntkrl.numerics import at_least_float32
from ntkrl.types import Array, Cache, Params, Policy, PromptBatch, Rollout


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    """How completions are drawn.

    completions_per_prompt: N ≥ 1.
    max_completion_tokens: C ≥ 1; a completion that reaches it is cut.
    temperature: divides the logits; > 0.
    eos_id: token that ends a completion; it is part of the completion.
    pad_id: token written after the end.
    """

    completions_per_prompt: int
    max_completion_tokens: int
    temperature: float
    eos_id: int
    pad_id: int

    def __post_init__(self):
        problems = []
        if self.completions_per_prompt < 1:
            problems.append(
                f"completions_per_prompt must be ≥ 1, not {self.completions_per_prompt}"
            )
        if self.max_completion_tokens < 1:
            problems.append(f"max_completion_tokens must be ≥ 1, not {self.max_completion_tokens}")
        if not self.temperature > 0:
            problems.append(
                f"temperature must be > 0, not {self.temperature}: a greedy sampler gives a group "
                "of equal completions and log-probs that are not those of the policy"
            )
        if problems:
            raise ValueError("rollout settings: " + "; ".join(problems) + ".")


class _Drawn(NamedTuple):
    """What is written while sampling; all `[B, C]` but `done` `[B]`."""

    tokens: Array
    log_probs: Array
    mask: Array
    done: Array


def make_sampler(
    policy: Policy, settings: SamplerSettings
) -> Callable[[Params, PromptBatch, Array], Rollout]:
    """Return `sample(params, prompts, key) -> Rollout`, to be jitted by the caller.

    Each row draws from a key of its own, so what a prompt gets does not depend on how long the
    other rows run. The loop ends as soon as every row is done.

    Args:
      policy: the network's functions.
      settings: SamplerSettings.

    Raises:
      ValueError: (at the call, before tracing) prompts and completions exceed the context.
    """
    count, budget = settings.completions_per_prompt, settings.max_completion_tokens

    def sample(params: Params, prompts: PromptBatch, key: Array) -> Rollout:
        _check_length(policy, prompts.tokens.shape[1], budget)
        cache, features_BD = _prefill(policy, params, prompts, budget, count)
        keys_B = jax.random.split(key, features_BD.shape[0])

        def read_and_draw(carry):
            t, cache, drawn = carry
            last_B1, real_B1 = drawn.tokens[:, t - 1][:, None], drawn.mask[:, t - 1][:, None]
            features_B1D, cache = policy.decode(params, cache, last_B1, real_B1)
            logits_BV = policy.head(params, features_B1D[:, 0])
            return t + 1, cache, _draw(settings, drawn, logits_BV, keys_B, t)

        def unfinished(carry):
            t, _, drawn = carry
            return (t < budget) & ~jnp.all(drawn.done)

        nothing = _nothing_drawn(settings, features_BD)
        logits_BV = policy.head(params, features_BD)
        first = _draw(settings, nothing, logits_BV, keys_B, jnp.int32(0))
        _, _, drawn = jax.lax.while_loop(unfinished, read_and_draw, (jnp.int32(1), cache, first))
        prompt_tokens_BT = jnp.repeat(prompts.tokens, count, axis=0)
        prompt_mask_BT = jnp.repeat(prompts.mask, count, axis=0)
        return Rollout(
            tokens=jnp.concatenate([prompt_tokens_BT, drawn.tokens], axis=1),
            mask=jnp.concatenate([prompt_mask_BT, drawn.mask], axis=1),
            completion_mask=drawn.mask,
            sampler_log_probs=drawn.log_probs,
            finished=drawn.done,
        )

    return sample


def _check_length(policy: Policy, prompt_length: int, budget: int) -> None:
    if prompt_length + budget > policy.max_tokens:
        raise ValueError(
            f"prompts of {prompt_length} tokens and completions of {budget} exceed the model's "
            f"context of {policy.max_tokens}; lower data.max_prompt_tokens or "
            "rollout.max_completion_tokens."
        )


def _nothing_drawn(settings: SamplerSettings, features_BD: Array) -> _Drawn:
    shape = (features_BD.shape[0], settings.max_completion_tokens)
    return _Drawn(
        tokens=jnp.full(shape, settings.pad_id, jnp.int32),
        log_probs=jnp.zeros(shape, at_least_float32(features_BD).dtype),
        mask=jnp.zeros(shape, bool),
        done=jnp.zeros(shape[0], bool),
    )


def _draw(
    settings: SamplerSettings, drawn: _Drawn, logits_BV: Array, keys_B: Array, t: Array
) -> _Drawn:
    """Draw token t of every row that is not done, and write it down."""
    log_probs_BV = jax.nn.log_softmax(at_least_float32(logits_BV) / settings.temperature, axis=-1)
    step_keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, t)
    tokens_B = jax.vmap(jax.random.categorical)(step_keys_B, log_probs_BV).astype(jnp.int32)
    chosen_B = jnp.take_along_axis(log_probs_BV, tokens_B[:, None], axis=-1)[:, 0]
    tokens_B = jnp.where(drawn.done, settings.pad_id, tokens_B)
    return _Drawn(
        tokens=drawn.tokens.at[:, t].set(tokens_B),
        log_probs=drawn.log_probs.at[:, t].set(jnp.where(drawn.done, 0.0, chosen_B)),
        mask=drawn.mask.at[:, t].set(~drawn.done),
        # pad may equal the end token: a row that is done stays done either way
        done=drawn.done | (tokens_B == settings.eos_id),
    )


def _prefill(
    policy: Policy, params: Params, prompts: PromptBatch, budget: int, count: int
) -> tuple[Cache, Array]:
    """Read each prompt once; give every completion of a group its copy of the cache."""
    rows, length = prompts.tokens.shape
    # the last token is drawn and never read, so the cache holds one column less
    cache = policy.init_cache(rows, length + budget - 1)
    features_PTD, cache = policy.decode(params, cache, prompts.tokens, prompts.mask)
    cache = cache.replace(
        keys=jnp.repeat(cache.keys, count, axis=1),
        values=jnp.repeat(cache.values, count, axis=1),
        mask=jnp.repeat(cache.mask, count, axis=0),
    )
    return cache, jnp.repeat(features_PTD[:, -1], count, axis=0)
