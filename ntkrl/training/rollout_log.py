"""The log of a run's completions: `rollouts/` of the run directory, for people and the report.

It reads only what a rollout step has on the host anyway, and is written while the devices work on
the update. Nothing in a run depends on it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from ntkrl import report, runtime
from ntkrl.generate import RewardedRollout
from ntkrl.setup import RunSetup
from ntkrl.training.probe_set import prompt_texts
from ntkrl.training.rollout_step import RolloutStep, WeightedRollout
from ntkrl.types import UpdateBatch


def weighted_rollout(rewarded: RewardedRollout, batch: UpdateBatch) -> WeightedRollout:
    """Return what is logged of a rollout and the batch made of it."""
    drawn = dataclasses.replace(rewarded.rollout, features=None)
    advantages = np.where(batch.completion_mask, batch.advantages, 0)
    log_ratio = None
    if batch.old_log_probs is not drawn.sampler_log_probs:
        log_ratio = np.asarray(batch.old_log_probs) - drawn.sampler_log_probs
    return WeightedRollout(dataclasses.replace(rewarded, rollout=drawn), advantages, log_ratio)


class RolloutLog:
    """Writes the completions of rollout steps, in the process that writes; a context manager."""

    def __init__(self, setup: RunSetup, directory: Path, start: int):
        """Open the files of a run, and remove steps after `start` that it will repeat.

        Raises:
          OSError: a file cannot be written.
        """
        settings = setup.settings
        self.tokenizer, self.group = setup.model.tokenizer, settings.rollout.completions_per_prompt
        self.vocabulary: dict[int, str] = {}
        self.writer: report.RolloutsWriter | None = None
        if not runtime.is_writer():
            return
        limit_mib = settings.logging.rollouts_mib
        if limit_mib is None or not settings.method.samples:
            report.shorten_rollouts(directory, start)
            return
        # steps that a ledger refers to
        pinned_every = settings.probe.ledger_every_steps if settings.probes else None
        self.writer = report.RolloutsWriter(directory, limit_mib, start, pinned_every, runtime.log)

    def __enter__(self) -> RolloutLog:
        return self

    def __exit__(self, *error: object) -> None:
        if self.writer is not None:
            self.writer.close()

    def write(self, step: RolloutStep) -> None:
        """Append the completions of a rollout step, where it has any and is among those kept.

        Raises:
          OSError: a file cannot be written.
        """
        weighted, step.rollouts = step.rollouts, None
        if self.writer is None or weighted is None or not self.writer.keeps(step.rollout_step):
            return
        line = report.encode_rollouts(self._record(step, weighted))
        self.writer.write(step.rollout_step, line)

    def sync(self) -> None:
        """Flush all steps to the disk."""
        if self.writer is not None:
            self.writer.sync()

    def _record(self, step: RolloutStep, weighted: WeightedRollout) -> report.StepRollouts:
        rewarded, drawn = weighted.rewarded, weighted.rewarded.rollout
        mask_BC = np.asarray(drawn.completion_mask)
        length = mask_BC.shape[1]
        firsts_P = np.arange(0, len(rewarded.texts), self.group)
        tokens_n = np.asarray(drawn.tokens)[:, -length:][mask_BC]
        log_ratio = weighted.log_ratio
        return report.StepRollouts(
            rollout_step=step.rollout_step,
            step=step.optimizer_steps,
            stage=step.stage,
            prompts=prompt_texts(
                self.tokenizer, drawn.tokens[firsts_P], drawn.mask[firsts_P], length
            ),
            rows=rewarded.rows[firsts_P],
            texts=rewarded.texts,
            reward=rewarded.result.rewards,
            rewards=rewarded.result.per_function,
            finished=np.asarray(drawn.finished),
            lengths=mask_BC.sum(axis=1),
            tokens=tokens_n,
            vocabulary=self._texts(tokens_n),
            sampler_log_probs=np.asarray(drawn.sampler_log_probs)[mask_BC],
            advantages=weighted.advantages[mask_BC],
            log_ratio=None if log_ratio is None else log_ratio[mask_BC],
            entropy=None if drawn.entropy is None else np.asarray(drawn.entropy)[mask_BC],
        )

    def _texts(self, tokens: np.ndarray) -> dict[int, str]:
        """Return the text of every token among some."""
        ids = np.unique(tokens).tolist()
        for token in ids:
            if token not in self.vocabulary:
                self.vocabulary[token] = token_text(self.tokenizer, token)
        return {token: self.vocabulary[token] for token in ids}


def token_text(tokenizer: Any, token: int) -> str:
    """Return the text that a token adds to others, with the space before a word."""
    single, double = (
        tokenizer.decode([token] * count, clean_up_tokenization_spaces=False) for count in (1, 2)
    )
    # sentencepiece leaves out the space before a text's first word
    return double[len(single) :] if double.startswith(single) else single
