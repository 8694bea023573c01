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

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ntkrl import trees
from ntkrl.rollout.settings import SamplerSettings
from ntkrl.rollout.token_sampling import draw_uniforms, sample_tokens
from ntkrl.scoring import head_of
from ntkrl.softmax import logits
from ntkrl.types import Array, Cache, Params, Policy, PromptBatch, Rollout

Draw = tuple[Array, Array | None]
"""The number of a token in its completion, and its uniform numbers `[R, 2]` (None if greedy)."""


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
    """Sampled tokens and their records, `[B, C]`; of a chunk, `[C, R]`; of a token, `[R]`.

    kept_log_mass: None without truncation. features: with D in the end, or None.
    """

    tokens: Array
    log_probs: Array
    kept_log_mass: Array | None
    mask: Array
    features: Array | None
    entropy: Array


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

    policy, settings, mesh, results_mesh: as in `Sampler`. chunk_length: decode steps per chunk.
    """

    policy: Policy
    settings: SamplerSettings
    mesh: Mesh | None
    results_mesh: Mesh | None
    chunk_length: int

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
        first = jnp.arange(1)
        draw = jax.tree.map(lambda values: values[0], (first, self._uniforms(active, first)))
        active, columns_R = self._sample(copy, active, phi_BD, draw)
        output = Output(columns=self._empty(columns_R), finished=active.done)
        chunk_1R = jax.tree.map(lambda values: values[None], columns_R)
        return self._results(self._sharded(active), self._write(output, chunk_1R, active, first))

    def decode_chunk(
        self, copy: Params, active: ActiveRows, output: Output, start: Array
    ) -> tuple[ActiveRows, Output, Array]:
        """Sample `chunk_length` tokens of every active row; what is past an end is not recorded.

        The number of steps is known to the compiler: an accelerator then never waits for the host
        to read whether to go on.

        Args:
          copy: the rollout copy of the params.
          active, output: state so far.
          start: tokens sampled so far.

        Returns:
          `(active, output, remaining)`; remaining `[blocks]` counts the rows of each block that are
          not done.
        """

        def step(active: ActiveRows, draw: Draw) -> tuple[ActiveRows, Columns]:
            real_R1, last_R1 = ~active.done[:, None], active.last[:, None]
            phi_R1D, cache = self.policy.decode(copy, active.cache, last_R1, real_R1)
            return self._sample(copy, replace(active, cache=cache), phi_R1D[:, 0], draw)

        numbers_C = start + jnp.arange(self.chunk_length)
        draws = (numbers_C, self._uniforms(active, numbers_C))
        active, chunk_CR = jax.lax.scan(step, active, draws)
        return self._results(active, self._write(output, chunk_CR, active, numbers_C))

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
            kept_log_mass=_zeroed(written.kept_log_mass, mask_BC),
            mask=mask_BC,
            entropy=jnp.where(mask_BC, written.entropy, 0.0),
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
        kept = written.kept_log_mass
        tokens_BT = jnp.repeat(prompts.tokens, count, axis=0)
        mask_BT = jnp.repeat(prompts.mask, count, axis=0)
        result = Rollout(
            tokens=jnp.concatenate([tokens_BT, written.tokens], axis=1),
            mask=jnp.concatenate([mask_BT, written.mask], axis=1),
            completion_mask=written.mask,
            sampler_log_probs=written.log_probs,
            kept_log_mass=jnp.zeros_like(written.log_probs) if kept is None else kept,
            finished=output.finished,
            features=written.features,
            entropy=written.entropy,
        )
        return trees.spread_rows(result, self.results_mesh)

    def _uniforms(self, active: ActiveRows, numbers_C: Array) -> Array | None:
        """Return the uniform numbers `[C, R, 2]` of some tokens of the active rows."""
        return None if self.settings.greedy else draw_uniforms(active.keys, numbers_C)

    def _sample(
        self, copy: Params, active: ActiveRows, phi_RD: Array, draw: Draw
    ) -> tuple[ActiveRows, Columns]:
        """Sample a token of every active row from its features; return it with its records."""
        number, uniforms_R2 = draw
        z_RV = logits(head_of(self.policy, copy), phi_RD)
        drawn = sample_tokens(self.settings, z_RV, uniforms_R2)
        real_R = ~active.done & (number < self.settings.max_completion_tokens)
        tokens_R = jnp.where(real_R, drawn.tokens, self.settings.pad_id)
        ended_R = jnp.zeros_like(real_R)
        for end_id in self.settings.end_ids:
            ended_R |= tokens_R == end_id
        keep_features = self.settings.keep_features
        columns_R = Columns(
            tokens=tokens_R,
            log_probs=jnp.where(real_R, drawn.log_probs, 0.0),
            kept_log_mass=_zeroed(drawn.kept_log_mass, real_R),
            mask=real_R,
            features=jnp.where(real_R[:, None], phi_RD, 0) if keep_features else None,
            entropy=jnp.where(real_R, drawn.entropy, 0.0),
        )
        # pad_id may be one of end_ids, and no row ends past the budget
        done_R = active.done | (ended_R & real_R)
        return replace(active, last=tokens_R, done=done_R), columns_R

    def _empty(self, columns_R: Columns) -> Columns:
        """Return columns `[R, C]` without tokens, with the fields and dtypes of a single one."""
        length = self.settings.max_completion_tokens

        def empty(values: Array) -> Array:
            return jnp.zeros((values.shape[0], length, *values.shape[1:]), values.dtype)

        columns = jax.tree.map(empty, columns_R)
        return replace(columns, tokens=jnp.full_like(columns.tokens, self.settings.pad_id))

    def _write(
        self, output: Output, chunk_CR: Columns, active: ActiveRows, numbers_C: Array
    ) -> Output:
        """Write a chunk's tokens, by their numbers, into the rows of the output, block by block."""
        total = len(output.finished)
        blocks = trees.blocks(self.mesh, total)
        rows = active.rows.reshape(blocks, -1) % (total // blocks)

        def of_block(table: Array, values: Array, rows: Array) -> Array:
            return table.at[rows[:, None], numbers_C[None]].set(values, mode="drop")

        def write(table: Array, values_CR: Array) -> Array:
            shape, values = table.shape, jnp.swapaxes(values_CR, 0, 1)
            table, values = (x.reshape(blocks, -1, *x.shape[1:]) for x in (table, values))
            return jax.vmap(of_block)(table, values, rows).reshape(shape)

        return Output(
            columns=jax.tree.map(write, output.columns, chunk_CR),
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


def _zeroed(values: Array | None, mask: Array) -> Array | None:
    return None if values is None else jnp.where(mask, values, 0.0)


def _map_rows(function: Callable[[Array], Array], cache: Cache) -> Cache:
    """Apply a function of arrays with leading rows to all arrays of a cache."""
    keys, values, mask = jax.tree.map(function, (cache.keys, cache.values, cache.mask))
    return replace(cache, keys=keys, values=values, mask=mask)
