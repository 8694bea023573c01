"""The paper's claims, each with a number, an interval over seeds and a verdict.

The criteria were written before any run of the study: `holds` where the complete interval is on
the claimed side and, for a difference or a value above a limit, p ≤ 0.05; `partly` where only the
mean is; else `does not hold`. Intervals are 95 %, bootstrap over seeds, and too narrow for so few;
p-values are from all sign flips over seeds: with six seeds no less than 0.03.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ntkrl.configs.evidence.arms import Arm, Plan
from ntkrl.configs.evidence.feature_claims import feature_claims
from ntkrl.configs.evidence.list_claims import list_claims
from ntkrl.configs.evidence.verdict import (
    NO_NUMBER,
    UNKNOWN,
    Verdict,
    above,
    difference,
    interval_text,
    mean_text,
    number_only,
    within,
)
from ntkrl.evaluation import powers
from ntkrl.report import Run, read_arrays, step_files
from ntkrl.study import (
    Measure,
    Results,
    area,
    at_time,
    change,
    first,
    last,
    mean_interval,
    mean_of,
    training_seconds,
)

PAIRS = (("rl", "cfrl"), ("rlhf", "rlhf_first"), ("tied_rl", "tied_cfrl"))
"""Arms of RL, and of RL with the classifier first on the same task."""
COSINE = "probe/cosine_across_prompts"
DISTORTION = "probe/feature_distortion_relative"


def verdicts(results: Results, plan: Plan) -> list[Verdict]:
    """Return every claim's verdict, by question."""
    listed = []
    for size in plan.sizes:
        arms = plan.arms[size]
        for plain, classifier_first in PAIRS:
            if plain == "rl" or plain in arms:
                listed += _of_pair(Arm(results, plan, size, plain), classifier_first)
                for name in (plain, classifier_first):
                    listed += list_claims(Arm(results, plan, size, name))
        listed += feature_claims(Arm(results, plan, size, "rl"))
        for name, claims in OF_ARMS:
            if name in arms:
                listed.append(claims(Arm(results, plan, size, name)))
        for question, claim, (plain, other), measure, sign in COMPARED:
            if {plain, other} <= set(arms):
                arm = Arm(results, plan, size, plain)
                listed.append(_versus(question, claim, arm, other, measure, sign))
    return sorted(listed, key=lambda verdict: verdict.question)


def _of_pair(rl: Arm, classifier_first: str) -> list[Verdict]:
    """Return the claims about RL, and about RL with the classifier first, on one task."""
    learned = rl.name == "rlhf"
    diversity = "diversity/distinct_answers" if learned else "eval/distinct_completions"
    start = rl.over_seeds(first(COSINE))
    moved = mean_interval(rl.over_seeds(change(COSINE)))
    claim = "features of other prompts are alike before RL: cosine > 0.5"
    listed = [
        above(1, rl.task, claim, start, 0.5),
        number_only(1, rl.task, "how far RL moves that cosine", moved and interval_text(moved)),
    ]
    for metric, claim, sign in (
        ("probe/confidence", "confidence (max π) rises under RL", 1),
        ("probe/entropy", "entropy (nats) falls under RL", -1),
        (diversity, "distinct answers of a prompt's samples become fewer", -1),
    ):
        values = rl.over_seeds(change(metric))
        verdict = above(3, rl.task, claim, sign * values, 0.0)
        if verdict.verdict != UNKNOWN:
            p_value = verdict.number.partition(", p")[2]
            verdict = verdict._replace(number=f"{interval_text(mean_interval(values))}, p{p_value}")
        listed.append(verdict)
    shares = rl.over_seeds(head_share)
    claim = "R makes most of the change of entropy: share > ½"
    listed.append(above(3, rl.task, claim, shares, 0.5))
    for metric, claim in (
        ("predict/entropy_head_share", "R makes most of a step's predicted change of entropy"),
        ("predict/arg_max_head_share", "R makes most of that of log π of the arg-max token"),
    ):
        listed.append(above(3, rl.task, f"{claim}: share > ½", rl.over_seeds(mean_of(metric)), 0.5))
    listed += (_true_reward if learned else _rewards)(rl, classifier_first)
    for metric, words, sign in (
        (DISTORTION, "less feature distortion than RL", -1),
        ("probe/head_norm", "a larger classifier norm than RL", 1),
    ):
        claim = f"LP-FT's account: classifier first gives {words}"
        listed.append(_versus(5, claim, rl, classifier_first, last(metric), sign))
    return listed


def _true_reward(rl: Arm, classifier_first: str) -> list[Verdict]:
    """Compare classifier first with RL in true reward, where training saw a learned one."""
    arms = (rl.name, classifier_first)
    rewards = [rl.results.evaluated(rl.size, arm, "true", "eval/reward") for arm in arms]
    claim = "classifier first reaches more true reward, equal rollouts"
    return [difference(4, rl.task, claim, *rewards)]


