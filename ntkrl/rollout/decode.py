"""The device's part of sampling: read the prompts, then draw tokens chunk by chunk.

Rows that are still being drawn are `Live`; what was drawn of all rows is `Written`. Live rows may
be fewer than written ones, and their cache grows as they do: both have few sizes, each compiled
once.

On a mesh the rows lie spread over its devices in `parts` equal blocks. Rows leave and are written
block by block, so that no cache moves from one device to another.
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ntkrl import trees
from ntkrl.rollout.draw import Drawn, draw
from ntkrl.rollout.settings import SamplerSettings
from ntkrl.scoring import head_of
from ntkrl.softmax import logits
from ntkrl.types import Array, Cache, Params, Policy, PromptBatch, Rollout


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

    It depends on the prompt's row in its set and on the number of the completion, counted through
    all copies of the prompt: N at a time or all at once are the same draws.
    """

    def of_prompt(row: Array, copy: Array) -> Array:
        own, numbers = jax.random.fold_in(key, row), copy * count + jnp.arange(count)
        return jax.vmap(lambda number: jax.random.fold_in(own, number))(numbers)

    return jax.vmap(of_prompt)(prompts.rows, prompts.copies).reshape(-1)


def prefill(
    policy: Policy,
    settings: SamplerSettings,
    mesh: Mesh | None,
    columns: int,
    params: Params,
    prompts: PromptBatch,
    key: Array,
) -> tuple[Live, Written, Array]:
    """Read each prompt once, give each of its completions a copy of the cache, draw one token.

    Args:
      policy, settings, mesh: as in `Sampler`.
      columns: of the cache, at least those of the prompts.
      params, prompts, key: as in `Sampler.__call__`.

    Returns:
      `(live, written, left)` as `read_on`.
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
    parts = trees.blocks(mesh, rows)
    written = _blank(settings, phi_BD, settings.max_completion_tokens)
    written = _paste(written, strip, live, jnp.int32(0), parts)
    return _spread(live, mesh), trees.spread_rows(written, mesh), _left(live, mesh, parts)


def read_on(
    policy: Policy,
    settings: SamplerSettings,
    mesh: Mesh | None,
    params: Params,
    live: Live,
    written: Written,
    start: Array,
) -> tuple[Live, Written, Array]:
    """Draw up to `chunk_steps` tokens of the live rows, the first as token `start`.

    Args:
      policy, settings, mesh, params: as in `Sampler`.
      live, written: what there is.
      start: tokens drawn so far.

    Returns:
      `(live, written, left)`, `left` `[parts]` the live rows of each block that are not done.
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
    parts = trees.blocks(mesh, written.mask.shape[0])
    written = _paste(written, strip, live, start, parts)
    return live, trees.spread_rows(written, mesh), _left(live, mesh, parts)


