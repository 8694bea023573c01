"""The RL objective as independent settings.

advantage × ratio × clip × aggregation × KL estimator and place × entropy × rollout correction ×
overlong completions × groups without signal. Formulas are in loss.py (per token), credit.py
(factors of tokens), ntkrl/advantage.py and, for named algorithms, presets.py.
"""

import dataclasses
import math

from ntkrl.messages import not_among

CHOICES: dict[str, tuple[str, ...]] = {
    "advantage": (
        "none",
        "batch_mean",
        "leave_one_out",
        "group_mean",
        "group_normalised",
        "batch_scaled",
        "max_likelihood",
        "pass_at_k",
        "reward_to_go",
    ),
    "ratio_level": ("token", "sequence", "sequence_mean", "none"),
    "clip": ("min", "detach", "none"),
    "aggregation": ("token_mean", "sequence_mean", "sequence_sum", "constant"),
    "kl_estimator": ("k1", "k2", "k3", "full"),
    "kl_place": ("reward", "loss", "off"),
    "covariance": ("off", "clip", "kl"),
    "correction": ("off", "truncate", "mask"),
    "correction_level": ("token", "sequence"),
    "overlong": ("keep", "mask"),
    "group_filter": ("off", "drop", "resample"),
    "signs": ("both", "positive", "negative"),
}


