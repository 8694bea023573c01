"""Sampling of N completions per prompt on the devices of a mesh.

One prefill per prompt, then chunks of decode steps. Between chunks the host compacts the batch once
half of its rows are done, extends the KV cache when it is full, and checks for stop strings.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ntkrl import runtime, trees
from ntkrl.numerics import bucket_length
from ntkrl.rollout.decode import ActiveRows, Decoder, Output
from ntkrl.rollout.settings import SamplerSettings
from ntkrl.types import Array, Cache, Params, Policy, PromptBatch, Rollout

COLUMNS = 16
"""Columns that a KV cache grows by, or multiples of it."""
FindStop = Callable[[np.ndarray], int | None]


class SamplerPrograms(NamedTuple):
    """Jitted methods of `Decoder`, in the order of use; donated arguments are consumed."""

    prefill: jax.stages.Wrapped
    decode_chunk: jax.stages.Wrapped
    compact: jax.stages.Wrapped
    grow_cache: jax.stages.Wrapped
    truncate: jax.stages.Wrapped
    longest: jax.stages.Wrapped
    rollout: jax.stages.Wrapped


class Sampler:
    """`sampler(params, prompts, key) -> Rollout`, with its compiled programs.

    Each completion has its own PRNG key (see decode.completion_keys): its tokens do not depend on
    the rest of the batch or on how long other completions run.

    policy: the network's functions.
    settings: SamplerSettings.
    find_stop: from the ids of a completion `[n]` to the number of tokens up to the end of its first
      stop string, or None without one; or None for no stop strings.
    mesh: mesh of the prompts and of the copy of the params, or None for one device.
    results_mesh: mesh over whose rows the results are sharded, of the same devices in the same
      order; None for `mesh`.
    """

    def __init__(
        self,
        policy: Policy,
        settings: SamplerSettings,
        find_stop: FindStop | None = None,
        mesh: Mesh | None = None,
        results_mesh: Mesh | None = None,
    ):
        results_mesh = mesh if results_mesh is None else results_mesh
        if policy.on_mesh is not None and mesh != results_mesh:
            policy = policy.on_mesh(mesh)
        self.policy, self.settings = policy, settings
        self.find_stop, self.mesh = find_stop, mesh
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        self.chunk_length = settings.chunk_length(platform)
        decoder = Decoder(policy, settings, mesh, results_mesh, self.chunk_length)
        self.programs = SamplerPrograms(
            prefill=jax.jit(decoder.prefill, static_argnums=0),
            decode_chunk=jax.jit(decoder.decode_chunk, donate_argnums=(1, 2)),
            compact=jax.jit(decoder.compact, static_argnums=(0, 1)),
            grow_cache=jax.jit(decoder.grow_cache, static_argnums=0),
            truncate=jax.jit(decoder.truncate, donate_argnums=(0, 1)),
            longest=jax.jit(decoder.longest),
            rollout=jax.jit(decoder.rollout, static_argnums=0),
        )
        self._copy: jax.stages.Wrapped | None = None

    def __call__(self, params: Params, prompts: PromptBatch, key: Array) -> Rollout:
        """Sample N completions of each prompt.

        Args:
          params: params of the policy.
          prompts: P prompts.
          key: consumed.

        Returns:
          A Rollout of device arrays; its C is the length of the longest completion, padded to one
          of few lengths.

        Raises:
          ValueError: (before tracing) prompts and completions exceed the context.
        """
        settings, prompt_length = self.settings, prompts.tokens.shape[1]
        budget, chunk = settings.max_completion_tokens, self.chunk_length
        check_length(self.policy, prompt_length, budget)
        # 1. params: cast, split by layer and placed once, instead of once per token
        copy = self.copy_program(params)(params)
        if self.mesh is not None:
            prompts = runtime.place_rows(prompts, self.mesh)
            key = runtime.place(key, runtime.replicated(self.mesh))
        # 2. prefill: KV cache of the prompts, first token of every completion
        columns = self.cache_columns(prompt_length, 1 + chunk)
        active, output, remaining = self.programs.prefill(columns, copy, prompts, key)
        rows = len(output.finished)
        blocks, lengths, sampled = trees.blocks(self.mesh, rows), np.zeros(rows, np.int64), 1
        active, output, most = self._apply_stops(active, output, lengths, remaining)
        # 3. decode loop: chunks of single-token steps while any completion is unfinished
        while sampled < budget and most:
            columns = self.cache_columns(prompt_length, sampled + chunk)
            active = self._resize(active, blocks, most, columns)
            start = jnp.int32(sampled)
            active, output, remaining = self.programs.decode_chunk(copy, active, output, start)
            sampled = min(sampled + chunk, budget)
            active, output, most = self._apply_stops(active, output, lengths, remaining)
        # 4. output: prompt and completion side by side
        longest = int(self.programs.longest(output))
        return self.programs.rollout(bucket_length(longest, budget), prompts, output)

    def copy_program(self, params: Params) -> jax.stages.Wrapped:
        """Return the program `params -> copy` that the others read, of `Policy.decode_params`.

        It casts the params and moves them to `mesh`. Leaves of the right dtype and placement that
        no layer is cut from are not copied.
        """
        if self._copy is None:
            shardings = None
            if self.mesh is not None:
                shardings = jax.tree.map(lambda leaf: leaf.sharding, self.copy_shapes(params))
            self._copy = jax.jit(self.policy.decode_params, out_shardings=shardings)
        return self._copy

    def copy_shapes(self, params: Params) -> Params:
        """Return the shapes of the copy, with their shardings if there is a mesh."""
        policy = self.policy
        shapes = jax.eval_shape(policy.decode_params, params)
        if self.mesh is None:
            return shapes
        patterns = policy.sharding if policy.decode_sharding is None else policy.decode_sharding
        shardings = trees.shardings(shapes, patterns, self.mesh)
        return jax.tree.map(lambda leaf, where: leaf.update(sharding=where), shapes, shardings)

    def cache_shapes(self, rows: int, prompt_length: int) -> Cache:
        """Return the shapes of the full cache, with their shardings if there is a mesh."""
        settings, mesh = self.settings, self.mesh
        columns = self.cache_columns(prompt_length, settings.max_completion_tokens)
        shapes = jax.eval_shape(lambda: self.policy.init_cache(rows, columns, settings.cache_dtype))
        if mesh is None:
            return shapes

        def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            spec = PartitionSpec()
            if leaf.ndim > 1:
                heads = leaf.ndim > 2 and leaf.shape[1] % mesh.shape["tensor"] == 0
                parts = trees.ROWS if trees.blocks(mesh, rows) > 1 else None
                spec = PartitionSpec(parts, *(["tensor"] if heads else []))
            return leaf.update(sharding=NamedSharding(mesh, spec))

        return jax.tree.map(placed, shapes)

    def cache_columns(self, prompt_length: int, sampled: int) -> int:
        """Return the cache columns needed until `sampled` tokens per row.

        A cache grows by at least a quarter, so that there are few lengths to compile for, and most
        columns are in use.
        """
        # the last token is sampled and never read
        most = prompt_length + self.settings.max_completion_tokens - 1
        needed, columns = prompt_length + sampled - 1, prompt_length + COLUMNS
        while columns < min(needed, most):
            columns += COLUMNS * -(-columns // (4 * COLUMNS))
        return min(columns, most)

    def _resize(self, active: ActiveRows, blocks: int, most: int, columns: int) -> ActiveRows:
        """Halve the rows of a block while `most` unfinished ones fit, and grow the cache."""
        rows = active.rows.shape[0]
        size = rows // blocks
        fewest = max(most, -(-self.settings.fewest_rows // blocks))
        while size % 2 == 0 and size // 2 >= fewest:
            size //= 2
        if size * blocks < rows:
            active = self.programs.compact(size * blocks, blocks, active)
        if columns > active.cache.mask.shape[1]:
            active = self.programs.grow_cache(columns, active)
        return active

    def _apply_stops(
        self, active: ActiveRows, output: Output, lengths: np.ndarray, remaining: Array
    ) -> tuple[ActiveRows, Output, int]:
        """End completions at their first stop string.

        Args:
          active, output, remaining: results of the last program.
          lengths: `[B]` tokens already searched, updated in place.

        Returns:
          `(active, output, most)`, most the largest number of unfinished rows in a block.
        """
        if self.find_stop is not None:
            tokens_BC, mask_BC = runtime.fetch((output.columns.tokens, output.columns.mask))
            lengths_B = mask_BC.sum(axis=1)
            ends_B = np.full(len(lengths_B), self.settings.max_completion_tokens + 1)
            for row in np.nonzero(lengths_B > lengths)[0]:
                end = self.find_stop(tokens_BC[row, : lengths_B[row]])
                ends_B[row] = ends_B[row] if end is None else end
            lengths[:] = lengths_B
            ends = jnp.asarray(ends_B)
            active, output, remaining = self.programs.truncate(active, output, ends)
        return active, output, int(np.max(remaining))


def check_length(policy: Policy, prompt_length: int, budget: int) -> None:
    """Check that prompts and completions fit the model's context.

    Raises:
      ValueError: they exceed it.
    """
    if prompt_length + budget > policy.max_tokens:
        raise ValueError(
            f"prompts of {prompt_length} tokens and completions of {budget} exceed the model's "
            f"context of {policy.max_tokens}; lower data.max_prompt_tokens or "
            "rollout.max_completion_tokens."
        )
    limit = policy.max_decoded_tokens
    if limit is not None and prompt_length + budget > limit:
        raise ValueError(
            f"prompts of {prompt_length} tokens and completions of {budget} exceed the "
            f"{limit} tokens of original_max_position_embeddings, past which "
            "LongRoPE rotates all earlier tokens by other factors, which a cache of keys cannot "
            "follow; lower data.max_prompt_tokens or rollout.max_completion_tokens."
        )
