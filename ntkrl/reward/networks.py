"""Reward models as reward functions: texts read in batches on the mesh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ntkrl import runtime, trees
from ntkrl.reward.texts import Texts
from ntkrl.types import Params, Scorer


def rows_together(batch_size: int, mesh: Mesh) -> int:
    """Return how many texts are read at a time: a batch, filled up to what the mesh divides."""
    parts = trees.row_parts(mesh)
    return -(-batch_size // parts) * parts


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
          ValueError: what `Texts` raises.
        """
        self.texts = Texts(scorer, tokenizer)
        self.scorer, self.params, self.mesh = scorer, params, mesh
        self.batch_size = rows_together(batch_size, mesh)
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
        ids, gates = self.texts.encode(prompts, completions)
        found: dict[str, list[float]] = {name: [] for name in self.scorer.names}
        for first in range(0, len(ids), self.batch_size):
            rows = slice(first, first + self.batch_size)
            for name, values in self._batch(ids[rows], gates[rows]).items():
                found[name] += values.tolist()
        for name in self.scorer.names[1:]:
            log_extra(name, found[name])
            log_metric(name, float(np.mean(found[name])))
        return found["score"]

    def _batch(self, ids: list[list[int]], gates: list[int]) -> dict[str, np.ndarray]:
        tokens, mask = self.texts.padded(ids, self.batch_size)
        at = np.zeros(self.batch_size, np.int32)
        at[: len(gates)] = gates
        placed = runtime.place_rows((tokens, mask, at), self.mesh)
        scores = runtime.fetch(self.score(self.params, *placed))
        return {name: np.asarray(values)[: len(ids)] for name, values in scores.items()}
