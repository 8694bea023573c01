"""The metric glossary: TRL's names where TRL has one, ours otherwise.

`GLOSSARY` and `FAMILIES` map every name in `metrics.jsonl` to its unit and meaning; other names are
refused. Dashboards also get `TIMINGS` and other libraries' names of the same quantities.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

_PLACEHOLDER = re.compile("<[a-z]+>")

GLOSSARY: dict[str, tuple[str, str]] = {
    "step": ("steps", "optimizer steps taken, all stages together"),
    "rollout_step": ("steps", "batches of prompts sampled so far"),
    "stage": ("name", "the stage the step belongs to"),
    "num_tokens": ("tokens", "prompt and completion tokens seen so far"),
    "learning_rate": (
        "rate",
        "of the last optimizer step, of the stage's first trained row",
    ),
    # training batch
    "reward": ("reward", "mean reward of the step's completions, before any KL term"),
    "reward_std": ("reward", "standard deviation over all completions of the step (unbiased)"),
    "reward_group_std": (
        "reward",
        "the same within groups, mean (TRL's reward_std until 0.26)",
    ),
    "frac_reward_zero_std": ("fraction", "groups whose completions all got the same reward"),
    "entropy": ("nats", "token mean of H(π) over completions, full vocabulary"),
    "confidence": ("probability", "token mean of max π over completions"),
    "kl": ("nats", "token mean of KL(π‖π_ref) by objective.kl_estimator"),
    "policy_loss": ("loss", "the minimised objective"),
    "loss": ("nats", "token mean of −log π on completions (supervised training)"),
    "packing/fill": ("fraction", "columns of packed rows that hold a token (supervised training)"),
    "grad_norm": ("norm", "global norm of the gradient over trained leaves, before clipping"),
    "clip_ratio/low_mean": ("fraction", "tokens with A < 0 whose ratio is below the clip range"),
    "clip_ratio/high_mean": ("fraction", "tokens with A > 0 whose ratio is above the clip range"),
    "clip_ratio/region_mean": ("fraction", "tokens that either side clips"),
    "clip_ratio/low_min": ("fraction", "smallest clip_ratio/low_mean of the optimizer steps"),
    "clip_ratio/high_max": ("fraction", "largest clip_ratio/high_mean of the optimizer steps"),
    "skipped_updates": ("count", "minibatches without a token of non-zero weight, left out"),
    "resampling_rounds": (
        "count",
        "further batches of prompts, for groups of equal rewards",
    ),
    "completions/mean_length": ("tokens", "mean completion length, end-of-sequence included"),
    "completions/min_length": ("tokens", "length of the shortest completion"),
    "completions/max_length": ("tokens", "length of the longest completion"),
    "completions/mean_terminated_length": ("tokens", "mean length of those that were not cut"),
    "completions/min_terminated_length": ("tokens", "length of the shortest of them"),
    "completions/max_terminated_length": ("tokens", "length of the longest of them"),
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
    "eval/win_rate": ("fraction", "pairs whose reward is larger than eval.base's, half if equal"),
    "eval/reward_difference": ("reward", "eval/reward less that of eval.base, same prompts"),
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
    "probe/greedy_log_prob": ("nats", "mean log max π on the probe set's tokens"),
    "probe/sum_squares": ("probability", "mean Σ_v π_v² on the probe set's tokens"),
    "probe/advantage_covariance": ("nats × reward", "token mean of (log π − mean)(A − mean)"),
    "probe/advantage_covariance_top": ("nats × reward", "its mean over the largest 2e-4 of tokens"),
    "probe/squeeze_sampled": ("nats", "mean Δ log π(y) in one step, tokens with A < 0"),
    "probe/squeeze_greedy": ("nats", "mean Δ log π of the token likeliest before, A < 0"),
    "probe/squeeze_others": ("nats", "mean Δ log of the mass of all other tokens, A < 0"),
    "probe/kl_to_start": ("nats", "token mean of KL(π_t‖π_0) on the probe set"),
    "probe/kl_from_start": ("nats", "token mean of KL(π_0‖π_t) on the probe set"),
    "probe/total_variation": ("probability", "token mean of ½ Σ_v |π_t − π_0| on the probe set"),
    "probe/cosine_variance_within_response": ("cosine²", "variance of the cosines of that mean"),
    "probe/cosine_variance_across_responses": ("cosine²", "variance of the cosines of that mean"),
    "probe/cosine_variance_across_prompts": ("cosine²", "variance of the cosines of that mean"),
    "probe/feature_distortion_relative": ("ratio", "mean ‖φ_t − φ_0‖/‖φ_0‖ on the probe set"),
    "probe/feature_cosine_start": ("cosine", "mean cosine of φ_t and φ_0"),
    "probe/feature_norm_ratio": ("ratio", "mean ‖φ_t‖/‖φ_0‖"),
    "probe/ches": ("norm²", "mean ⟨Σφ⁺, Σφ⁻⟩ − ‖Σφ⁺‖², best and worst completion of a prompt by A"),
    "probe/ches_normalised": ("norm²", "the same of means over tokens"),
    "probe/head_sum_positive": (
        "nats/rate",
        "mean Σ_u A_u gᵀR(o, u)g_u over u of the same prompt with A_u > 0, at tokens o with A > 0",
    ),
    "probe/head_sum_negative": ("nats/rate", "the same over u with A_u < 0 (minus both: GWHES)"),
    "probe/head_sum_wrong": ("nats/rate", "mean Σ_u gᵀR(o, u)g_u, A_u > 0, at o with A < 0 (NTHR)"),
    "probe/linearity": (
        "fraction",
        "mean R² of lines through the tokens' log π at all probes so far",
    ),
    "probe/linearity_pooled": ("fraction", "variance of all tokens that such lines explain"),
    "probe/head_row_norm": ("norm", "mean norm of the rows of W"),
    "probe/head_row_norm_max": ("norm", "largest norm of a row of W"),
    "probe/head_stable_rank": ("directions", "‖W‖_F²/‖W‖_2²"),
    "probe/head_distance_stable_rank": ("directions", "the same of W − W_0"),
    "probe/body_to_head": ("ratio", "tr G/tr R over the probe contexts"),
    "probe/laziness_head": ("ratio", "‖R_t − R_0‖_F/‖R_0‖_F"),
    "probe/laziness_body": ("ratio", "the same of tr G(o, u)"),
    "probe/cka_head": ("cosine", "centred alignment of R_t and R_0"),
    "probe/cka_body": ("cosine", "the same of tr G(o, u)"),
    "probe/advantage_alignment": ("ratio", "aᵀKa/(tr K ‖a‖²), a the stacked A (e_y − π)"),
    # diversity of one policy's samples, and support against another's
    "diversity/self_bleu": ("score", "mean BLEU of a completion against the prompt's others"),
    "diversity/distinct_answers": (
        "count",
        "distinct final answers per prompt (complete texts if unmarked)",
    ),
    "diversity/answer_entropy": ("nats", "entropy of the final answers of a prompt, plug-in"),
    "diversity/crossing_k": (
        "samples",
        "k from which eval.base's pass@k lies above; null: nowhere",
    ),
    "diversity/support_kept": (
        "answers",
        "correct answers sampled by eval.base and the policy",
    ),
    "diversity/support_lost": ("answers", "correct answers sampled by eval.base only"),
    "diversity/support_gained": ("answers", "correct answers sampled by the policy only"),
    "diversity/support_neither": ("answers", "correct answers sampled by neither"),
    "diversity/support_retention": ("fraction", "kept/(kept + lost)"),
    "diversity/support_discovery": ("fraction", "gained/(kept + gained)"),
    "diversity/support_score": ("fraction", "harmonic mean of retention and discovery"),
    "diversity/support_change": ("ratio", "(gained − lost)/(kept + lost + gained)"),
    # parameters over steps and checkpoints
    "weights/bf16_visible": ("fraction", "entries whose bfloat16 rounding differs from θ_0's"),
    "weights/unchanged": ("fraction", "entries with |θ_t − θ_0| ≤ 1e-5"),
    "weights/direction_cosine": ("cosine", "weights/<leaf>/direction_cosine, mean over leaves"),
    "weights/linearity": ("fraction", "mean R² of a line through each of 4096 entries"),
    "weights/linearity_pooled": ("fraction", "variance of these entries that such lines explain"),
    # gradient signal of a batch
    "signal/reward_variance": ("reward²", "mean over prompts of the variance of its rewards"),
    "signal/mean_square": ("norm²", "‖mean g‖² of per-sample gradients, before clipping"),
    "signal/noise": ("norm²", "tr Cov(g) of them"),
    "signal/signal_to_noise": ("ratio", "‖mean g‖²/tr Cov(g)"),
    "signal/noise_scale": ("samples", "tr Cov(g)/‖E g‖², the denominator unbiased"),
    "signal/entropy_share": (
        "share",
        "of the policy gradient on the top 20 % of tokens by entropy",
    ),
    # predicted and actual change of the probe tokens' log-probs in one optimizer step
    "predict/head_share": ("share", "⟨Δ_R, Δ⟩/⟨Δ, Δ⟩, Δ the predicted change; R part"),
    "predict/body_share": ("share", "the same for the G part; shares add up to 1"),
    "predict/cross_share": ("share", "the same for the cross part of a tied head"),
    "predict/relative_error": ("ratio", "‖actual − predicted‖ / ‖actual‖ over probe tokens"),
    "predict/correlation": ("correlation", "between predicted and actual change over probe tokens"),
}

# the step ledger: contribution of each part of one optimizer step to the probe tokens' change
_LEDGER = {
    "policy": "the policy term of all samples",
    "likelihood": "the likelihood of all examples (supervised training)",
    "kl": "the KL of all samples, in the loss or, where advantages are linear in it, in the reward "
    "(else, as under group_normalised, in policy)",
    "bonus": "the entropy bonus of all samples",
    "momentum": "the optimizer state before the step",
    "decay": "weight decay",
    "optimizer": "remainder of no other column; rounding, unless the optimizer is not linear",
    "curvature": "terms beyond first order",
    "head": "all terms of the samples, through the head's role (R)",
    "body": "all terms of the samples, through the features (G)",
    "positive": "all terms of samples with A > 0",
    "negative": "all terms of samples with A < 0",
    "self": "all terms of samples that answer the probe token's own prompt",
    "others": "all terms of samples that answer other prompts",
}
for _part, _meaning in _LEDGER.items():
    GLOSSARY[f"ledger/{_part}_share"] = ("share", f"⟨Δ_part, Δ⟩/⟨Δ, Δ⟩, Δ measured; {_meaning}")
    GLOSSARY[f"ledger/{_part}_entropy"] = ("nats", f"mean ΔH of probe tokens; {_meaning}")
GLOSSARY |= {
    "ledger/actual_entropy": ("nats", "mean measured ΔH of probe tokens in the step"),
    "ledger/optimizer_size": ("ratio", "‖Δ_optimizer‖ / ‖Δ‖ over probe tokens' log-probs"),
    "ledger/curvature_size": ("ratio", "‖Δ_curvature‖ / ‖Δ‖ over probe tokens' log-probs"),
}

# names with a placeholder: reward functions, their logged values, parts, parameters
FAMILIES: dict[str, tuple[str, str]] = {
    "rewards/<fn>/mean": ("reward", "mean of a reward function where it applies, unweighted"),
    "rewards/<fn>/std": ("reward", "standard deviation over the same completions (unbiased)"),
    "rewards/<fn>/failures": ("calls", "its failed calls, counted as reward.on_failure"),
    "logged/<name>": ("any", "mean of the values reward functions passed to log_metric"),
    "probe/entropy_change/<part>": ("nats", "mean −Cov(log π, Δz) of a part of the change Δz"),
    "probe/<family>/log_prob": ("nats", "mean log π of the probe tokens of a family"),
    "probe/<family>/entropy": ("nats", "mean H(π) on the probe tokens of a family"),
    "probe/<family>/confidence": ("probability", "mean max π on the probe tokens of a family"),
    "probe/layer_share/<group>": ("share", "of a group of parameters in tr K"),
    "diversity/distinct_<n>": ("fraction", "distinct n-grams of words among those of a prompt"),
    "diversity/pass@<k>": ("fraction", "unbiased estimate that one of k samples succeeds"),
    "diversity/best_of_<n>": ("reward", "unbiased estimate of the largest of n rewards"),
    "diversity/gap_best_of_<n>": ("reward", "the same less that of eval.base, same prompts"),
    "eval/<metric>_low": ("as metric", "lower end of its 95 % interval, bootstrap over prompts"),
    "eval/<metric>_high": ("as metric", "upper end of it"),
    "diversity/<metric>_low": ("as metric", "lower end of its 95 % interval, over prompts"),
    "diversity/<metric>_high": ("as metric", "upper end of it"),
    "weights/<leaf>/change_norm": ("norm", "‖ΔW‖_F since the start"),
    "weights/<leaf>/stable_rank": ("directions", "‖ΔW‖_F²/‖ΔW‖_2²"),
    "weights/<leaf>/effective_rank": ("directions", "(Σσ²)²/Σσ⁴ of ΔW"),
    "weights/<leaf>/leading_energy": ("fraction", "σ₁²/Σσ² of ΔW"),
    "weights/<leaf>/direction_cosine": ("cosine", "of the leading directions of successive ΔW"),
}

# for dashboards only; a run directory has them in timings.jsonl
TIMINGS: dict[str, tuple[str, str]] = {
    "timings/sample_seconds": ("seconds", "drawing the completions of a rollout step"),
    "timings/reward_seconds": ("seconds", "computing their rewards"),
    "timings/update_seconds": ("seconds", "its optimizer steps"),
    "timings/<activity>_seconds": ("seconds", "any other activity, such as eval"),
    "step_time": ("seconds", "the rollout step without probes and evaluations"),
}
NOT_TRAINING = ("probe_seconds", "look_seconds", "eval_seconds")

_SHARED_WITH_TRL = (
    *("num_tokens", "reward", "reward_std", "frac_reward_zero_std", "entropy", "kl", "grad_norm"),
    *("rewards/<fn>/mean", "rewards/<fn>/std", "step_time", "accuracy", "margin", "mean_reward"),
    *(f"clip_ratio/{side}_mean" for side in ("low", "high", "region")),
    *(f"completions/{which}_length" for which in ("mean", "min", "max")),
    *(f"completions/{which}_terminated_length" for which in ("mean", "min", "max")),
    *("completions/clipped_ratio", "learning_rate"),
    *(f"sampling/sampling_logp_difference/{which}" for which in ("mean", "max")),
    *(f"sampling/importance_sampling_ratio/{which}" for which in ("min", "max")),
)

ALIASES: dict[str, dict[str, str]] = {
    # TRL ≥ 0.27, whose callbacks for W&B and TensorBoard put train/ before every name
    "trl": {name: f"train/{name}" for name in _SHARED_WITH_TRL}
    | {
        "step": "train/global_step",
        "loss": "train/loss",
        "policy_loss": "train/loss",
        "preference_loss": "train/loss",
        "logged/<name>": "train/<name>",
    },
    # the RLOOTrainer of TRL 0.12
    "trl012": {
        "step": "train/global_step",
        "reward": "train/objective/scores",
        "policy_loss": "train/loss/policy_avg",
    },
    "verl": {
        "rollout_step": "training/global_step",
        "reward": "critic/score/mean",
        "entropy": "actor/entropy",
        "grad_norm": "actor/grad_norm",
        "learning_rate": "actor/lr",
        "clip_ratio/region_mean": "actor/pg_clipfrac",
        "completions/mean_length": "response_length/mean",
        "completions/min_length": "response_length/min",
        "completions/max_length": "response_length/max",
        "timings/sample_seconds": "timing_s/gen",
        "timings/reward_seconds": "timing_s/reward",
        "timings/update_seconds": "timing_s/update_actor",
    },
}
"""Our name → the name of the same quantity in another library (at its defaults)."""

DIFFERENT: dict[str, dict[str, str]] = {
    "trl": {
        "train/clip_ratio/low_min": "smallest over completions, not over optimizer steps",
        "train/clip_ratio/high_max": "largest over completions, not over optimizer steps",
        "train/sampling/importance_sampling_ratio/mean": "over completions, by default",
    },
    "trl012": {
        "train/objective/kl": "Σ_t (log π − log π_ref), mean over completions; kl is per token",
        "train/objective/entropy": "−Σ_t log π of the sampled tokens, mean over completions",
        "train/objective/rlhf_reward": "the reward less the KL penalty; reward is before it",
        "train/policy/entropy_avg": "H(π) on padding too; entropy is over completion tokens",
        "train/policy/clipfrac_avg": "over completions; clip_ratio/region_mean is over tokens",
    },
    "verl": {
        "critic/rewards/mean": "the reward less the KL penalty; reward is before it",
        "actor/pg_loss": "without KL and entropy terms; policy_loss is what was minimised",
        "actor/kl_loss": "clamped at 10 nats a token; kl is not",
        "response_length/clip_ratio": "counts completions that end exactly at the budget too",
    },
}
"""Other libraries' names of quantities that we do not measure, or measure differently."""


