"""Where the batches of a reward model come from: pairs of texts, the chosen one first."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from ntkrl import runtime, update
from ntkrl.reward import RewardTexts
from ntkrl.settings import HEADLINES
from ntkrl.setup.assemble import Prompts, Setup
from ntkrl.training.sources import StepContext, averages, split, step_rows
from ntkrl.types import Params, PreferenceBatch

EVALUATION_ROWS = 32


class PreferenceSource:
    """Preferences → minibatches of pairs, and the accuracy on held-out ones."""

    headline = HEADLINES["reward"]

    def __init__(self, setup: Setup):
        """Read every text once, so that one that is too long stops the run here.

        Raises:
          ValueError: texts that do not fit the model.
        """
        self.setup, self.position = setup, 0
        self.texts = RewardTexts(setup.scorer, setup.tokenizer)
        self.train = self._encoded(setup.train)
        self.held_out = None if setup.held_out is None else self._encoded(setup.held_out)
        centering_coefficient = setup.settings.preference.centering_coefficient
        self.minimised = update.preference_loss_fn(setup.scorer, centering_coefficient)
        self.measured = jax.jit(self.minimised)

    def _encoded(self, prompts: Prompts) -> list[tuple[list[list[int]], list[int]]]:
        """Return token ids and gates of the chosen and of the rejected texts."""
        held = prompts.prompt_set
        return [self.texts.encode(held.prompts, held.columns[n]) for n in ("chosen", "rejected")]

    def _batch(
        self, encoded: list[tuple[list[list[int]], list[int]]], rows: Sequence[int]
    ) -> PreferenceBatch:
        ids = [side[0][row] for row in rows for side in encoded]
        gates = [side[1][row] for row in rows for side in encoded]
        tokens, mask = self.texts.pad(ids, len(ids))
        shape = (len(rows), 2, tokens.shape[1])
        return PreferenceBatch(
            tokens=tokens.reshape(shape),
            mask=mask.reshape(shape),
            gates=np.asarray(gates, np.int32).reshape(len(rows), 2),
        )

    def batches(self, turn: StepContext) -> tuple[list[PreferenceBatch], dict[str, float]]:
        """Return the minibatches of a step as host arrays; neither params nor key are used."""
        batch = self._batch(self.train, step_rows(self.setup, self.position))
        self.position += 1
        turn.clock("data")
        return split(batch, self.setup.settings.schedule.minibatches), {}

    def reference_head(self, turn: StepContext) -> None:
        """No reference policy is compared with."""

    def summary(self, logged: list[dict[str, float]]) -> dict[str, float]:
        """Average the optimizer steps, under the glossary's names."""
        metrics = averages(logged)
        metrics["preference_loss"] = metrics.pop("loss")
        return metrics

    def evaluate(self, params: Params) -> dict[str, float]:
        """Return `eval/accuracy` and `eval/margin` on held-out pairs."""
        if self.held_out is None:
            return {}
        count = min(self.setup.settings.evaluation.prompts, self.setup.held_out.size)
        found = []
        for first in range(0, count, EVALUATION_ROWS):
            rows = range(first, min(first + EVALUATION_ROWS, count))
            placed = runtime.place_rows(self._batch(self.held_out, rows), self.setup.mesh)
            _, measures = runtime.fetch(self.measured(params, placed))
            found.append({name: float(value.total) for name, value in measures.totals.items()})
        return {
            f"eval/{name}": sum(one[name] for one in found) / count
            for name in ("accuracy", "margin")
        }

    def check_first(self, values: dict[str, float], rollout_step: int) -> None:
        """Nothing was sampled, so nothing can disagree."""
