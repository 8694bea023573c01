"""Objective, stages, optimizers and the train step: pure functions of arrays."""

from ntkrl.update.loss import (
    Measures,
    kl_estimate,
    policy_loss,
    policy_terms,
    preference_loss,
    preference_loss_fn,
    supervised_loss,
    supervised_terms,
)
from ntkrl.update.objective import CHOICES, Objective, describe
from ntkrl.update.optimizers import steps_taken
from ntkrl.update.presets import FORMULAS, PRESETS
from ntkrl.update.settings import (
    Progress,
    ScheduleSettings,
    advance,
    due,
    enter_stage,
    read_stages,
    steps_left,
)
from ntkrl.update.stages import (
    Stage,
    StageProgram,
    check_stages,
    stage_program,
    stage_programs,
)
from ntkrl.update.token_weights import (
    correction_weights,
    counted_tokens,
    covariance_weights,
    equal_groups,
    filter_sign,
    reward_penalties,
)
from ntkrl.update.train_step import (
    Gradients,
    LossFn,
    StepResult,
    init_state,
    make_step,
    make_step_with_term_gradients,
    offloaded,
    policy_loss_fn,
    transfer_state,
)

__all__ = [
    "CHOICES",
    "FORMULAS",
    "PRESETS",
    "Gradients",
    "LossFn",
    "Measures",
    "Objective",
    "Progress",
    "ScheduleSettings",
    "Stage",
    "StageProgram",
    "StepResult",
    "advance",
    "check_stages",
    "correction_weights",
    "counted_tokens",
    "covariance_weights",
    "describe",
    "due",
    "enter_stage",
    "equal_groups",
    "filter_sign",
    "init_state",
    "kl_estimate",
    "make_step",
    "make_step_with_term_gradients",
    "offloaded",
    "policy_loss",
    "policy_loss_fn",
    "policy_terms",
    "preference_loss",
    "preference_loss_fn",
    "read_stages",
    "reward_penalties",
    "stage_program",
    "stage_programs",
    "steps_left",
    "steps_taken",
    "supervised_loss",
    "supervised_terms",
    "transfer_state",
]