COLUMNS = ("metric", "unit", "meaning", "elsewhere")


class GlossaryEntry(NamedTuple):
    """One metric; elsewhere: (library, its name there) for each library that measures the same."""

    name: str
    unit: str
    meaning: str
    elsewhere: tuple[tuple[str, str], ...]


def entries() -> list[GlossaryEntry]:
    """Return every metric; families and timings last."""
    return [
        GlossaryEntry(
            name,
            unit,
            meaning,
            tuple((style, table[name]) for style, table in ALIASES.items() if name in table),
        )
        for name, (unit, meaning) in (GLOSSARY | FAMILIES | TIMINGS).items()
    ]


def format_glossary() -> str:
    """Return the glossary as Markdown, followed by the names in DIFFERENT."""
    lines = [_markdown(*COLUMNS), "|---" * len(COLUMNS) + "|"]
    for entry in entries():
        elsewhere = ", ".join(f"{style} `{name}`" for style, name in entry.elsewhere)
        lines.append(_markdown(f"`{entry.name}`", entry.unit, entry.meaning, elsewhere))
    lines += ["", "Names of other libraries that stand for something else:", ""]
    lines += [_markdown("library", "name", "stands for"), "|---|---|---|"]
    for style, table in DIFFERENT.items():
        lines += [_markdown(style, f"`{name}`", meaning) for name, meaning in table.items()]
    return "\n".join(lines)


def is_known(name: str) -> bool:
    """Tell whether `name` is in the glossary or in one of the families."""
    return name in GLOSSARY or any(_match(family, name) is not None for family in FAMILIES)


def aliased(style: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that another library measures too, under its names.

    Args:
      style: a key of ALIASES.
      values: by our names, "step" and timings included.
    """
    renamed = {}
    for ours, theirs in ALIASES[style].items():
        for name, value in values.items():
            word = _match(ours, name)
            if word is not None:
                renamed[_PLACEHOLDER.sub(lambda _, word=word: word, theirs)] = value
    return renamed


def _match(pattern: str, name: str) -> str | None:
    """Return the text at the pattern's placeholder ("" without one), None if names differ."""
    match = re.fullmatch(_PLACEHOLDER.sub("(.+)", re.escape(pattern)), name)
    return None if match is None else "".join(match.groups())


def _markdown(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
