"""Objective, stages, optimizer assembly and the train step: pure functions of arrays."""

from ntkrl.update.objective import (
    PRESETS,
    Objective,
    penalised_rewards,
    policy_loss,
    supervised_loss,
)
from ntkrl.update.preference import preference_loss, preference_objective
from ntkrl.update.stages import Stage, StageProgram, stage_program
from ntkrl.update.step import init_state, make_step, policy_objective

__all__ = [
    "PRESETS",
    "Objective",
    "Stage",
    "StageProgram",
    "init_state",
    "make_step",
    "penalised_rewards",
    "policy_loss",
    "policy_objective",
    "preference_loss",
    "preference_objective",
    "stage_program",
    "supervised_loss",
]
