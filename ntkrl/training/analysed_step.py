"""Optimizer steps that are analysed: their beginning, their end and what was read of them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from ntkrl import update
from ntkrl.softmax import OutputHead
from ntkrl.types import TrainState, UpdateBatch


@dataclasses.dataclass(frozen=True, eq=False)
class StepSnapshot:
    """The beginning of an optimizer step that is analysed.

    before: copies of what the step began with; opt_state is None unless a ledger is made.
    batch: its minibatch, in host memory.
    reference: head of the reference policy that its loss compares with, or None.
    stage: number of the stage.
    kl_shares: see `update.kl_shares`; None where a ledger has the KL's part as a term of its own.
    weight_metrics: of the weights in its batch, see `SampleWeights`; empty without a budget.
    """

    before: TrainState
    batch: UpdateBatch
    reference: OutputHead | None
    stage: int
    kl_shares: np.ndarray | None
    weight_metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def with_ledger(self) -> bool:
        """True if a ledger of the step is made."""
        return self.before.opt_state is not None


@dataclasses.dataclass(frozen=True, eq=False)
class CompletedStep:
    """An optimizer step that is analysed.

    start: its beginning. after: the state it ended with. term_gradients: see update.StepResult.
    """

    start: StepSnapshot
    after: TrainState
    term_gradients: update.Gradients | None


@dataclasses.dataclass(frozen=True, eq=False)
class StepReading:
    """The probe set before and after an optimizer step.

    step: the step, its batch at full length. placed: the batch on the mesh.
    metrics: the `predict/…`, `probe/…`, `signal/…` and `weights/…` metrics.
    arrays: content of `probes/step_*.npz`. entropy: `[O]` change of entropy (nats).
    """

    step: CompletedStep
    placed: UpdateBatch
    metrics: dict[str, float]
    arrays: dict[str, np.ndarray]
    entropy: np.ndarray

    @property
    def name(self) -> str:
        """Name of the step's files."""
        return f"step_{int(self.step.after.step):06d}"
