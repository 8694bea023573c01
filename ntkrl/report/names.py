"""Metric names, one place: TRL's names where TRL has one, ours otherwise.

`GLOSSARY` maps every name in `metrics.jsonl` to its unit and meaning; the loops emit no other.
"""

import re

GLOSSARY: dict[str, tuple[str, str]] = {
    "step": ("steps", "optimizer steps taken, all stages together"),
    "rollout_step": ("steps", "batches of prompts sampled so far"),
    "stage": ("name", "the stage the step belongs to"),
    "num_tokens": ("tokens", "prompt and completion tokens seen so far"),
    # training batch
    "reward": ("reward", "mean reward of the step's completions, before any KL term"),
    "reward_std": ("reward", "mean over prompts of the group's standard deviation (unbiased)"),
    "frac_reward_zero_std": ("fraction", "groups whose completions all got the same reward"),
    "entropy": ("nats", "token mean of H(π) over completions, full vocabulary"),
    "confidence": ("probability", "token mean of max π over completions"),
    "kl": ("nats", "token mean of KL(π‖π_ref) by objective.kl_estimator"),
    "policy_loss": ("loss", "the objective that was minimised"),
    "loss": ("nats", "token mean of −log π on completions (supervised training)"),
    "packing/fill": ("fraction", "columns of packed rows that hold a token (supervised training)"),
    "grad_norm": ("norm", "global norm of the gradient over trained leaves, before clipping"),
    "clip_ratio/low_mean": ("fraction", "tokens with A < 0 whose ratio is below the clip range"),
    "clip_ratio/high_mean": ("fraction", "tokens with A > 0 whose ratio is above the clip range"),
    "clip_ratio/region_mean": ("fraction", "tokens that either side clips"),
    "clip_ratio/low_min": ("fraction", "smallest clip_ratio/low_mean of the optimizer steps"),
    "clip_ratio/high_max": ("fraction", "largest clip_ratio/high_mean of the optimizer steps"),
    "skipped_updates": ("count", "minibatches left out: no token in them had anything to teach"),
    "resampling_rounds": ("count", "further batches of prompts drawn for groups of equal rewards"),
    "completions/mean_length": ("tokens", "mean completion length, end-of-sequence included"),
    "completions/clipped_ratio": ("fraction", "completions cut by the token budget"),
    "sampling/sampling_logp_difference/mean": (
        "nats",
        "mean |log π − log π_old| over tokens of the first minibatch after sampling",
    ),
    "sampling/sampling_logp_difference/max": (
        "nats",
        "largest |log π − log π_old| on the first minibatch after sampling",
    ),
    "sampling/importance_sampling_ratio/min": (
        "ratio",
        "smallest weight π_old(trainer)/μ(sampler) of objective.correction",
    ),
    "sampling/importance_sampling_ratio/mean": ("ratio", "token mean of that weight"),
    "sampling/importance_sampling_ratio/max": ("ratio", "largest such weight"),
    # training a reward model
    "preference_loss": ("loss", "−log σ(r⁺ − r⁻) + λ (r⁺ + r⁻)², mean over pairs"),
    "accuracy": ("fraction", "pairs whose chosen text gets the larger reward"),
    "margin": ("reward", "mean of r⁺ − r⁻ over pairs"),
    "mean_reward": ("reward", "mean of (r⁺ + r⁻) / 2 over pairs"),
    "eval/accuracy": ("fraction", "the same on held-out pairs"),
    "eval/margin": ("reward", "mean of r⁺ − r⁻ on held-out pairs"),
    # held-out evaluation
    "eval/reward": ("reward", "mean reward on held-out prompts"),
    "eval/reward_sd": ("reward", "standard deviation of eval/reward over repeated samplings"),
    "eval/pass@1": ("fraction", "completions that reach the success threshold"),
    "eval/pass@k": ("fraction", "prompts solved by at least one of k samples (k = samples drawn)"),
    "eval/distinct_solutions": (
        "count",
        "distinct successful completions per prompt, of k samples",
    ),
    "eval/distinct_completions": (
        "fraction",
        "distinct completions among the k samples of a prompt",
    ),
    # probe set
    "probe/entropy": ("nats", "mean H(π) on the probe set's tokens"),
    "probe/confidence": ("probability", "mean max π on the probe set's tokens"),
    "probe/log_prob": ("nats", "mean log π of the probe set's tokens"),
    "probe/cosine_within_response": ("cosine", "mean cosine of features, same completion"),
    "probe/cosine_across_responses": ("cosine", "mean cosine, same prompt, other completion"),
    "probe/cosine_across_prompts": ("cosine", "mean cosine of features, other prompts"),
    "probe/positive_pairs": ("fraction", "pairs of positions with positive inner product"),
    "probe/effective_rank": ("directions", "participation ratio of the feature Gram matrix"),
    "probe/feature_distortion": ("norm", "mean ‖φ_t − φ_0‖ on the probe set"),
    "probe/feature_norm": ("norm", "mean ‖φ‖ on the probe set"),
    "probe/head_norm": ("norm", "‖W‖_F"),
    "probe/head_distance": ("norm", "‖W − W_0‖_F"),
    # predicted against actual change of the probe tokens' log-probs in one optimizer step
    "predict/head_share": ("share", "⟨Δ_R, Δ⟩/⟨Δ, Δ⟩, Δ the predicted change; R part"),
    "predict/body_share": ("share", "the same for the G part; shares add up to 1"),
    "predict/cross_share": ("share", "the same for the cross part of a tied head"),
    "predict/relative_error": ("ratio", "‖actual − predicted‖ / ‖actual‖ over probe tokens"),
    "predict/correlation": ("correlation", "between predicted and actual change over probe tokens"),
}

FAMILIES = ("rewards/<fn>/mean", "rewards/<fn>/std", "rewards/<fn>/failures", "logged/<name>")
"""Names that carry a user's own word: one pair per reward function, and whatever it logs."""

_FAMILY = re.compile(r"rewards/.+/(mean|std|failures)|logged/.+")


def is_known(name: str) -> bool:
    """Tell whether `name` is in the glossary or in one of the families."""
    return name in GLOSSARY or _FAMILY.fullmatch(name) is not None
