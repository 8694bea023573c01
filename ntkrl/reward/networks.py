"""Reward models as reward functions: texts by their own tokenizer and template, in batches.

A conversation goes through the chat template; a plain prompt and its completion are joined as they
are, or, for a model that reads turns (a gate), put in a user's and an assistant's turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ntkrl import runtime
from ntkrl.numerics import bucket_length
from ntkrl.reward.checks import RewardError, listed
from ntkrl.types import Params, Scorer


class NetworkReward:
    """A reward model under the contract of reward functions.

    Further outputs of the model (attributes) go to `log_extra` row by row and to `log_metric` as
    means, under their own names.
    """

    def __init__(
        self,
        scorer: Scorer,
        params: Params,
        tokenizer: Any,
        mesh: Mesh,
        batch_size: int = 16,
    ):
        """Check what can be known without a text.

        Args:
          scorer, params: from `models.load_scorer`, params on `mesh`.
          tokenizer: the model's own.
          mesh: of all devices; rows are spread over it.
          batch_size: texts scored at a time.

        Raises:
          ValueError: a tokenizer with more entries than the model's vocabulary, or one without
            chat template where the model reads turns.
        """
        if len(tokenizer) > scorer.vocab_size:
            raise ValueError(
                f"reward model {scorer.source}: its tokenizer has {len(tokenizer)} entries, the "
                f"model's vocabulary {scorer.vocab_size}; use the tokenizer it was trained with."
            )
        if scorer.gate and tokenizer.chat_template is None:
            raise ValueError(
                f"reward model {scorer.source} reads turns of a conversation, but its tokenizer "
                "has no chat template; put chat_template.jinja into the directory."
            )
        self.scorer, self.params, self.tokenizer, self.mesh = scorer, params, tokenizer, mesh
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        self.batch_size = -(-batch_size // rows) * rows
        self.score = jax.jit(scorer.score)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        log_extra: Callable[[str, list[float]], None],
        log_metric: Callable[[str, float], None],
    ) -> list[float]:
        """Return one score per completion.

        Raises:
          RewardError: texts that are too long for the model, or whose turn cannot be found.
        """
        pairs = list(zip(prompts, completions, strict=True))
        texts = [self._texts(prompt, completion) for prompt, completion in pairs]
        ids = self._ids([whole for _, whole in texts])
        gates = self._gates([start for start, _ in texts])
        found: dict[str, list[float]] = {name: [] for name in self.scorer.names}
        for first in range(0, len(ids), self.batch_size):
            rows = slice(first, first + self.batch_size)
            for name, values in self._batch(ids[rows], gates[rows]).items():
                found[name] += values.tolist()
        for name in self.scorer.names[1:]:
            log_extra(name, found[name])
            log_metric(name, float(np.mean(found[name])))
        return found["score"]

    def _texts(self, prompt: Any, completion: Any) -> tuple[str, str]:
        """Return the text up to the completion, and the whole."""
        if isinstance(prompt, str):
            if not self.scorer.gate:
                return prompt, prompt + completion
            prompt = [{"role": "user", "content": prompt}]
            completion = [{"role": "assistant", "content": completion}]
        elif self.tokenizer.chat_template is None:
            raise RewardError(
                f"reward model {self.scorer.source}: prompts are lists of messages, but its "
                "tokenizer has no chat template; put chat_template.jinja into the directory."
            )
        write = self.tokenizer.apply_chat_template
        start = write(prompt, add_generation_prompt=True, tokenize=False)
        return start, write([*prompt, *completion], tokenize=False)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        ids = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        limit = self.scorer.max_tokens
        wrong = [
            f"row {row} has {len(one)} tokens, {texts[row]!r:.60}"
            for row, one in enumerate(ids)
            if not 1 <= len(one) <= limit
        ]
        if wrong:
            raise RewardError(
                f"reward model {self.scorer.source} reads texts of 1 to {limit} tokens"
                f"{listed(wrong)}\nLower data.max_prompt_tokens or rollout.max_completion_tokens."
            )
        return ids

    def _gates(self, starts: list[str]) -> list[int]:
        """Return where the gate reads: found before the completion is there, so it cannot move."""
        gate = list(self.scorer.gate)
        if not gate:
            return [0] * len(starts)
        found = []
        for ids in self.tokenizer(starts, add_special_tokens=False, verbose=False)["input_ids"]:
            places = [i for i in range(len(ids)) if ids[i : i + len(gate)] == gate]
            found.append(places[-1] if places else -1)
        lost = [f"row {row}, {starts[row]!r:.60}" for row, at in enumerate(found) if at < 0]
        if lost:
            raise RewardError(
                f"reward model {self.scorer.source}: its chat template writes no start of the "
                f"assistant's turn (token ids {gate}){listed(lost)}\nUse the template it was "
                "trained with."
            )
        return found

    def _batch(self, ids: list[list[int]], gates: list[int]) -> dict[str, np.ndarray]:
        length = bucket_length(max(map(len, ids)), self.scorer.max_tokens)
        tokens = np.full((self.batch_size, length), self.scorer.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        mask[len(ids) :, 0] = True  # rows that fill the batch are read and dropped
        for row, one in enumerate(ids):
            tokens[row, : len(one)], mask[row, : len(one)] = one, True
        at = np.zeros(self.batch_size, np.int32)
        at[: len(gates)] = gates
        placed = runtime.place_rows((tokens, mask, at), self.mesh)
        scores = runtime.fetch(self.score(self.params, *placed))
        return {name: np.asarray(values)[: len(ids)] for name, values in scores.items()}
