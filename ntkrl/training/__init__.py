"""The training loop and its batch sources, train state, checkpoints, probes and programs."""

from ntkrl.training.abstract_run import AbstractRun, device_bytes
from ntkrl.training.analysed_step import CompletedStep, StepReading, StepSnapshot
from ntkrl.training.batch_sources import BatchSource, StepBatches, StepContext
from ntkrl.training.probe_hook import ProbeHook
from ntkrl.training.programs import (
    GENERATION,
    PARTS,
    PROBE,
    SCORING,
    UPDATE,
    Program,
    peak_bytes,
    resident_bytes,
    run_programs,
)
from ntkrl.training.rollout_source import BATCH_SOURCES, RolloutSource
from ntkrl.training.run import open_steps, train
from ntkrl.training.step_functions import RunPosition, StepFunctions