def _rewards(rl: Arm, classifier_first: str) -> list[Verdict]:
    """Compare classifier first with RL in reward, at equal rollouts and at equal time."""
    listed = []
    for words, measure in (
        ("held-out reward at the end, equal rollouts", last("eval/reward")),
        ("area under the held-out reward, equal rollouts", area("eval/reward")),
    ):
        claim = f"classifier first reaches more {words}"
        listed.append(_versus(4, claim, rl, classifier_first, measure, 1))
    runs = (rl.results.runs(rl.size, arm) for arm in (rl.name, classifier_first))
    timed = [_at_equal_time(*pair) for pair in zip(*runs, strict=True)]
    claim = "classifier first reaches more held-out reward, equal training time"
    listed.append(difference(4, rl.task, claim, *np.array(timed, float).T))
    claim = "classifier first ends with more confidence than RL"
    return [*listed, _versus(4, claim, rl, classifier_first, last("probe/confidence"), 1)]


def _at_equal_time(a: Run | None, b: Run | None) -> tuple[float, float]:
    """Return both rewards after the training time of the faster run."""
    if a is None or b is None:
        return math.nan, math.nan
    limit = min(training_seconds(run) for run in (a, b))
    return at_time(a, "eval/reward", limit), at_time(b, "eval/reward", limit)


def head_share(run: Run) -> float:
    """Return R's share of the first-order change of the probe's entropy, NaN without ledgers.

    Every column of a ledger (samples, momentum, decay) has a part of the head's role (R) and of
    the others (G); means over probe tokens, summed over the steps with ledgers (nats).
    """
    head = body = 0.0
    for _, path in step_files(run.path / "ledger", ".npz"):
        for name, values in (read_arrays(path) or {}).items():
            if not name.startswith("entropy/") or name.count("/") != 2:
                continue
            amount = float(np.sum(values) / values.shape[0])
            if name.endswith("/head"):
                head += amount
            else:
                body += amount
    return head / (head + body) if head + body else math.nan


def sgd(arm: Arm) -> Verdict:
    """First order: the relative error of the prediction grows as the rate, slope 1 ± 0.2."""
    claim = "error of the first-order prediction ∝ rate (SGD): slope 1 ± 0.2"
    return within(2, arm.task, claim, _slope(arm), 0.8, 1.2)


def adam_steps(arm: Arm) -> Verdict:
    """The same for one step of Adam, whose direction does not depend on the rate."""
    claim = "error of the first-order prediction ∝ rate (Adam): slope 1 ± 0.2"
    return within(2, arm.task, claim, _slope(arm), 0.8, 1.2)


def sgd_head(arm: Arm) -> Verdict:
    """The same where the head moves alone and logits are linear in it."""
    claim = "the same with the head alone, whose logits are exactly linear"
    return within(2, arm.task, claim, _slope(arm), 0.8, 1.2)


def _slope(arm: Arm) -> np.ndarray:
    """Return of each seed the slope of log relative error in log rate `[seeds]`."""
    rates, measure = np.log(arm.plan.step_rates[arm.name]), mean_of("predict/relative_error")
    names = [f"{arm.name}_{number}" for number in range(len(rates))]
    errors = np.log(np.array([arm.other(name).over_seeds(measure) for name in names]))
    return np.array([np.polyfit(rates, column, 1)[0] for column in errors.T])


def adam(rl: Arm) -> Verdict:
    """First order along real Adam steps: correlation above 0.95."""
    values = rl.over_seeds(mean_of("predict/correlation"))
    error = mean_interval(rl.over_seeds(mean_of("predict/relative_error")))
    claim = "a real Adam step does to log π what first order says: correlation > 0.95"
    verdict = above(2, rl.task, claim, values, 0.95)
    suffix = "" if error is None else f"; relative error {interval_text(error)}"
    return verdict._replace(number=verdict.number + suffix)


def lengths(rl: Arm) -> Verdict:
    """Held-out reward by length of stage 1; no claim."""
    arms = {"0": "rl", "5 %": "cfrl_short", "25 %": "cfrl", "50 %": "cfrl_long"}
    return _rewards_of(rl, "reward by stage 1's part of the steps", arms)


def objectives(rl: Arm) -> Verdict:
    """Held-out reward by objective; no claim."""
    arms = {"RLOO": "rl", "GRPO": "grpo", "REINFORCE": "reinforce"}
    return _rewards_of(rl, "reward by objective", arms)


