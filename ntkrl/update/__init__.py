"""Objective, stages, optimizer assembly and the train step: pure functions of arrays."""

from ntkrl.update.loss import Measures, kl_estimate, policy_loss, supervised_loss
from ntkrl.update.objective import CHOICES, Objective, described
from ntkrl.update.optimizers import steps_taken
from ntkrl.update.preference import preference_loss, preference_objective
from ntkrl.update.presets import FORMULAS, PRESETS
from ntkrl.update.settings import PreferenceSettings, ScheduleSettings, due, read_stages
from ntkrl.update.stages import (
    Stage,
    StageProgram,
    check_stages,
    stage_program,
    stage_programs,
)
from ntkrl.update.step import (
    Gradients,
    StepResult,
    init_state,
    make_step,
    make_step_with_term_gradients,
    next_state,
    offloaded,
    policy_objective,
)
from ntkrl.update.stopping import Progress, advanced, entered, steps_left
from ntkrl.update.terms import policy_terms, supervised_terms
from ntkrl.update.weights import (
    correction_weights,
    counted_tokens,
    covariance_weights,
    equal_groups,
    of_signs,
    reward_penalties,
)

__all__ = [
    "CHOICES",
    "FORMULAS",
    "Gradients",
    "PRESETS",
    "Measures",
    "Objective",
    "PreferenceSettings",
    "Progress",
    "ScheduleSettings",
    "Stage",
    "StageProgram",
    "StepResult",
    "correction_weights",
    "counted_tokens",
    "covariance_weights",
    "described",
    "due",
    "equal_groups",
    "advanced",
    "check_stages",
    "entered",
    "init_state",
    "kl_estimate",
    "make_step",
    "make_step_with_term_gradients",
    "read_stages",
    "reward_penalties",
    "next_state",
    "of_signs",
    "offloaded",
    "policy_loss",
    "policy_objective",
    "policy_terms",
    "preference_loss",
    "preference_objective",
    "stage_program",
    "stage_programs",
    "steps_left",
    "steps_taken",
    "supervised_loss",
    "supervised_terms",
]
