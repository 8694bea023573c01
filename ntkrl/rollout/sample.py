"""Sample a group of completions per prompt: one prefill a prompt, then chunks of single tokens.

Between chunks the host looks at how many rows are left: when half of them are done the rest move
together, and the cache grows in powers of two. Stop strings are looked for in the text there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import runtime
from ntkrl.numerics import bucket_length
from ntkrl.rollout import decode
from ntkrl.rollout.settings import SamplerSettings
from ntkrl.types import Array, Params, Policy, PromptBatch, Rollout

FEWEST_ROWS = 8
"""Below this a step costs reading the weights, however few rows there are."""

FindStop = Callable[[np.ndarray], int | None]


class Sampler:
    """`sample(params, prompts, key) -> Rollout`; compiles a few programs and keeps them.

    Each completion draws from a key of its own (see decode.request_keys), so what a prompt gets
    does not depend on what else is in the batch or on how long the other rows run.

    policy: the network's functions.
    settings: SamplerSettings.
    find_stop: from the ids of a completion `[n]` to the number of tokens that hold its first stop
      string whole, or None when there is none in them; or None to look for none.
    smallest: rows that are never made fewer; a multiple of what they are spread over.
    """

    def __init__(
        self,
        policy: Policy,
        settings: SamplerSettings,
        find_stop: FindStop | None = None,
        smallest: int = FEWEST_ROWS,
    ):
        self.policy, self.settings = policy, settings
        self.find_stop, self.smallest = find_stop, smallest
        fixed = (policy, settings)
        prefill = functools.partial(decode.prefill, *fixed)
        read_on = functools.partial(decode.read_on, *fixed)
        self.programs = {
            "prefill": jax.jit(prefill, static_argnums=0),
            "read_on": jax.jit(read_on, donate_argnums=(1, 2)),
            "fewer": jax.jit(decode.fewer, static_argnums=0),
            "longer": jax.jit(decode.longer, static_argnums=0),
            "cut": jax.jit(functools.partial(decode.cut, settings), donate_argnums=(0, 1)),
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
        _check_length(self.policy, width, budget)
        chunk = self.settings.chunk_steps
        columns = self._columns(width, 1 + chunk)
        live, written = self.programs["prefill"](columns, params, prompts, key)
        drawn, looked = 1, np.zeros(written.mask.shape[0], np.int64)
        live, written, left = self._stop(live, written, looked, jnp.sum(~live.done))
        while drawn < budget and left:
            live = self._resize(live, left, self._columns(width, drawn + chunk))
            live, written, left = self.programs["read_on"](params, live, written, jnp.int32(drawn))
            drawn = min(drawn + chunk, budget)
            live, written, left = self._stop(live, written, looked, left)
        return self._rollout(prompts, written)

    def compilations(self) -> int:
        """Return how many programs were compiled so far."""
        return sum(program._cache_size() for program in self.programs.values())

    def _columns(self, width: int, drawn: int) -> int:
        """Return the cache's columns while up to `drawn` tokens of each row are drawn."""
        # the last token is drawn and never read
        read, most = drawn - 1, self.settings.max_completion_tokens - 1
        grown = self.settings.chunk_steps
        while grown < min(read, most):
            grown *= 2
        return width + min(grown, most)

    def _resize(self, live: decode.Live, left: int, columns: int) -> decode.Live:
        rows = live.rows.shape[0]
        wanted = rows
        while wanted % 2 == 0 and wanted // 2 >= max(left, self.smallest):
            wanted //= 2
        if wanted < rows:
            live = self.programs["fewer"](wanted, live)
        if columns > live.cache.mask.shape[1]:
            live = self.programs["longer"](columns, live)
        return live

    def _stop(
        self, live: decode.Live, written: decode.Written, looked: np.ndarray, left: Array
    ) -> tuple[decode.Live, decode.Written, int]:
        """End the rows whose text holds a stop string; return how many are left."""
        if self.find_stop is None:
            return live, written, int(left)
        tokens_BC, mask_BC = runtime.fetch((written.tokens, written.mask))
        lengths_B = mask_BC.sum(axis=1)
        ends_B = np.full(len(lengths_B), self.settings.max_completion_tokens + 1)
        for row in np.nonzero(lengths_B > looked)[0]:
            end = self.find_stop(tokens_BC[row, : lengths_B[row]])
            ends_B[row] = ends_B[row] if end is None else end
        looked[:] = lengths_B
        live, written, left = self.programs["cut"](live, written, jnp.asarray(ends_B))
        return live, written, int(left)

    def _rollout(self, prompts: PromptBatch, written: decode.Written) -> Rollout:
        count = self.settings.completions_per_prompt
        longest = int(jnp.max(jnp.sum(written.mask, axis=1)))
        length = bucket_length(longest, self.settings.max_completion_tokens)
        written = jax.tree.map(lambda leaf: leaf[:, :length] if leaf.ndim > 1 else leaf, written)
        tokens_BT = jnp.repeat(prompts.tokens, count, axis=0)
        mask_BT = jnp.repeat(prompts.mask, count, axis=0)
        return Rollout(
            tokens=jnp.concatenate([tokens_BT, written.tokens], axis=1),
            mask=jnp.concatenate([mask_BT, written.mask], axis=1),
            completion_mask=written.mask,
            sampler_log_probs=written.log_probs,
            kept_log_mass=written.kept_log_mass,
            finished=written.finished,
            features=written.features,
        )


def _check_length(policy: Policy, prompt_length: int, budget: int) -> None:
    if prompt_length + budget > policy.max_tokens:
        raise ValueError(
            f"prompts of {prompt_length} tokens and completions of {budget} exceed the model's "
            f"context of {policy.max_tokens}; lower data.max_prompt_tokens or "
            "rollout.max_completion_tokens."
        )
