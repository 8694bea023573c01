"""Reward models as reward functions: tokenization by their own template, scoring in batches.

Conversations go through the chat template; a text prompt and its completion are concatenated, or,
for a model that reads turns (a gate), become a user's and an assistant's turn.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ntkrl import data, runtime, trees
from ntkrl.messages import listed
from ntkrl.numerics import bucket_length
from ntkrl.reward.contract import RewardError
from ntkrl.types import Params, Scorer


class RewardTexts:
    """Tokenization of prompts and completions for a reward model."""

    def __init__(self, scorer: Scorer, tokenizer: Any):
        """Check the reward model's tokenizer.

        Raises:
          ValueError: a tokenizer with more entries than the model's vocabulary, or without a chat
            template although the model reads turns.
        """
        needed = data.needed_rows(tokenizer)
        if needed > scorer.vocab_size:
            raise ValueError(
                f"reward model {scorer.source}: its tokenizer has {needed} entries, the model's "
                f"vocabulary {scorer.vocab_size}; use the tokenizer it was trained with."
            )
        if scorer.gate and tokenizer.chat_template is None:
            raise ValueError(
                f"reward model {scorer.source} reads turns of a conversation, but its tokenizer "
                "has no chat template; put chat_template.jinja into the directory."
            )
        self.scorer, self.tokenizer = scorer, tokenizer

    def encode(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> tuple[list[list[int]], list[int]]:
        """Return the token ids of each prompt with its completion, and its gate position.

        Args:
          prompts, completions: texts, or lists of messages.
          columns: of the rows, of which a chat template reads some (see ntkrl.data.chat).

        Raises:
          RewardError: texts that are too long for the model, that its chat template rejects, or
            without an assistant's turn.
        """
        pairs = zip(prompts, completions, strict=True)
        if self.scorer.gate or not all(isinstance(prompt, str) for prompt in prompts):
            rendered = self._conversations(list(pairs), columns or {})
            texts = [text for _, text in rendered]
            ids, gates = self._ids(texts), self._gates([start for start, _ in rendered])
        else:
            texts = [prompt + completion for prompt, completion in pairs]
            source = f"reward model {self.scorer.source}"
            try:
                ids, gates = data.encode_texts(self.tokenizer, texts, source), [0] * len(texts)
            except ValueError as error:
                raise RewardError(str(error)) from error
        self._check_lengths(texts, ids)
        return ids, gates

    def pad(self, ids: Sequence[Sequence[int]], rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and mask `[rows, T]`, right-padded to a bucket length."""
        length = bucket_length(max(map(len, ids)), self.scorer.max_tokens)
        shape = (rows, length)
        tokens, mask = data.pad_rows(enumerate(ids), shape, self.scorer.pad_id, left=False)
        mask[len(ids) :, 0] = True  # rows that fill the batch need a token; they are discarded
        return tokens, mask

    def _conversations(
        self, pairs: Sequence[tuple[Any, Any]], columns: Mapping[str, Sequence[Any]]
    ) -> list[tuple[str, str]]:
        """Return each conversation up to the completion, and with it."""
        if self.tokenizer.chat_template is None:
            raise RewardError(
                f"reward model {self.scorer.source}: prompts are lists of messages, but its "
                "tokenizer has no chat template; put chat_template.jinja into the directory."
            )

        before = [_messages(prompt, "user") for prompt, _ in pairs]
        complete = [
            [*start, *_messages(completion, "assistant")]
            for start, (_, completion) in zip(before, pairs, strict=True)
        ]
        source = f"reward model {self.scorer.source}"
        try:
            starts = data.render_prompts(self.tokenizer, before, columns, source)
            texts = data.render_conversations(self.tokenizer, complete, columns, source)
        except ValueError as error:
            raise RewardError(str(error)) from error
        return list(zip(starts, texts, strict=True))

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # a template writes special tokens itself
        try:
            source = f"reward model {self.scorer.source}"
            return data.encode_plain(self.tokenizer, texts, source)
        except ValueError as error:
            raise RewardError(str(error)) from error

    def _check_lengths(self, texts: list[str], ids: list[list[int]]) -> None:
        limit = self.scorer.max_tokens
        wrong = [
            f"row {row} has {len(row_ids)} tokens, {texts[row]!r:.60}"
            for row, row_ids in enumerate(ids)
            if not 1 <= len(row_ids) <= limit
        ]
        if wrong:
            raise RewardError(
                f"reward model {self.scorer.source} reads texts of 1 to {limit} tokens"
                f"{listed(wrong)}\nLower data.max_prompt_tokens or rollout.max_completion_tokens."
            )

    def _gates(self, starts: list[str]) -> list[int]:
        """Return the gate positions, searched before the completion, which cannot move them."""
        gate = list(self.scorer.gate)
        if not gate:
            return [0] * len(starts)
        positions = []
        for ids in self._ids(starts):
            matches = [i for i in range(len(ids)) if ids[i : i + len(gate)] == gate]
            positions.append(matches[-1] if matches else -1)
        missing = [f"row {row}, {starts[row]!r:.60}" for row, at in enumerate(positions) if at < 0]
        if missing:
            raise RewardError(
                f"reward model {self.scorer.source}: its chat template writes no start of the "
                f"assistant's turn (token ids {gate}){listed(missing)}\nUse the template it was "
                "trained with."
            )
        return positions


