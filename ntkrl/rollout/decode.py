"""Device programs of the sampler: prefill, decode loop, compaction, cache growth, truncation.

`ActiveRows` are the completions still being decoded, with their KV cache; `Output` holds what was
sampled for all B completions. Compaction shrinks the first without touching the second, and the
cache grows with the completions: both take few sizes, each compiled once.

On a mesh, rows are sharded in equal blocks (`trees.blocks`). Compaction and writes stay within a
block, so that no cache moves between devices.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ntkrl import trees
from ntkrl.rollout.settings import SamplerSettings
from ntkrl.rollout.token_sampling import sample_tokens
from ntkrl.scoring import head_of
from ntkrl.softmax import logits
from ntkrl.types import Array, Cache, Params, Policy, PromptBatch, Rollout


@chex.dataclass(frozen=True)
class ActiveRows:
    """Completions being decoded, R of them.

    cache: keys and values of the tokens read. last: `[R]` the token sampled last, not yet read.
    done: `[R]` bool. keys: `[R]` one PRNG key per completion. rows: `[R]` int32 rows in Output.
    """

    cache: Cache
    last: Array
    done: Array
    keys: Array
    rows: Array


@chex.dataclass(frozen=True)
class Columns:
    """Sampled tokens and their records, `[B, C]`; features `[B, C, D]`, or None."""

    tokens: Array
    log_probs: Array
    kept_log_mass: Array
    mask: Array
    features: Array | None


@chex.dataclass(frozen=True)
class Output:
    """All completions: their columns, and finished `[B]` bool."""

    columns: Columns
    finished: Array


def completion_keys(key: Array, prompts: PromptBatch, count: int) -> Array:
    """Return one key per completion `[P · N]`, independent of the rest of the batch.

    It depends on the prompt's row in its set and on the number of the completion, counted through
    all copies of the prompt: N at a time or all at once are the same draws.
    """

    def of_prompt(row: Array, copy: Array) -> Array:
        prompt_key, numbers = jax.random.fold_in(key, row), copy * count + jnp.arange(count)
        return jax.vmap(lambda number: jax.random.fold_in(prompt_key, number))(numbers)

    return jax.vmap(of_prompt)(prompts.rows, prompts.copies).reshape(-1)


@dataclasses.dataclass(frozen=True, eq=False)
class Decoder:
    """The functions that `Sampler` jits; each returns rows sharded over the mesh.

    policy, settings, mesh, results_mesh: as in `Sampler`.
    """

    policy: Policy
    settings: SamplerSettings
    mesh: Mesh | None
    results_mesh: Mesh | None

    def prefill(
        self, columns: int, copy: Params, prompts: PromptBatch, key: Array
    ) -> tuple[ActiveRows, Output, Array]:
        """Read each prompt once, copy its cache to its N completions, sample the first token.

        Args:
          columns: cache columns, at least those of the prompts.
          copy: the rollout copy of the params (`Policy.decode_params`).
          prompts, key: as in `Sampler.__call__`.

        Returns:
          `(active, output, remaining)` as `decode_chunk`.
        """
        count = self.settings.completions_per_prompt
        cache = self.policy.init_cache(prompts.tokens.shape[0], columns, self.settings.cache_dtype)
        features_PTD, cache = self.policy.decode(copy, cache, prompts.tokens, prompts.mask)
        cache = _map_rows(lambda values: jnp.repeat(values, count, axis=0), cache)
        phi_BD = jnp.repeat(features_PTD[:, -1], count, axis=0)
        rows = phi_BD.shape[0]
        active = ActiveRows(
            cache=cache,
            last=jnp.zeros(rows, jnp.int32),
            done=jnp.zeros(rows, bool),
            keys=completion_keys(key, prompts, count),
            rows=jnp.arange(rows, dtype=jnp.int32),
        )
        chunk, first = self._empty(rows, 1, phi_BD.dtype), jnp.int32(0)
        active, chunk = self._sample(copy, active, chunk, phi_BD, first, first)
        columns_BC = self._empty(rows, self.settings.max_completion_tokens, phi_BD.dtype)
        output = Output(columns=columns_BC, finished=active.done)
        output = self._write(output, chunk, active, first)
        return self._results(self._sharded(active), output)

    def decode_chunk(
        self, copy: Params, active: ActiveRows, output: Output, start: Array
    ) -> tuple[ActiveRows, Output, Array]:
        """Sample up to `chunk_steps` tokens of the active rows.

        Args:
          copy: the rollout copy of the params.
          active, output: state so far.
          start: tokens sampled so far.

        Returns:
          `(active, output, remaining)`; remaining `[blocks]` counts the rows of each block that are
          not done.
        """
        end = jnp.minimum(start + self.settings.chunk_steps, self.settings.max_completion_tokens)

        def step(carry: tuple[Array, ActiveRows, Columns]) -> tuple[Array, ActiveRows, Columns]:
            t, active, chunk = carry
            real_R1 = ~active.done[:, None]
            last_R1 = active.last[:, None]
            phi_R1D, cache = self.policy.decode(copy, active.cache, last_R1, real_R1)
            active = replace(active, cache=cache)
            return t + 1, *self._sample(copy, active, chunk, phi_R1D[:, 0], t, t - start)

        def unfinished(carry: tuple[Array, ActiveRows, Columns]) -> Array:
            return (carry[0] < end) & ~jnp.all(carry[1].done)

        written = output.columns
        features = written.log_probs if written.features is None else written.features
        chunk = self._empty(len(active.rows), self.settings.chunk_steps, features.dtype)
        _, active, chunk = jax.lax.while_loop(unfinished, step, (start, active, chunk))
        output = self._write(output, chunk, active, start)
        return self._results(active, output)

    def compact(self, rows: int, blocks: int, active: ActiveRows) -> ActiveRows:
        """Keep `rows` of the active rows, equally many per block, unfinished ones first."""
        done = active.done.reshape(blocks, -1)
        order = jnp.argsort(done, axis=1, stable=True)[:, : rows // blocks]

        def select(values: Array) -> Array:
            blocked = values.reshape(blocks, -1, *values.shape[1:])
            selected = jax.vmap(lambda block, places: block[places])(blocked, order)
            return selected.reshape(rows, *values.shape[1:])

        return self._sharded(
            ActiveRows(
                cache=_map_rows(select, active.cache),
                last=select(active.last),
                done=select(active.done),
                keys=select(active.keys),
                rows=select(active.rows),
            )
        )

    def grow_cache(self, columns: int, active: ActiveRows) -> ActiveRows:
        """Pad the cache to `columns` columns."""
        cache = active.cache
        more = columns - cache.mask.shape[1]

        def grown(table: Array) -> Array:
            # a policy's state may have another form
            same = table.shape[2] == cache.mask.shape[1]
            return jnp.pad(table, ((0, 0), (0, 0), (0, more), (0, 0))) if same else table

        cache = replace(
            cache,
            keys=jax.tree.map(grown, cache.keys),
            values=jax.tree.map(grown, cache.values),
            mask=jnp.pad(cache.mask, ((0, 0), (0, more))),
        )
        return self._sharded(replace(active, cache=cache))

    def truncate(
        self, active: ActiveRows, output: Output, lengths: Array
    ) -> tuple[ActiveRows, Output, Array]:
        """End completions after `lengths` `[B]` tokens; longer lengths leave them unchanged.

        Returns:
          `(active, output, remaining)` as `decode_chunk`.
        """
        written = output.columns
        ended_B = lengths <= jnp.sum(written.mask, axis=1)
        columns_1C = jnp.arange(written.mask.shape[1])[None]
        mask_BC = written.mask & (columns_1C < lengths[:, None])
        written = replace(
            written,
            tokens=jnp.where(mask_BC, written.tokens, self.settings.pad_id),
            log_probs=jnp.where(mask_BC, written.log_probs, 0.0),
            kept_log_mass=jnp.where(mask_BC, written.kept_log_mass, 0.0),
            mask=mask_BC,
        )
        output = Output(columns=written, finished=output.finished | ended_B)
        active = replace(active, done=active.done | ended_B[active.rows])
        return self._results(self._sharded(active), output)

    def longest(self, output: Output) -> Array:
        """Return the length of the longest completion, replicated."""
        return trees.replicate(jnp.max(jnp.sum(output.columns.mask, axis=1)), self.mesh)

    def rollout(self, length: int, prompts: PromptBatch, output: Output) -> Rollout:
        """Concatenate the prompts with the first `length` columns of the output."""
        count = self.settings.completions_per_prompt
        written = jax.tree.map(lambda leaf: leaf[:, :length], output.columns)
        tokens_BT = jnp.repeat(prompts.tokens, count, axis=0)
        mask_BT = jnp.repeat(prompts.mask, count, axis=0)
        result = Rollout(
            tokens=jnp.concatenate([tokens_BT, written.tokens], axis=1),
            mask=jnp.concatenate([mask_BT, written.mask], axis=1),
            completion_mask=written.mask,
            sampler_log_probs=written.log_probs,
            kept_log_mass=written.kept_log_mass,
            finished=output.finished,
            features=written.features,
        )
        return trees.spread_rows(result, self.results_mesh)

    def _sample(
        self,
        copy: Params,
        active: ActiveRows,
        chunk: Columns,
        phi_RD: Array,
        t: Array,
        column: Array,
    ) -> tuple[ActiveRows, Columns]:
        """Sample token t of every active row from its features into a column of the chunk."""
        keys_R = jax.vmap(jax.random.fold_in, in_axes=(0, None))(active.keys, t)
        drawn = sample_tokens(self.settings, logits(head_of(self.policy, copy), phi_RD), keys_R)
        real_R = ~active.done
        tokens_R = jnp.where(real_R, drawn.tokens, self.settings.pad_id)
        # pad_id may be one of end_ids: a row that is done stays done either way
        done_R = active.done
        for end_id in self.settings.end_ids:
            done_R |= tokens_R == end_id
        sampled = Columns(
            tokens=tokens_R,
            log_probs=jnp.where(real_R, drawn.log_probs, 0.0),
            kept_log_mass=jnp.where(real_R, drawn.kept_log_mass, 0.0),
            mask=real_R,
            features=None if chunk.features is None else jnp.where(real_R[:, None], phi_RD, 0),
        )

        def set_column(table: Array, values: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(
                table, values[:, None].astype(table.dtype), column, axis=1
            )

        chunk = jax.tree.map(set_column, chunk, sampled)
        return replace(active, last=tokens_R, done=done_R), chunk

    def _empty(self, rows: int, columns: int, dtype: Any) -> Columns:
        """Return columns without tokens; `dtype` is that of features."""
        shape = (rows, columns)
        zeros = jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32))
        keep = self.settings.keep_features
        return Columns(
            tokens=jnp.full(shape, self.settings.pad_id, jnp.int32),
            log_probs=zeros,
            kept_log_mass=zeros,
            mask=jnp.zeros(shape, bool),
            features=jnp.zeros((*shape, self.policy.feature_size), dtype) if keep else None,
        )

    def _write(self, output: Output, chunk: Columns, active: ActiveRows, start: Array) -> Output:
        """Write a chunk's columns at `start` into the rows of the output, block by block."""
        total = len(output.finished)
        blocks = trees.blocks(self.mesh, total)
        columns_1C = start + jnp.arange(chunk.mask.shape[1])[None]
        rows = active.rows.reshape(blocks, -1) % (total // blocks)

        def of_block(table: Array, values: Array, rows: Array) -> Array:
            return table.at[rows[:, None], columns_1C].set(values, mode="drop")

        def write(table: Array, values: Array) -> Array:
            shape = table.shape
            table, values = (x.reshape(blocks, -1, *x.shape[1:]) for x in (table, values))
            return jax.vmap(of_block)(table, values, rows).reshape(shape)

        return Output(
            columns=jax.tree.map(write, output.columns, chunk),
            finished=output.finished.at[active.rows].set(active.done),
        )

    def _results(self, active: ActiveRows, output: Output) -> tuple[ActiveRows, Output, Array]:
        """Return the state, and the number of unfinished rows per block, replicated."""
        blocks = trees.blocks(self.mesh, len(output.finished))
        remaining = jnp.sum(~active.done.reshape(blocks, -1), axis=1)
        output = trees.spread_rows(output, self.mesh)
        return active, output, trees.replicate(remaining, self.mesh)

    def _sharded(self, active: ActiveRows) -> ActiveRows:
        cache = active.cache

        def sharded(table: Array) -> Array:
            return trees.constrain(table, self.mesh, trees.ROWS, "tensor")

        by_row = (active.last, active.done, active.keys, active.rows, cache.mask)
        last, done, keys, rows, mask = trees.spread_rows(by_row, self.mesh)
        cache = replace(
            cache,
            keys=jax.tree.map(sharded, cache.keys),
            values=jax.tree.map(sharded, cache.values),
            mask=mask,
        )
        return ActiveRows(cache=cache, last=last, done=done, keys=keys, rows=rows)


def _map_rows(function: Callable[[Array], Array], cache: Cache) -> Cache:
    """Apply a function of arrays with leading rows to all arrays of a cache."""
    keys, values, mask = jax.tree.map(function, (cache.keys, cache.values, cache.mask))
    return replace(cache, keys=keys, values=values, mask=mask)
