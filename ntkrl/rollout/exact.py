"""Sampling by the forward pass of the update, so that both have the same log-probs in bits.

Decoding with a KV cache and reading complete rows are other programs, whose roundings differ. Here
every token is drawn from the logits of one program that reads complete rows as the update does: as
many rows at a time, of the same length, in the same chunks, as the forward part of a gradient, with
what the backward pass would need as results. The compiler then makes the same code of it, on CPU.

Causality makes logits independent of later columns, to the bit: what is masked adds zeros. So the
log-probs reported, of a last pass over the finished rows, are those that each token was drawn from.
It takes C + 1 passes over rows of P + C tokens in place of one prefill and C decode steps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import numerics, runtime, trees
from ntkrl.rollout.decode import completion_keys
from ntkrl.rollout.sampler import Sampler, check_length
from ntkrl.rollout.token_sampling import sample_tokens
from ntkrl.scoring import completion_features, head_of
from ntkrl.softmax import OutputHead, logit_statistics, logits
from ntkrl.types import Array, Params, PromptBatch, Rollout


@dataclasses.dataclass(frozen=True)
class UpdateReading:
    """The part of an update that its forward pass depends on.

    trained: one bool per leaf of the params, in leaf order.
    minibatches: parts of the rows. microbatches: parts of a minibatch that are read at a time.
    chunk_tokens: positions whose logits exist at a time on a device, at least C.
    """

    trained: tuple[bool, ...]
    minibatches: int
    microbatches: int
    chunk_tokens: int


@chex.dataclass(frozen=True)
class Rows:
    """The rows of a minibatch, R of them.

    tokens, mask: `[R, P + C]` prompt and completion. kept_log_mass: `[R, C]`.
    done: `[R]` bool. keys: `[R, …]` data of one PRNG key per completion.
    """

    tokens: Array
    mask: Array
    kept_log_mass: Array
    done: Array
    keys: Array


class ExactSampler:
    """`sampler(params, prompts, key) -> Rollout`, with the draws of `Sampler` for the same keys.

    Guaranteed where both compile to the same code: log-probs are those of the update's first
    minibatch in bits, and tokens were drawn from these very logits. The Rollout has C columns,
    whatever the completions' lengths, and no features.

    sampler: the sampler whose policy, settings, stop strings and mesh these are.
    reading: of the update.
    """

    def __init__(self, sampler: Sampler, reading: UpdateReading):
        self.policy, self.settings, self.mesh = sampler.policy, sampler.settings, sampler.mesh
        self.find_stop, self.reading = sampler.find_stop, reading
        self.read = jax.jit(self._read)
        self.draw = jax.jit(self._draw, donate_argnums=0)

    def __call__(self, params: Params, prompts: PromptBatch, key: Array) -> Rollout:
        """Sample N completions of each prompt.

        Args:
          params, prompts, key: as in `Sampler.__call__`.

        Raises:
          ValueError: (before tracing) prompts and completions exceed the context.
        """
        settings, width = self.settings, prompts.tokens.shape[1]
        budget, count = settings.max_completion_tokens, settings.completions_per_prompt
        check_length(self.policy, width, budget)
        keys = jax.random.key_data(completion_keys(key, prompts, count))
        tokens, mask, key_data = runtime.fetch((prompts.tokens, prompts.mask, keys))
        tail = ((0, 0), (0, budget))
        rows = Rows(
            tokens=np.pad(np.repeat(tokens, count, 0), tail, constant_values=settings.pad_id),
            mask=np.pad(np.repeat(mask, count, 0), tail),
            kept_log_mass=np.zeros((len(key_data), budget), np.float32),
            done=np.zeros(len(key_data), bool),
            keys=key_data,
        )
        blocks = np.split(np.arange(len(key_data)), self.reading.minibatches)
        parts = [self._sample(params, jax.tree.map(lambda leaf: leaf[b], rows)) for b in blocks]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

    def _sample(self, params: Params, rows: Rows) -> Rollout:
        """Return the completions of a minibatch, as host arrays."""
        rows = runtime.place_rows(rows, self.mesh) if self.mesh is not None else rows
        budget, searched = self.settings.max_completion_tokens, 0
        for t in range(budget):
            z_RV = self.read(params, rows.tokens, rows.mask, jnp.int32(t))[1]
            rows = self.draw(rows, z_RV, jnp.int32(t))
            if (t + 1) % self.settings.chunk_steps == 0 or t + 1 == budget:
                rows, searched = self._ended(rows, searched), t + 1
                if np.all(runtime.fetch(rows.done)):
                    break
        log_probs = self.read(params, rows.tokens, rows.mask, jnp.int32(0))[0]
        rows, log_probs_RC = runtime.fetch((rows, log_probs))
        completion_mask = rows.mask[:, -budget:]
        return Rollout(
            tokens=rows.tokens,
            mask=rows.mask,
            completion_mask=completion_mask,
            sampler_log_probs=np.where(completion_mask, log_probs_RC, 0),
            kept_log_mass=np.where(completion_mask, rows.kept_log_mass, 0),
            finished=rows.done,
            features=None,
        )

    def _ended(self, rows: Rows, searched: int) -> Rows:
        """End completions at their first stop string; `searched` tokens have none."""
        if self.find_stop is None:
            return rows
        budget, host = self.settings.max_completion_tokens, runtime.fetch(rows)
        tokens, mask, done = host.tokens.copy(), host.mask.copy(), host.done.copy()
        for row, length in enumerate(mask[:, -budget:].sum(axis=1)):
            end = self.find_stop(tokens[row, -budget:][:length]) if length > searched else None
            if end is not None:
                tokens[row, -budget:][end:], mask[row, -budget:][end:] = self.settings.pad_id, False
                done[row] = True
        host = dataclasses.replace(host, tokens=tokens, mask=mask, done=done)
        return host if self.mesh is None else runtime.place_rows(host, self.mesh)

    def _read(
        self, params: Params, tokens: Array, mask: Array, column: Array
    ) -> tuple[Array, Array, Any]:
        """Read the complete rows of a minibatch as the update does.

        Args:
          params: the policy's.
          tokens, mask: `[R, P + C]`.
          column: index of a completion token.

        Returns:
          log_probs: `[R, C]` of every completion token, at the temperature.
          logits: `[R, V]` that predict the column's token, before the temperature.
          residuals: what a backward pass would read, so that the compiler keeps it.
        """
        trained, frozen = trees.partition(params, self.reading.trained)

        def read(part: tuple[Array, Array]) -> tuple[Array, Array, Any]:
            return self._microbatch(trained, frozen, part, column)

        if self.reading.microbatches == 1:
            return read((tokens, mask))
        parts = numerics.split_rows((tokens, mask), self.reading.microbatches)
        outputs = _each(read, parts)
        log_probs, z_RV = (numerics.join_rows(leaf, len(tokens)) for leaf in outputs[:2])
        return log_probs, z_RV, outputs[2]

    def _microbatch(
        self, trained: Params, frozen: Params, part: tuple[Array, Array], column: Array
    ) -> tuple[Array, Array, Any]:
        """Return the results of `_read` for tokens and mask of a microbatch."""
        tokens, mask = part
        length, rows = self.settings.max_completion_tokens, tokens.shape[0]

        def body(trained: Params) -> tuple[Array, OutputHead]:
            merged = trees.merge(trained, frozen)
            phi_RCD = completion_features(self.policy, merged, tokens, mask, length)
            return phi_RCD, head_of(self.policy, merged)

        (phi_RCD, head), backward = jax.vjp(body, trained)

        def of_chunk(chunk: tuple[Array, Array]) -> tuple[Array, Array, Array]:
            def log_probs(phi: Array) -> tuple[Array, Array]:
                z = logits(head, phi)
                statistics = logit_statistics(z / self.settings.temperature, chunk[1])
                drawn_from = jax.lax.dynamic_index_in_dim(z, column, axis=1, keepdims=False)
                return statistics.log_probs, drawn_from

            values, of_logits, z_RV = jax.vjp(log_probs, chunk[0], has_aux=True)
            return values, z_RV, of_logits(jnp.ones_like(values))[0]

        together = max(1, self.reading.chunk_tokens // length) * trees.blocks(self.mesh, rows)
        chunks = numerics.split_rows((phi_RCD, tokens[:, -length:]), -(-rows // together))
        values, z_RV, d_phi = (numerics.join_rows(x, rows) for x in _each(of_chunk, chunks))
        return values, z_RV, [d_phi, *jax.tree.leaves(backward)]

    def _draw(self, rows: Rows, z_RV: Array, t: Array) -> Rows:
        """Sample token t of every row that is not done."""
        keys_R = jax.random.wrap_key_data(rows.keys)
        keys_R = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_R, t)
        drawn = sample_tokens(self.settings, z_RV, keys_R)
        real_R, column = ~rows.done, rows.tokens.shape[1] - rows.kept_log_mass.shape[1] + t
        tokens_R = jnp.where(real_R, drawn.tokens, self.settings.pad_id)
        done_R = rows.done
        for end_id in self.settings.end_ids:
            done_R |= tokens_R == end_id

        def set_column(table: Array, values: Array, column: Array) -> Array:
            values = values[:, None].astype(table.dtype)
            return jax.lax.dynamic_update_slice_in_dim(table, values, column, axis=1)

        return Rows(
            tokens=set_column(rows.tokens, tokens_R, column),
            mask=set_column(rows.mask, real_R, column),
            kept_log_mass=set_column(rows.kept_log_mass, drawn.kept_log_mass, t),
            done=done_R,
            keys=rows.keys,
        )


def _each(function: Callable[[Any], Any], parts: Any) -> Any:
    """Return the stacked results of a function of each part of some rows."""
    return numerics.scan_microbatches(lambda part: ((), function(part)), parts, lambda *_: ())[1]