def _messages(turn: Any, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": turn}] if isinstance(turn, str) else turn


def padded_batch_size(batch_size: int, mesh: Mesh) -> int:
    """Return the batch size rounded up to a multiple of the mesh's row shards."""
    parts = trees.row_parts(mesh)
    return -(-batch_size // parts) * parts


class RewardModel:
    """A reward model under the contract of reward functions.

    Further outputs of the model (attributes) go to `log_extra` by row and to `log_metric` as means,
    under their own names.
    """

    def __init__(
        self,
        scorer: Scorer,
        params: Params,
        tokenizer: Any,
        mesh: Mesh,
        batch_size: int = 16,
    ):
        """Check the tokenizer.

        Args:
          scorer, params: from `models.load_scorer`, params on `mesh`.
          tokenizer: of the reward model.
          mesh: of all devices; rows are sharded over it.
          batch_size: texts scored at a time.

        Raises:
          ValueError: errors of `RewardTexts`.
        """
        self.texts = RewardTexts(scorer, tokenizer)
        self.scorer, self.params, self.mesh = scorer, params, mesh
        self.batch_size = padded_batch_size(batch_size, mesh)
        self.score = jax.jit(scorer.score)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        log_extra: Callable[[str, list[float]], None],
        log_metric: Callable[[str, float], None],
    ) -> list[float]:
        """Return one score per completion; raises RewardError as `RewardTexts.encode`."""
        ids, gates = self.texts.encode(prompts, completions)
        outputs: dict[str, list[float]] = {name: [] for name in self.scorer.names}
        for first in range(0, len(ids), self.batch_size):
            rows = slice(first, first + self.batch_size)
            for name, values in self._score_batch(ids[rows], gates[rows]).items():
                outputs[name] += values.tolist()
        for name in self.scorer.names[1:]:
            log_extra(name, outputs[name])
            log_metric(name, float(np.mean(outputs[name])))
        return outputs["score"]

    def _score_batch(self, ids: list[list[int]], gates: list[int]) -> dict[str, np.ndarray]:
        tokens, mask = self.texts.pad(ids, self.batch_size)
        gates_N = np.zeros(self.batch_size, np.int32)
        gates_N[: len(gates)] = gates
        batch = runtime.place_rows((tokens, mask, gates_N), self.mesh)
        scores = runtime.fetch(self.score(self.params, *batch))
        return {name: np.asarray(values)[: len(ids)] for name, values in scores.items()}