def fewer(mesh: Mesh | None, rows: int, parts: int, live: Live) -> Live:
    """Keep `rows` of the live rows, as many of each block, those not done before the others."""
    order = jnp.argsort(live.done.reshape(parts, -1), axis=1, stable=True)[:, : rows // parts]

    def kept(values: Array, axis: int = 0) -> Array:
        def of_block(block: Array, first: Array) -> Array:
            return jnp.take(block, first, axis=axis)

        shape = values.shape
        blocks = values.reshape(*shape[:axis], parts, -1, *shape[axis + 1 :])
        found = jax.vmap(of_block, in_axes=(axis, 0), out_axes=axis)(blocks, order)
        return found.reshape(*shape[:axis], rows, *shape[axis + 1 :])

    cache = live.cache.replace(
        keys=kept(live.cache.keys, 1),
        values=kept(live.cache.values, 1),
        mask=kept(live.cache.mask),
    )
    found = Live(
        cache=cache,
        last=kept(live.last),
        done=kept(live.done),
        keys=kept(live.keys),
        rows=kept(live.rows),
    )
    return _spread(found, mesh)


def longer(mesh: Mesh | None, columns: int, live: Live) -> Live:
    """Give the cache more columns."""
    cache = live.cache
    more = columns - cache.mask.shape[1]
    if cache.keys.shape[3] == cache.mask.shape[1]:  # a policy may keep a state of another form
        wide = ((0, 0), (0, 0), (0, 0), (0, more), (0, 0))
        cache = cache.replace(keys=jnp.pad(cache.keys, wide), values=jnp.pad(cache.values, wide))
    mask = jnp.pad(cache.mask, ((0, 0), (0, more)))
    return _spread(live.replace(cache=cache.replace(mask=mask)), mesh)


def cut(
    settings: SamplerSettings, mesh: Mesh | None, live: Live, written: Written, lengths: Array
) -> tuple[Live, Written, Array]:
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
    parts = trees.blocks(mesh, written.mask.shape[0])
    return _spread(live, mesh), trees.spread_rows(written, mesh), _left(live, mesh, parts)


def longest(mesh: Mesh | None, written: Written) -> Array:
    """Return the length of the longest completion, known to every process."""
    return trees.replicate(jnp.max(jnp.sum(written.mask, axis=1)), mesh)


def rollout(
    mesh: Mesh | None, count: int, length: int, prompts: PromptBatch, written: Written
) -> Rollout:
    """Put prompts and the first `length` columns of what was drawn side by side."""
    written = jax.tree.map(lambda leaf: leaf[:, :length] if leaf.ndim > 1 else leaf, written)
    tokens_BT = jnp.repeat(prompts.tokens, count, axis=0)
    mask_BT = jnp.repeat(prompts.mask, count, axis=0)
    found = Rollout(
        tokens=jnp.concatenate([tokens_BT, written.tokens], axis=1),
        mask=jnp.concatenate([mask_BT, written.mask], axis=1),
        completion_mask=written.mask,
        sampler_log_probs=written.log_probs,
        kept_log_mass=written.kept_log_mass,
        finished=written.finished,
        features=written.features,
    )
    return trees.spread_rows(found, mesh)


def _left(live: Live, mesh: Mesh | None, parts: int) -> Array:
    return trees.replicate(jnp.sum(~live.done.reshape(parts, -1), axis=1), mesh)


def _spread(live: Live, mesh: Mesh | None) -> Live:
    cache = live.cache
    by_row = trees.spread_rows((live.last, live.done, live.keys, live.rows, cache.mask), mesh)
    last, done, keys, rows, mask = by_row
    axes = (None, trees.ROWS, "tensor")
    cache = cache.replace(
        keys=trees.constrain(cache.keys, mesh, *axes),
        values=trees.constrain(cache.values, mesh, *axes),
        mask=mask,
    )
    return Live(cache=cache, last=last, done=done, keys=keys, rows=rows)


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


def _paste(written: Written, strip: Written, live: Live, start: Array, parts: int) -> Written:
    """Write a strip's columns at `start`, in the rows they belong to."""
    columns_1C = start + jnp.arange(strip.mask.shape[1])[None]
    # of each block, whose rows stay in it
    rows = live.rows.reshape(parts, -1) % (written.mask.shape[0] // parts)

    def blocks(values: Array) -> Array:
        return values.reshape(parts, -1, *values.shape[1:])

    def put(held: Array, values: Array) -> Array:
        def of_block(held: Array, values: Array, rows: Array) -> Array:
            return held.at[rows[:, None], columns_1C].set(values, mode="drop")

        found = jax.vmap(of_block)(blocks(held), blocks(values), rows)
        return found.reshape(held.shape)

    features = written.features
    return Written(
        tokens=put(written.tokens, strip.tokens),
        log_probs=put(written.log_probs, strip.log_probs),
        kept_log_mass=put(written.kept_log_mass, strip.kept_log_mass),
        mask=put(written.mask, strip.mask),
        finished=written.finished.at[live.rows].set(live.done),
        features=None if features is None else put(features, strip.features),
    )
