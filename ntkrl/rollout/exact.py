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
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ntkrl import numerics, runtime, trees
from ntkrl.rollout.decode import completion_keys
from ntkrl.rollout.sampler import Sampler, check_length
from ntkrl.rollout.token_sampling import draw_uniforms, sample_tokens
from ntkrl.scoring import completion_features, head_of
from ntkrl.softmax import OutputHead, TokenStatistics, logit_statistics, logits
from ntkrl.types import Array, Params, PromptBatch, Rollout

CHECK_STEPS = 16
"""Tokens between two checks for stop strings, and for whether all completions have ended."""


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
class UpdateRows:
    """The rows of a minibatch, R of them.

    tokens, mask: `[R, P + C]` prompt and completion. kept_log_mass, entropy: `[R, C]`.
    done: `[R]` bool. keys: `[R, …]` data of one PRNG key per completion.
    """

    tokens: Array
    mask: Array
    kept_log_mass: Array
    entropy: Array
    done: Array
    keys: Array


class ExactSampler:
    """`sampler(params, prompts, key) -> Rollout`, with the draws of `Sampler` for the same keys.

    Guaranteed where both compile to the same code: log-probs are those of the update's first
    minibatch in bits, and tokens were drawn from these very logits. The Rollout has C columns,
    whatever the completions' lengths, and no features.

    sampler: the sampler whose policy, settings and stop strings these are.
    mesh: the update's.
    reading: of the update.
    """

    def __init__(self, sampler: Sampler, mesh: Mesh, reading: UpdateReading):
        self.policy, self.settings, self.mesh = sampler.policy, sampler.settings, mesh
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
        padded: Any = (
            np.pad(np.repeat(tokens, count, 0), tail, constant_values=settings.pad_id),
            np.pad(np.repeat(mask, count, 0), tail),
        )
        kept: Any = np.zeros((len(key_data), budget), np.float32)
        done: Any = np.zeros(len(key_data), bool)
        rows = UpdateRows(
            tokens=padded[0],
            mask=padded[1],
            kept_log_mass=kept,
            entropy=kept,
            done=done,
            keys=key_data,
        )
        blocks = np.split(np.arange(len(key_data)), self.reading.minibatches)
        parts = [self._sample(params, jax.tree.map(lambda leaf: leaf[b], rows)) for b in blocks]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

    def _sample(self, params: Params, rows: UpdateRows) -> Rollout:
        """Return the completions of a minibatch, as host arrays."""
        rows = runtime.place_rows(rows, self.mesh)
        budget, searched = self.settings.max_completion_tokens, 0
        for t in range(budget):
            z_RV = self.read(params, rows.tokens, rows.mask, jnp.int32(t))[1]
            rows = self.draw(rows, z_RV, jnp.int32(t))
            if (t + 1) % CHECK_STEPS == 0 or t + 1 == budget:
                rows, searched = self._ended(rows, searched), t + 1
                if np.all(runtime.fetch(rows.done)):
                    break
        log_probs = self.read(params, rows.tokens, rows.mask, jnp.int32(0))[0]
        rows, log_probs_RC = runtime.fetch((rows, log_probs))
        completion_mask = rows.mask[:, -budget:]
        log_probs, kept, entropy = jax.tree.map(
            lambda leaf: np.where(completion_mask, leaf, 0),
            (log_probs_RC, rows.kept_log_mass, rows.entropy),
        )
        return Rollout(
            tokens=rows.tokens,
            mask=rows.mask,
            completion_mask=completion_mask,
            sampler_log_probs=log_probs,
            kept_log_mass=kept,
            finished=rows.done,
            features=None,
            entropy=entropy,
        )

    def _ended(self, rows: UpdateRows, searched: int) -> UpdateRows:
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
        return runtime.place_rows(host, self.mesh)

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
        outputs = numerics.scan_microbatches(lambda part: ((), read(part)), parts, _add)[1]
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
        moves = self._moves(trained)

        def of_chunk(chunk: tuple[Array, Array]) -> tuple[Any, Any]:
            def statistics(*moving: Any) -> tuple[Array, tuple[TokenStatistics, Array]]:
                inputs = {"head": head, "phi": chunk[0], **dict(zip(moves, moving, strict=True))}
                z = logits(inputs["head"], inputs["phi"])
                values = logit_statistics(z / self.settings.temperature, chunk[1])
                drawn_from = jax.lax.dynamic_index_in_dim(z, column, axis=1, keepdims=False)
                return values.log_probs, (values, drawn_from)

            operands = {"head": head, "phi": chunk[0]}
            of = [operands[name] for name in moves]
            log_probs, of_logits, values = jax.vjp(statistics, *of, has_aux=True)
            cotangents = dict(zip(moves, of_logits(jnp.ones_like(log_probs)), strict=True))
            return cotangents.get("head"), (*values, cotangents.get("phi"))

        together = max(1, self.reading.chunk_tokens // length) * trees.blocks(self.mesh, rows)
        chunks = numerics.split_rows((phi_RCD, tokens[:, -length:]), -(-rows // together))
        d_head, outputs = numerics.scan_microbatches(of_chunk, chunks, _add)
        values, z_RV, d_phi = jax.tree.map(lambda leaf: numerics.join_rows(leaf, rows), outputs)
        return values.log_probs, z_RV, (values, d_head, d_phi, jax.tree.leaves(backward))

    def _moves(self, trained: Params) -> list[str]:
        """Return which of head and features depend on trained leaves."""
        names = set(trees.named_leaves(trained))
        of_head = {self.policy.head_weight, self.policy.head_bias}
        body = names if self.policy.tied else names - of_head
        return [name for name, leaves in (("head", names & of_head), ("phi", body)) if leaves]

    def _draw(self, rows: UpdateRows, z_RV: Array, t: Array) -> UpdateRows:
        """Sample token t of every row that is not done."""
        uniforms_1R2 = draw_uniforms(jax.random.wrap_key_data(rows.keys), t[None])
        drawn = sample_tokens(self.settings, z_RV, uniforms_1R2[0])
        kept_R = drawn.kept_log_mass
        kept_R = jnp.zeros_like(drawn.log_probs) if kept_R is None else kept_R
        real_R, column = ~rows.done, rows.tokens.shape[1] - rows.kept_log_mass.shape[1] + t
        tokens_R = jnp.where(real_R, drawn.tokens, self.settings.pad_id)
        done_R = rows.done
        for end_id in self.settings.end_ids:
            done_R |= tokens_R == end_id

        def set_column(table: Array, values: Array, column: Array) -> Array:
            values = values[:, None].astype(table.dtype)
            return jax.lax.dynamic_update_slice_in_dim(table, values, column, axis=1)

        return UpdateRows(
            tokens=set_column(rows.tokens, tokens_R, column),
            mask=set_column(rows.mask, real_R, column),
            kept_log_mass=set_column(rows.kept_log_mass, kept_R, t),
            entropy=set_column(rows.entropy, drawn.entropy, t),
            done=done_R,
            keys=rows.keys,
        )


def _add(left: Any, right: Any) -> Any:
    return jax.tree.map(jnp.add, left, right)
