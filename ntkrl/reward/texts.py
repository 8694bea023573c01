"""Prompts and completions as a reward model reads them: by its own tokenizer and template.

A conversation goes through the chat template; a plain prompt and its completion are joined as they
are, or, for a model that reads turns (a gate), put in a user's and an assistant's turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ntkrl.numerics import bucket_length
from ntkrl.reward.checks import RewardError, listed
from ntkrl.types import Scorer


class Texts:
    """The words of a reward model."""

    def __init__(self, scorer: Scorer, tokenizer: Any):
        """Check what can be known without a text.

        Args:
          scorer: the reward model.
          tokenizer: its own.

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
        self.scorer, self.tokenizer = scorer, tokenizer

    def encode(
        self, prompts: Sequence[Any], completions: Sequence[Any]
    ) -> tuple[list[list[int]], list[int]]:
        """Return token ids of each prompt with its completion, and where its gate reads.

        Raises:
          RewardError: texts that are too long for the model, or whose turn cannot be found.
        """
        pairs = zip(prompts, completions, strict=True)
        texts = [self._texts(prompt, completion) for prompt, completion in pairs]
        return self._ids([whole for _, whole in texts]), self._gates([s for s, _ in texts])

    def padded(self, ids: Sequence[Sequence[int]], rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and mask `[rows, T]`, padded on the right to one of few lengths."""
        length = bucket_length(max(map(len, ids)), self.scorer.max_tokens)
        tokens = np.full((rows, length), self.scorer.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        mask[len(ids) :, 0] = True  # rows that fill the batch are read and dropped
        for row, one in enumerate(ids):
            tokens[row, : len(one)], mask[row, : len(one)] = one, True
        return tokens, mask

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
