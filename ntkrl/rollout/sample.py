"""Sample a group of completions per prompt: one prefill a prompt, then chunks of single tokens.

Between chunks the host looks at how many rows are left: when half of them are done the rest move
together, and the cache grows in powers of two. Stop strings are looked for in the text there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ntkrl import runtime, trees
from ntkrl.numerics import bucket_length
from ntkrl.rollout import decode
from ntkrl.rollout.settings import SamplerSettings
from ntkrl.types import Array, Params, Policy, PromptBatch, Rollout

FindStop = Callable[[np.ndarray], int | None]


class Sampler:
    """`sample(params, prompts, key) -> Rollout`; compiles a few programs and keeps them.

    Each completion draws from a key of its own (see decode.request_keys), so what a prompt gets
    does not depend on what else is in the batch or on how long the other rows run.

    policy: the network's functions.
    settings: SamplerSettings.
    find_stop: from the ids of a completion `[n]` to the number of tokens that hold its first stop
      string whole, or None when there is none in them; or None to look for none.
    mesh: that prompts and params lie on, or None for one device.
    """

    def __init__(
        self,
        policy: Policy,
        settings: SamplerSettings,
        find_stop: FindStop | None = None,
        mesh: Mesh | None = None,
    ):
        self.policy, self.settings = policy, settings
        self.find_stop, self.mesh = find_stop, mesh
        fixed = (policy, settings, mesh)
        prefill = functools.partial(decode.prefill, *fixed)
        read_on = functools.partial(decode.read_on, *fixed)
        cut = functools.partial(decode.cut, settings, mesh)
        fewer, longer, longest, rollout = (
            functools.partial(call, mesh)
            for call in (decode.fewer, decode.longer, decode.longest, decode.rollout)
        )
        self.programs = {
            "prefill": jax.jit(prefill, static_argnums=0),
            "read_on": jax.jit(read_on, donate_argnums=(1, 2)),
            "fewer": jax.jit(fewer, static_argnums=(0, 1)),
            "longer": jax.jit(longer, static_argnums=0),
            "cut": jax.jit(cut, donate_argnums=(0, 1)),
            "longest": jax.jit(longest),
            "rollout": jax.jit(rollout, static_argnums=(0, 1)),
        }

    def __call__(self, params: Params, prompts: PromptBatch, key: Array) -> Rollout:
        """Draw N completions of each prompt.

        Args:
          params: of the policy.
          prompts: P prompts.
          key: consumed.

        Returns:
          A Rollout of device arrays; its C is the length of the longest completion, padded to one
          of few lengths.

        Raises:
          ValueError: (before tracing) prompts and completions exceed the context.
        """
        width, budget = prompts.tokens.shape[1], self.settings.max_completion_tokens
        check_length(self.policy, width, budget)
        chunk = self.settings.chunk_steps
        columns = self.columns(width, 1 + chunk)
        if self.settings.gather_params:
            params = self.gathering(params)(params)
        live, written, left = self.programs["prefill"](columns, params, prompts, key)
        parts = trees.blocks(self.mesh, written.mask.shape[0])
        drawn, looked = 1, np.zeros(written.mask.shape[0], np.int64)
        live, written, left = self._stop(live, written, looked, left)
        while drawn < budget and left:
            live = self._resize(live, parts, left, self.columns(width, drawn + chunk))
            live, written, left = self.programs["read_on"](params, live, written, jnp.int32(drawn))
            drawn = min(drawn + chunk, budget)
            live, written, left = self._stop(live, written, looked, left)
        return self._rollout(prompts, written)

    def compilations(self) -> int:
        """Return how many programs were compiled so far."""
        return sum(program._cache_size() for program in self.programs.values())

    def gathering(self, params: Params) -> Any:
        """Return the program that casts params and gathers them over fsdp, to be decoded with."""
        if "gather" not in self.programs:
            dtype, where = self.settings.params_dtype, None
            if self.mesh is not None:
                patterns = trees.without(self.policy.sharding, "fsdp")
                where = trees.shardings(params, patterns, self.mesh)

            def cast(held: Params) -> Params:
                return held if dtype is None else jax.tree.map(lambda p: p.astype(dtype), held)

            self.programs["gather"] = jax.jit(cast, out_shardings=where)
        return self.programs["gather"]

    def columns(self, width: int, drawn: int) -> int:
        """Return the cache's columns while up to `drawn` tokens of each row are drawn."""
        # the last token is drawn and never read
        read, most = drawn - 1, self.settings.max_completion_tokens - 1
        grown = self.settings.chunk_steps
        while grown < min(read, most):
            grown *= 2
        return width + min(grown, most)

    def _resize(self, live: decode.Live, parts: int, left: int, columns: int) -> decode.Live:
        rows = live.rows.shape[0]
        wanted = rows // parts
        fewest = max(left, -(-self.settings.fewest_rows // parts))
        while wanted % 2 == 0 and wanted // 2 >= fewest:
            wanted //= 2
        if wanted * parts < rows:
            live = self.programs["fewer"](wanted * parts, parts, live)
        if columns > live.cache.mask.shape[1]:
            live = self.programs["longer"](columns, live)
        return live

    def _stop(
        self, live: decode.Live, written: decode.Written, looked: np.ndarray, left: Array
    ) -> tuple[decode.Live, decode.Written, int]:
        """End the rows whose text holds a stop string; return how many a block has left at most."""
        if self.find_stop is None:
            return live, written, int(np.max(left))
        tokens_BC, mask_BC = runtime.fetch((written.tokens, written.mask))
        lengths_B = mask_BC.sum(axis=1)
        ends_B = np.full(len(lengths_B), self.settings.max_completion_tokens + 1)
        for row in np.nonzero(lengths_B > looked)[0]:
            end = self.find_stop(tokens_BC[row, : lengths_B[row]])
            ends_B[row] = ends_B[row] if end is None else end
        looked[:] = lengths_B
        live, written, left = self.programs["cut"](live, written, jnp.asarray(ends_B))
        return live, written, int(np.max(left))

    def _rollout(self, prompts: PromptBatch, written: decode.Written) -> Rollout:
        count = self.settings.completions_per_prompt
        longest = int(self.programs["longest"](written))
        length = bucket_length(longest, self.settings.max_completion_tokens)
        return self.programs["rollout"](count, length, prompts, written)


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