def gap(rl: Arm) -> Verdict:
    """Best of N: RL's lead over the base at N = 1 shrinks with N."""
    largest, metric = rl.plan.samples, "diversity/best_of_{}"
    leads = {n: rl.over_seeds(change(metric.format(n))) for n in powers(largest)}
    claim = f"RL's lead over its base in best-of-N closes from N = 1 to N = {largest}"
    verdict = difference(6, rl.task, claim, leads[1], leads[largest], -1)
    listed = ", ".join(f"{n}: {mean_text(values)}" for n, values in leads.items())
    base, end = (rl.mean(edge(metric.format(largest))) for edge in (first, last))
    reached = f"at N = {largest} the base reaches {base}, RL {end}"
    return verdict._replace(number=f"lead by N: {listed}; {reached}; {verdict.number}")


def support(rl: Arm) -> Verdict:
    """Support: RL loses more right answers than it gains, beyond sampling noise.

    Before the first step the same model is compared with its own earlier samples: its losses and
    gains are chance.
    """
    lost, gained = "diversity/support_lost", "diversity/support_gained"
    surplus = [rl.over_seeds(edge(lost)) - rl.over_seeds(edge(gained)) for edge in (first, last)]
    claim = "of the right answers among the samples, RL loses more than it gains"
    verdict = difference(6, rl.task, claim, *surplus)
    words = []
    for word in ("kept", "lost", "gained"):
        chance, end = (rl.mean(edge(f"diversity/support_{word}")) for edge in (first, last))
        words.append(f"{word} {end} (by chance {chance})")
    return verdict._replace(number=f"{', '.join(words)}; lost − gained: {verdict.number}")


OF_ARMS: tuple[tuple[str, Callable[[Arm], Verdict]], ...] = (
    ("sgd", sgd),
    ("sgd_head", sgd_head),
    ("adam", adam_steps),
    ("rl", adam),
    ("cfrl_long", lengths),
    ("grpo", objectives),
    ("rl", gap),
    ("rl", support),
)
"""Claims of one arm, and the arm."""
COMPARED: tuple[tuple[int, str, tuple[str, str], Measure, int], ...] = (
    (
        3,
        "with diverse (whitened) features confidence rises less",
        ("rl", "whitened"),
        change("probe/confidence"),
        -1,
    ),
    (
        3,
        "with diverse features R's share of the predicted Δ log π is smaller",
        ("rl", "whitened"),
        mean_of("predict/head_share"),
        -1,
    ),
    (3, "what diverse features do to held-out reward", ("rl", "whitened"), last("eval/reward"), 0),
    (
        3,
        "with the mean feature shrunk confidence rises less",
        ("rl", "shrunk"),
        change("probe/confidence"),
        -1,
    ),
    (
        3,
        "negative advantages alone raise confidence less than positive ones alone",
        ("positive", "negative"),
        change("probe/confidence"),
        -1,
    ),
    (
        3,
        "what negative instead of positive advantages do to held-out reward",
        ("positive", "negative"),
        last("eval/reward"),
        0,
    ),
    (
        4,
        "classifier first reaches more held-out reward, equal full updates",
        ("rl", "cfrl_more"),
        last("eval/reward"),
        1,
    ),
    (
        5,
        "LP-FT itself (supervised control): head first distorts features less",
        ("sft", "sft_first"),
        last(DISTORTION),
        -1,
    ),
    (
        5,
        "LP-FT itself (supervised control): a larger classifier norm",
        ("sft", "sft_first"),
        last("probe/head_norm"),
        1,
    ),
)
"""Claims that the second arm has more (sign 1) or less (−1) of a measure; 0: no claim.

Each is question, claim, arms, measure and sign.
"""


def _versus(
    question: int, claim: str, arm: Arm, other: str, measure: Measure, sign: int
) -> Verdict:
    """Judge whether another arm has more (sign 1) or less (−1) of a measure; 0: neither."""
    values = [arm.over_seeds(measure), arm.other(other).over_seeds(measure)]
    verdict = difference(question, arm.task, claim, *values, sign)
    if verdict.verdict == UNKNOWN:
        return verdict
    words = f"{arm.name} {mean_text(values[0])} to {other} {mean_text(values[1])}"
    return verdict._replace(number=f"{words}; {verdict.number}")


def _rewards_of(arm: Arm, claim: str, arms: dict[str, str]) -> Verdict:
    """List the held-out reward of arms, with intervals; no claim."""
    reward = last("eval/reward")
    intervals = {words: mean_interval(arm.other(n).over_seeds(reward)) for words, n in arms.items()}
    texts = {words: NO_NUMBER if i is None else interval_text(i) for words, i in intervals.items()}
    number = "; ".join(f"{words}: {text}" for words, text in texts.items())
    known = any(interval is not None for interval in intervals.values())
    return Verdict(4, arm.task, claim, number, "" if known else UNKNOWN)
