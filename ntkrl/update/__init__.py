"""Objective, stages, optimizers and the train step: pure functions of arrays."""

from ntkrl.update.credit import (
    RolloutArrays,
    TokenWeights,
    advantages,
    kl_shares,
    token_weights,
)
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
    LOG_RATIO_TOLERANCES,
    PreferenceSettings,
    Progress,
    ScheduleSettings,
    advance,
    enter_stage,
    is_due,
    read_stages,
    reopened,
    steps_left,
)
from ntkrl.update.stages import (
    BoundStage,
    Stage,
    bind_stage,
    bind_stages,
    check_stages,
    rate_warnings,
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
