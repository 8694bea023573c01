"""The device's part of sampling: read the prompts, then draw tokens chunk by chunk.

Rows that are still being drawn are `Live`; what was drawn of all rows is `Written`. Live rows may
be fewer than written ones, and their cache grows as they do: both have few sizes, each compiled
once.
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

from ntkrl.rollout.draw import Drawn, draw
from ntkrl.rollout.settings import SamplerSettings
from ntkrl.scoring import head_of
from ntkrl.types import Array, Cache, Params, Policy, PromptBatch
from ntkrl.vocabulary import logits


@chex.dataclass(frozen=True)
class Live:
    """Rows that are being drawn, R of them.

    cache: what they have read. last: `[R]` the token drawn last, not yet read. done: `[R]` bool.
    keys: `[R]` one per row for all its tokens. rows: `[R]` int32 their place in Written.
    """

    cache: Cache
    last: Array
    done: Array
    keys: Array
    rows: Array


@chex.dataclass(frozen=True)
class Written:
    """What was drawn: `[B, C]`, but `finished` `[B]` and `features` `[B, C, D]` or None."""

    tokens: Array
    log_probs: Array
    kept_log_mass: Array
    mask: Array
    finished: Array
    features: Array | None


def request_keys(key: Array, prompts: PromptBatch, count: int) -> Array:
    """Return a key per completion `[P · N]`, whatever else is in the batch.

    It depends on the prompt's row in its set, on how often that row stands earlier in the batch,
    and on the number of the completion.
    """

    def of_prompt(row: Array, copy: Array) -> Array:
        own = jax.random.fold_in(jax.random.fold_in(key, row), copy)
        return jax.vmap(lambda number: jax.random.fold_in(own, number))(jnp.arange(count))

    return jax.vmap(of_prompt)(prompts.rows, prompts.copies).reshape(-1)


def prefill(
    policy: Policy,
    settings: SamplerSettings,
    columns: int,
    params: Params,
    prompts: PromptBatch,
    key: Array,
) -> tuple[Live, Written]:
    """Read each prompt once, give each of its completions a copy of the cache, draw one token.

    Args:
      policy, settings: as in `Sampler`.
      columns: of the cache, at least those of the prompts.
      params, prompts, key: as in `Sampler.__call__`.
    """
    count = settings.completions_per_prompt
    cache = policy.init_cache(prompts.tokens.shape[0], columns, settings.cache_dtype)
    features_PTD, cache = policy.decode(params, cache, prompts.tokens, prompts.mask)
    cache = cache.replace(
        keys=jnp.repeat(cache.keys, count, axis=1),
        values=jnp.repeat(cache.values, count, axis=1),
        mask=jnp.repeat(cache.mask, count, axis=0),
    )
    phi_BD = jnp.repeat(features_PTD[:, -1], count, axis=0)
    keys_B = request_keys(key, prompts, count)
    rows = phi_BD.shape[0]
    live = Live(
        cache=cache,
        last=jnp.zeros(rows, jnp.int32),
        done=jnp.zeros(rows, bool),
        keys=keys_B,
        rows=jnp.arange(rows, dtype=jnp.int32),
    )
    strip = _blank(settings, phi_BD, 1)
    live, strip = _draw(policy, settings, params, live, strip, phi_BD, jnp.int32(0), jnp.int32(0))
    written = _blank(settings, phi_BD, settings.max_completion_tokens)
    return live, _paste(written, strip, live, jnp.int32(0))


def read_on(
    policy: Policy,
    settings: SamplerSettings,
    params: Params,
    live: Live,
    written: Written,
    start: Array,
) -> tuple[Live, Written, Array]:
    """Draw up to `chunk_steps` tokens of the live rows, the first as token `start`.

    Args:
      policy, settings, params: as in `Sampler`.
      live, written: what there is.
      start: tokens drawn so far.

    Returns:
      `(live, written, left)`, `left` the number of live rows that are not done.
    """
    end = jnp.minimum(start + settings.chunk_steps, settings.max_completion_tokens)

    def step(carry: tuple[Array, Live, Written]) -> tuple[Array, Live, Written]:
        t, live, strip = carry
        real_R1 = ~live.done[:, None]
        phi_R1D, cache = policy.decode(params, live.cache, live.last[:, None], real_R1)
        live = live.replace(cache=cache)
        drawn = _draw(policy, settings, params, live, strip, phi_R1D[:, 0], t, t - start)
        return t + 1, *drawn

    def unfinished(carry: tuple[Array, Live, Written]) -> Array:
        return (carry[0] < end) & ~jnp.all(carry[1].done)

    # only shape and dtype of features count for the blank
    like = jnp.zeros((live.rows.shape[0], policy.feature_size), _feature_dtype(written))
    strip = _blank(settings, like, settings.chunk_steps)
    _, live, strip = jax.lax.while_loop(unfinished, step, (start, live, strip))
    return live, _paste(written, strip, live, start), jnp.sum(~live.done)


def fewer(rows: int, live: Live) -> Live:
    """Keep `rows` of the live rows, those not done before the others."""
    first = jnp.argsort(live.done, stable=True)[:rows]
    cache = live.cache.replace(
        keys=live.cache.keys[:, first],
        values=live.cache.values[:, first],
        mask=live.cache.mask[first],
    )
    return Live(
        cache=cache,
        last=live.last[first],
        done=live.done[first],
        keys=live.keys[first],
        rows=live.rows[first],
    )


def longer(columns: int, live: Live) -> Live:
    """Give the cache more columns."""
    cache = live.cache
    more = columns - cache.mask.shape[1]
    if cache.keys.shape[3] == cache.mask.shape[1]:  # a policy may keep a state of another form
        wide = ((0, 0), (0, 0), (0, 0), (0, more), (0, 0))
        cache = cache.replace(keys=jnp.pad(cache.keys, wide), values=jnp.pad(cache.values, wide))
    return live.replace(cache=cache.replace(mask=jnp.pad(cache.mask, ((0, 0), (0, more)))))


def cut(settings: SamplerSettings, live: Live, written: Written, lengths: Array) -> Any:
    """End rows after `lengths` `[B]` tokens; more than they have leaves them alone.

    Returns:
      `(live, written, left)` as `read_on`.
    """
    ended_B = lengths <= jnp.sum(written.mask, axis=1)
    columns_1C = jnp.arange(written.mask.shape[1])[None]
    kept_BC = written.mask & (columns_1C < lengths[:, None])
    written = written.replace(
        tokens=jnp.where(kept_BC, written.tokens, settings.pad_id),
        log_probs=jnp.where(kept_BC, written.log_probs, 0.0),
        kept_log_mass=jnp.where(kept_BC, written.kept_log_mass, 0.0),
        mask=kept_BC,
        finished=written.finished | ended_B,
    )
    live = live.replace(done=live.done | ended_B[live.rows])
    return live, written, jnp.sum(~live.done)


def _draw(
    policy: Policy,
    settings: SamplerSettings,
    params: Params,
    live: Live,
    strip: Written,
    phi_RD: Array,
    t: Array,
    column: Array,
) -> tuple[Live, Written]:
    """Draw token t of every live row, and write it in a column of the strip."""
    keys_R = jax.vmap(jax.random.fold_in, in_axes=(0, None))(live.keys, t)
    found: Drawn = draw(settings, logits(head_of(policy, params), phi_RD), keys_R)
    real_R = ~live.done
    tokens_R = jnp.where(real_R, found.tokens, settings.pad_id)

    def put(held: Array, values: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(
            held, values[:, None].astype(held.dtype), column, axis=1
        )

    # pad may equal the end token: a row that is done stays done either way
    done_R = live.done | (tokens_R == settings.eos_id)
    strip = Written(
        tokens=put(strip.tokens, tokens_R),
        log_probs=put(strip.log_probs, jnp.where(real_R, found.log_probs, 0.0)),
        kept_log_mass=put(strip.kept_log_mass, jnp.where(real_R, found.kept_log_mass, 0.0)),
        mask=put(strip.mask, real_R),
        finished=done_R,
        features=None
        if strip.features is None
        else put(strip.features, jnp.where(real_R[:, None], phi_RD, 0)),
    )
    return live.replace(last=tokens_R, done=done_R), strip


def _blank(settings: SamplerSettings, phi_RD: Array, columns: int) -> Written:
    shape = (phi_RD.shape[0], columns)
    zeros = jnp.zeros(shape, jnp.promote_types(phi_RD.dtype, jnp.float32))
    features = None
    if settings.keep_features:
        features = jnp.zeros((*shape, phi_RD.shape[1]), phi_RD.dtype)
    return Written(
        tokens=jnp.full(shape, settings.pad_id, jnp.int32),
        log_probs=zeros,
        kept_log_mass=zeros,
        mask=jnp.zeros(shape, bool),
        finished=jnp.zeros(shape[0], bool),
        features=features,
    )


def _feature_dtype(written: Written) -> Any:
    return written.log_probs.dtype if written.features is None else written.features.dtype


def _paste(written: Written, strip: Written, live: Live, start: Array) -> Written:
    """Write a strip's columns at `start`, in the rows they belong to."""
    columns_1C = start + jnp.arange(strip.mask.shape[1])[None]
    at = (live.rows[:, None], columns_1C)

    def put(held: Array, values: Array) -> Array:
        return held.at[at].set(values, mode="drop")

    features = written.features
    return Written(
        tokens=put(written.tokens, strip.tokens),
        log_probs=put(written.log_probs, strip.log_probs),
        kept_log_mass=put(written.kept_log_mass, strip.kept_log_mass),
        mask=put(written.mask, strip.mask),
        finished=written.finished.at[live.rows].set(live.done),
        features=None if features is None else put(features, strip.features),
    )
