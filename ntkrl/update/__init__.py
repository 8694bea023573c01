"""Objective, stages, optimizer assembly and the train step: pure functions of arrays."""

from ntkrl.update.loss import Measures, kl_estimate, policy_loss, supervised_loss
from ntkrl.update.objective import CHOICES, Objective, describe
from ntkrl.update.optimizers import steps_taken
from ntkrl.update.preference import preference_loss, preference_loss_fn
from ntkrl.update.presets import FORMULAS, PRESETS
from ntkrl.update.settings import ScheduleSettings, due, read_stages
from ntkrl.update.stages import (
    Stage,
    StageProgram,
    check_stages,
    stage_program,
    stage_programs,
)
from ntkrl.update.step import (
    Gradients,
    LossFn,
    init_state,
    make_step,
    make_step_apart,
    offloaded,
    policy_loss_fn,
    transfer_state,
)
from ntkrl.update.stopping import Progress, advance, enter_stage, steps_left
from ntkrl.update.terms import policy_terms, supervised_terms
from ntkrl.update.token_weights import (
    correction_weights,
    counted_tokens,
    covariance_weights,
    equal_groups,
    filter_sign,
    reward_penalties,
)

__all__ = [
    "CHOICES",
    "FORMULAS",
    "Gradients",
    "PRESETS",
    "LossFn",
    "Measures",
    "Objective",
    "Progress",
    "ScheduleSettings",
    "Stage",
    "StageProgram",
    "correction_weights",
    "counted_tokens",
    "covariance_weights",
    "describe",
    "due",
    "equal_groups",
    "advance",
    "check_stages",
    "enter_stage",
    "init_state",
    "kl_estimate",
    "make_step",
    "make_step_apart",
    "read_stages",
    "reward_penalties",
    "transfer_state",
    "filter_sign",
    "offloaded",
    "policy_loss",
    "policy_loss_fn",
    "policy_terms",
    "preference_loss",
    "preference_loss_fn",
    "stage_program",
    "stage_programs",
    "steps_left",
    "steps_taken",
    "supervised_loss",
    "supervised_terms",
]