UNGROUPED = ("none", "batch_mean", "reward_to_go")
"""Estimators that do not compare the completions of a prompt."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """One combination of the settings.

    advantage: estimator in ntkrl.advantage.
    pass_k: k of advantage "pass_at_k".
    ratio_level: ρ = π/π_old per "token"; "sequence": their product over the completion;
      "sequence_mean": its 1/length-th power; "none": no ratio, the surrogate is A log π.
    clip: "min": min(ρA, clip(ρ)A); "detach": clip(ρ) A log π with the ratio held constant; "none".
    clip_low, clip_high: the ratio is clipped to [1 − clip_low, 1 + clip_high]; in (0, 1] and > 0.
    dual_clip: c > 1 + clip_high, bound on the ratio for negative advantages; None for no bound.
    aggregation: "token_mean": over all tokens; "sequence_mean": over completions of the mean over
      their tokens; "sequence_sum": over completions of their sum; "constant": the sum over
      tokens, divided by completions × the completion budget.
    kl_estimator: estimator of KL(π‖π_ref) per token: k1 = log π − log π_ref, k2 = k1²/2,
      k3 = e^(−k1) − 1 + k1, "full" over the vocabulary.
    kl_place: "reward" (summed over the completion, no gradient), "loss" (per token) or "off".
    kl_coefficient: β ≥ 0; with 0 the reference policy is not evaluated.
    entropy_coefficient: ≥ 0, on H(π) per token, full vocabulary.
    covariance: treatment of tokens by cov(log π, A) over the batch: "clip" excludes a random
      fraction of those in covariance_range from the gradient; "kl" penalises the largest
      fraction; "off".
    covariance_fraction: share of the batch's tokens, in (0, 1).
    covariance_range: lowest and highest covariance that "clip" picks from.
    covariance_penalty: ≥ 0, coefficient of |log π − log π_old| under "kl".
    correction: weight w = π_old(trainer)/μ(sampler) on the surrogate: "truncate" to at most
      correction_cap, "mask" 0 where w > correction_cap, or "off".
    correction_level: w per "token", or their product per "sequence".
    correction_cap: > 0.
    overlong: completions cut by the budget: "keep", or "mask" them out of the loss.
    group_filter: groups of equal rewards: "off", "drop" them from the loss, or "resample" other
      prompts to replace them.
    signs: signs of the advantages to learn from: "both", or only "positive" or "negative", the
      others being set to 0 (Zhu et al. 2506.01347).
    entropy_budget: ε ≥ 0 (nats): each step's samples get the weights nearest to one with which the
      predicted change of the entropy is above −ε (see attribution.entropy_budget); None for none.
    """

    advantage: str = "leave_one_out"
    pass_k: int = 2
    ratio_level: str = "token"
    clip: str = "min"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    aggregation: str = "token_mean"
    kl_estimator: str = "k3"
    kl_place: str = "off"
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0
    covariance: str = "off"
    covariance_fraction: float = 2e-4
    covariance_range: tuple[float, float] = (1.0, 5.0)
    covariance_penalty: float = 1.0
    correction: str = "off"
    correction_level: str = "token"
    correction_cap: float = 2.0
    overlong: str = "keep"
    group_filter: str = "off"
    signs: str = "both"
    entropy_budget: float | None = None

    def __post_init__(self):
        problems = [
            not_among(name, getattr(self, name), allowed)
            for name, allowed in CHOICES.items()
            if getattr(self, name) not in allowed
        ]
        problems += self._ranges() + self._conflicts()
        if problems:
            raise ValueError("objective: " + "; ".join(problems) + ".")

    def _ranges(self) -> list[str]:
        low, high = self.clip_low, self.clip_high
        first, last = self.covariance_range
        at_least = {
            "pass_k": 1,
            "kl_coefficient": 0,
            "entropy_coefficient": 0,
            "covariance_penalty": 0,
        }
        rules = [
            (getattr(self, name) >= least, f"{name} ≥ {least}, not {getattr(self, name)}")
            for name, least in at_least.items()
        ]
        share = self.covariance_fraction
        rules += [
            (getattr(self, name) < math.inf, f"a finite {name}, not {getattr(self, name)}")
            for name in ("kl_coefficient", "entropy_coefficient", "covariance_penalty")
        ]
        rules += [
            (0 < low <= 1 and high > 0, f"clip_low in (0, 1] and clip_high > 0, not {low}, {high}"),
            (0 < share < 1, f"covariance_fraction in (0, 1), not {share}"),
            (first < last, f"covariance_range increasing, not {first}, {last}"),
            (
                self.entropy_budget is None or 0 <= self.entropy_budget < math.inf,
                f"entropy_budget finite and ≥ 0, not {self.entropy_budget}",
            ),
            (self.correction_cap > 0, f"correction_cap > 0, not {self.correction_cap}"),
            (
                self.dual_clip is None or self.dual_clip > 1 + high,
                f"dual_clip > 1 + clip_high = {1 + high}, not {self.dual_clip}",
            ),
        ]
        return [f"needs {text}" for holds, text in rules if not holds]

    def _conflicts(self) -> list[str]:
        """List conflicting settings, and settings that would silently have no effect."""
        ratio, place = self.ratio_level, self.kl_place
        rules = (
            (
                ratio == "none" and self.clip != "none",
                f"ratio_level none has no ratio to clip: set clip none, not {self.clip}",
            ),
            (
                self.clip != "min" and self.dual_clip is not None,
                f"dual_clip bounds the ratio of clip min, not of clip {self.clip}",
            ),
            (
                place == "off" and self.kl_coefficient > 0,
                f"kl_coefficient {self.kl_coefficient} has no effect with kl_place off: set "
                "kl_place reward or loss, or kl_coefficient 0",
            ),
            (
                self.advantage == "reward_to_go"
                and (place, self.kl_estimator) == ("reward", "full"),
                "advantage reward_to_go takes kl_estimator k1, k2 or k3 in the reward, not full",
            ),
            (
                self.covariance != "off" and ratio == "none",
                "covariance compares with the policy that sampled and needs a ratio_level",
            ),
            (
                self.covariance == "kl" and self.entropy_budget is not None,
                "entropy_budget weighs advantages, and covariance kl adds a term that it does not "
                "weigh: leave one of them out",
            ),
            (
                self.advantage in UNGROUPED and self.group_filter != "off",
                f"group_filter {self.group_filter} needs an advantage within groups; equal rewards "
                f"carry signal under advantage {self.advantage}",
            ),
        )
        return [text for broken, text in rules if broken]

    @property
    def needs_reference(self) -> bool:
        """True if the reference policy has to be evaluated."""
        return self.kl_place != "off" and self.kl_coefficient > 0

    @property
    def needs_distribution(self) -> bool:
        """True if the reference's full distribution is needed, beyond the tokens' log-probs."""
        return self.needs_reference and self.kl_estimator == "full"


def describe(objective: Objective) -> str:
    """Return a line of the main settings, and of all others that differ from the defaults."""
    main = ("advantage", "ratio_level", "clip", "aggregation", "kl_place")
    defaults = dataclasses.asdict(Objective())
    return " · ".join(
        f"{name} {value}"
        for name, value in dataclasses.asdict(objective).items()
        if name in main or value != defaults[name]
    )
