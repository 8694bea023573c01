"""Named algorithms as settings of an Objective; each docstring states the formula.

Throughout: completions i of B, tokens t of |o_i|, Σ over counted tokens; ρ_it = π/π_old of a
token; k1 = log π − log π_ref and k3 = e^(−k1) − 1 + k1; [·] clips to [1 − ε_low, 1 + ε_high].
"""

from ntkrl.update.objective import Objective


def reinforce() -> Objective:
    """Minimise −1/B Σ_i A_i Σ_t log π(o_it), A_i = r_i − mean of the batch.

    Source: Williams 1992 with a batch-mean baseline; no ratio, no clip, no KL term. For no
    baseline set advantage none.
    """
    return Objective(
        advantage="batch_mean", ratio_level="none", clip="none", aggregation="sequence_sum"
    )


def reinforce_pp() -> Objective:
    """Minimise −1/Σ|o_i| Σ_it min(ρ_it A_it, [ρ_it] A_it), A normalised over the batch's tokens.

    A_it = (G_it − mean G)/std G with G_it = r_i − β Σ_{s≥t} k1_is; β = 0.01, ε = 0.2.

    Source: Hu et al. 2501.03262 (REINFORCE++), eqs. 4 to 7.
    """
    return Objective(
        advantage="reward_to_go", kl_estimator="k1", kl_place="reward", kl_coefficient=0.01
    )


def rloo() -> Objective:
    """Minimise −1/B Σ_i min(ρ_i A_i, [ρ_i] A_i) with the ratio of sequences.

    ρ_i = Π_t ρ_it; A_i = R_i − mean of the other completions' R, R_i = r_i − β Σ_t k1_it without a
    gradient; β = 0.05, ε = 0.2.

    Source: Ahmadian et al. 2402.14740, eq. 8, with the ratio and clip of TRL's RLOOTrainer.
    """
    return Objective(
        ratio_level="sequence",
        aggregation="sequence_mean",
        kl_estimator="k1",
        kl_place="reward",
        kl_coefficient=0.05,
    )


def rloo_trl012() -> Objective:
    """Minimise what `rloo` does: the formula of TRL 0.12's RLOOTrainer is the same.

    That trainer's other settings are outside the objective: 2 completions per prompt, 2
    minibatches, metric names (`objective/kl` …), as in the recipe of Tomihari 2601.04670.

    Source: TRL 0.12.1, trl/trainer/rloo_trainer.py.
    """
    return rloo()


def ppo_clip() -> Objective:
    """Minimise −1/Σ|o_i| Σ_it min(ρ_it A_i, [ρ_it] A_i), A_i = r_i − mean of the batch; ε = 0.2.

    PPO's surrogate without a critic: the batch mean is the baseline.

    Source: Schulman et al. 1707.06347, eq. 7.
    """
    return Objective(advantage="batch_mean")


def grpo() -> Objective:
    """Minimise 1/B Σ_i 1/|o_i| Σ_t (−min(ρ_it A_i, [ρ_it] A_i) + β k3_it).

    A_i = (r_i − group mean)/(group std + 1e-4); β = 0.04, ε = 0.2.

    Source: Shao et al. 2402.03300, eq. 3; their β.
    """
    return Objective(
        advantage="group_normalised",
        aggregation="sequence_mean",
        kl_place="loss",
        kl_coefficient=0.04,
    )


def dr_grpo() -> Objective:
    """Minimise −1/(B L) Σ_it min(ρ_it A_i, [ρ_it] A_i), L the completion budget.

    A_i = r_i − group mean, not divided by its std; no KL term; ε = 0.2.

    Source: Liu et al. 2503.20783, section 3.
    """
    return Objective(advantage="group_mean", aggregation="constant")


def dapo() -> Objective:
    """Minimise −1/Σ|o_i| Σ_it min(ρ_it A_i, [ρ_it] A_i), ε_low = 0.2, ε_high = 0.28.

    A_i as in GRPO, no KL term; completions cut by the budget do not count, and groups of equal
    rewards are sampled anew from other prompts. The soft penalty on length is the reward
    `soft_overlong`.

    Source: Yu et al. 2503.14476, eqs. 8 to 12.
    """
    return Objective(
        advantage="group_normalised", clip_high=0.28, overlong="mask", group_filter="resample"
    )


def gspo() -> Objective:
    """Minimise −1/B Σ_i min(s_i A_i, [s_i] A_i), s_i = (Π_t ρ_it)^(1/|o_i|).

    A_i as in GRPO; ε_low = 3e-4, ε_high = 4e-4; no KL term.

    Source: Zheng et al. 2507.18071, eqs. 5 to 7 and section 5.1.
    """
    return Objective(
        advantage="group_normalised",
        ratio_level="sequence_mean",
        clip_low=3e-4,
        clip_high=4e-4,
        aggregation="sequence_mean",
    )


def cispo() -> Objective:
    """Minimise −1/Σ|o_i| Σ_it sg(min(ρ_it, 1 + ε_high)) A_i log π(o_it), sg holds constant.

    A_i as in GRPO; no lower clip, 1 + ε_high = 5 as TRL recommends; no KL term.

    Source: MiniMax 2506.13585, eqs. 4 and 5.
    """
    return Objective(advantage="group_normalised", clip="detach", clip_low=1.0, clip_high=4.0)


_ALGORITHMS = (
    *(reinforce, reinforce_pp, rloo, rloo_trl012, ppo_clip),
    *(grpo, dr_grpo, dapo, gspo, cispo),
)
PRESETS: dict[str, Objective] = {make.__name__: make() for make in _ALGORITHMS}
FORMULAS: dict[str, str] = {make.__name__: make.__doc__ or "" for make in _ALGORITHMS}
