"""The paper's claims, each with a number, an interval over seeds and a verdict.

What a verdict takes was written before any run of the study: `holds` where the whole interval is
on the claimed side and, for a difference or a value above a limit, p ≤ 0.05; `partly` where only
the mean is; else `does not hold`. Intervals are 95 %, bootstrap over seeds, and too narrow for so
few; p-values are those of all sign flips over seeds, which six seeds let sink to 0.03.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ntkrl.evaluation import powers
from ntkrl.intervals import Interval, Paired
from ntkrl.study import results as found
from ntkrl.study.results import Results
from ntkrl.study.similarity import read_similarities

LEVEL = 0.05
EDGES = (found.first, found.last)
HOLDS, PARTLY, FAILS, UNKNOWN = "holds", "partly", "does not hold", "not run"


class Verdict(NamedTuple):
    """A claim and what came of it.

    question: 1 to 6, of the study.
    task: which runs it was tested on.
    claim: in words.
    number: what was measured, in words, with its interval.
    verdict: one of `holds`, `partly`, `does not hold`, `not run`; "" for a number without claim.
    """

    question: int
    task: str
    claim: str
    number: str
    verdict: str


def verdicts(results: Results) -> list[Verdict]:
    """Return every claim's verdict, by question."""
    listed = []
    for size in results.study.sizes:
        arms = results.study.arms[size]
        pairs = [("rl", "cfrl")] + ([("rlhf", "rlhf_first")] if "rlhf" in arms else [])
        for plain, first in pairs:
            listed += _of_pair(results, size, plain, first)
        listed += [claim(results, size) for arm, claim in OF_ARMS if arm in arms]
        for row in COMPARED:
            if set(row.arms) <= set(arms):
                given = row.arms, row.measure, row.sign
                listed.append(
                    _versus(row.question, f"{size}, {row.task}", row.claim, results, size, *given)
                )
    return sorted(listed, key=lambda one: one.question)


def _of_pair(results: Results, size: str, plain: str, first: str) -> list[Verdict]:
    """Return the claims about RL, and about RL with the classifier first, on one task."""
    task = f"{size}, {'learned reward' if plain == 'rlhf' else 'expressions'}"
    start = results.over_seeds(size, plain, found.first("probe/cosine_across_prompts"))
    listed = [
        _above(1, task, "features of other prompts are alike before RL: cosine > 0.5", start, 0.5),
        _moved(1, task, "how far RL moves that cosine", results, size, plain),
    ]
    for name, words, sign in (
        ("probe/confidence", "confidence (max π) rises under RL", 1),
        ("probe/entropy", "entropy (nats) falls under RL", -1),
        (_diversity(plain), "distinct answers of a prompt's samples become fewer", -1),
    ):
        values = results.over_seeds(size, plain, found.change(name))
        listed.append(_above(3, task, words, sign * values, 0.0, shown=values))
    shares = results.over_seeds(size, plain, found.head_part)
    listed.append(_above(3, task, "R makes most of the change of entropy: share > ½", shares, 0.5))
    listed += _against(results, size, plain, first, task)
    for name, words, sign in (
        ("probe/feature_distortion_relative", "less feature distortion than RL", -1),
        ("probe/head_norm", "a larger classifier norm than RL", 1),
    ):
        claim = f"LP-FT's account: classifier first gives {words}"
        listed.append(
            _versus(5, task, claim, results, size, (plain, first), found.last(name), sign)
        )
    return listed


def _diversity(arm: str) -> str:
    return "diversity/distinct_answers" if arm.startswith("rlhf") else "eval/distinct_completions"


def _against(results: Results, size: str, plain: str, first: str, task: str) -> list[Verdict]:
    """Compare classifier first with RL in reward, at equal rollouts and at equal time."""
    arms, listed = (plain, first), []
    if plain == "rlhf":
        pair = [results.told(size, arm, "eval/reward", "true") for arm in arms]
        claim = "classifier first reaches more true reward, equal rollouts"
        return [_difference(4, task, claim, *pair)]
    for words, measure in (
        ("held-out reward at the end, equal rollouts", found.last("eval/reward")),
        ("area under the held-out reward, equal rollouts", found.area),
    ):
        claim = f"classifier first reaches more {words}"
        listed.append(_versus(4, task, claim, results, size, arms, measure, 1))
    both = [[results.run(size, arm, seed) for seed in results.study.seeds] for arm in arms]
    timed = [_at_equal_time(*pair) for pair in zip(*both, strict=True)]
    claim = "classifier first reaches more held-out reward, equal training time"
    listed.append(_difference(4, task, claim, *np.array(timed, float).T))
    claim = "classifier first ends with more confidence than RL"
    listed.append(_versus(4, task, claim, results, size, arms, found.last("probe/confidence"), 1))
    return listed


def _at_equal_time(one: object, other: object) -> tuple[float, float]:
    """Return both rewards after the time that the faster run took."""
    if one is None or other is None:
        return math.nan, math.nan
    limit = min(found.seconds(run, math.inf) for run in (one, other))
    return found.reward_at(one, limit), found.reward_at(other, limit)


def _slope(results: Results, size: str, arm: str) -> np.ndarray:
    """Return of each seed the slope of log relative error in log rate `[seeds]`."""
    rates, rows = np.log(results.study.sgd_rates), []
    for number in range(len(rates)):
        name = f"{arm}_{number}"
        rows.append(results.over_seeds(size, name, found.mean_of("predict/relative_error")))
    errors = np.log(np.array(rows))
    return np.array([np.polyfit(rates, column, 1)[0] for column in errors.T])


def sgd(results: Results, size: str) -> Verdict:
    """First order: the relative error of the prediction grows as the rate, slope 1 ± 0.2."""
    claim = "error of the first-order prediction ∝ rate (SGD): slope 1 ± 0.2"
    return _within(2, size, claim, _slope(results, size, "sgd"), 0.8, 1.2)


def sgd_head(results: Results, size: str) -> Verdict:
    """The same where the head moves alone and logits are linear in it."""
    claim = "the same with the head alone, whose logits are exactly linear"
    return _within(2, size, claim, _slope(results, size, "sgd_head"), 0.8, 1.2)


def adam(results: Results, size: str) -> Verdict:
    """First order along real Adam steps: correlation above 0.95."""
    values = results.over_seeds(size, "rl", found.mean_of("predict/correlation"))
    error = found.mean_interval(
        results.over_seeds(size, "rl", found.mean_of("predict/relative_error"))
    )
    claim = "a real Adam step does to log π what first order says: correlation > 0.95"
    told = _above(2, f"{size}, expressions", claim, values, 0.95)
    beside = "" if error is None else f"; relative error {_interval(error)}"
    return told._replace(number=told.number + beside)


def lengths(results: Results, size: str) -> Verdict:
    """Held-out reward by length of stage 1; no claim."""
    arms = {"0": "rl", "5 %": "cfrl_short", "25 %": "cfrl", "50 %": "cfrl_long"}
    return _table(results, size, "reward by stage 1's part of the steps", arms)


def objectives(results: Results, size: str) -> Verdict:
    """Held-out reward by objective; no claim."""
    arms = {"RLOO": "rl", "GRPO": "grpo", "REINFORCE": "reinforce"}
    return _table(results, size, "reward by objective", arms)


def gap(results: Results, size: str) -> Verdict:
    """Best of N: what RL is ahead of the base at N = 1 shrinks with N."""
    largest, name = results.study.samples, "diversity/best_of_{}"
    leads = {
        n: results.over_seeds(size, "rl", found.change(name.format(n))) for n in powers(largest)
    }
    claim = f"RL's lead over its base in best-of-N closes from N = 1 to N = {largest}"
    told = _difference(6, f"{size}, expressions", claim, leads[1], leads[largest], -1)
    listed = [f"{n}: {_plain(found.mean_interval(values))}" for n, values in leads.items()]
    ends = (results.over_seeds(size, "rl", at(name.format(largest))) for at in EDGES)
    base, rl = (_plain(found.mean_interval(values)) for values in ends)
    reached = f"at N = {largest} the base reaches {base}, RL {rl}"
    return told._replace(number=f"lead by N: {', '.join(listed)}; {reached}; {told.number}")


def support(results: Results, size: str) -> Verdict:
    """Support: RL loses more right answers than it gains, beyond what sampling again does.

    Before the first step the same model is compared with its own earlier samples: what is lost and
    gained then is chance.
    """

    def surplus(measure: Callable[[str], Callable[[found.Run], float]]) -> np.ndarray:
        lost, gained = (
            results.over_seeds(size, "rl", measure(f"diversity/support_{word}"))
            for word in ("lost", "gained")
        )
        return lost - gained

    claim = "of the right answers among the samples, RL loses more than it gains"
    by_chance, after = surplus(found.first), surplus(found.last)
    told = _difference(6, f"{size}, expressions", claim, by_chance, after)
    words = []
    for word in ("kept", "lost", "gained"):
        name = f"diversity/support_{word}"
        chance, end = (
            _plain(found.mean_interval(results.over_seeds(size, "rl", measure(name))))
            for measure in EDGES
        )
        words.append(f"{word} {end} (by chance {chance})")
    return told._replace(number=f"{', '.join(words)}; lost − gained: {told.number}")


def depths(results: Results, size: str) -> Verdict:
    """Cosines of features of other prompts by depth, before and after RL; no claim."""
    ends = []
    for arm in ("base", "rl"):
        places = [results.study.place(size, arm, seed) for seed in results.study.seeds]
        held = [read_similarities(place / "similarity.json") for place in places]
        rows = [one["across_prompts"] for one in held if one is not None]
        ends.append(np.mean(rows, axis=0) if rows else None)
    claim = "cosine of features of other prompts by depth, before and after RL"
    task = f"{size}, expressions"
    if any(end is None for end in ends):
        return Verdict(1, task, claim, "-", UNKNOWN)
    told = [
        f"{depth}: {before:.3g} to {after:.3g}"
        for depth, (before, after) in enumerate(zip(*ends, strict=True), start=1)
    ]
    return Verdict(1, task, claim, f"layers {'; '.join(told)}", "")


class Versus(NamedTuple):
    """A claim that the second of two arms has more (sign 1) or less (−1) of a measure.

    task: what it was tested on. With sign 0 nothing is claimed.
    """

    question: int
    task: str
    claim: str
    arms: tuple[str, str]
    measure: Callable[[found.Run], float]
    sign: int


TASK, SUPERVISED = "expressions", "supervised"
CONFIDENCE, REWARD = found.change("probe/confidence"), found.last("eval/reward")
DISTORTION = found.last("probe/feature_distortion_relative")
NORM = found.last("probe/head_norm")
COMPARED = (
    Versus(
        *(3, TASK, "with diverse (whitened) features confidence rises less"),
        *(("rl", "whitened"), CONFIDENCE, -1),
    ),
    Versus(
        *(3, TASK, "with diverse features R's share of the predicted Δ log π is smaller"),
        *(("rl", "whitened"), found.mean_of("predict/head_share"), -1),
    ),
    Versus(
        *(3, TASK, "what diverse features do to held-out reward"),
        *(("rl", "whitened"), REWARD, 0),
    ),
    Versus(
        *(3, TASK, "negative advantages alone raise confidence less than positive ones alone"),
        *(("positive", "negative"), CONFIDENCE, -1),
    ),
    Versus(
        *(3, TASK, "what negative instead of positive advantages do to held-out reward"),
        *(("positive", "negative"), REWARD, 0),
    ),
    Versus(
        *(4, TASK, "classifier first reaches more held-out reward, equal full updates"),
        *(("rl", "cfrl_more"), REWARD, 1),
    ),
    Versus(
        *(5, SUPERVISED, "LP-FT itself (supervised control): head first distorts features less"),
        *(("sft", "sft_first"), DISTORTION, -1),
    ),
    Versus(
        *(5, SUPERVISED, "LP-FT itself (supervised control): a larger classifier norm"),
        *(("sft", "sft_first"), NORM, 1),
    ),
)
OF_ARMS: tuple[tuple[str, Callable[[Results, str], Verdict]], ...] = (
    ("rl", depths),
    ("sgd", sgd),
    ("sgd_head", sgd_head),
    ("rl", adam),
    ("cfrl_long", lengths),
    ("grpo", objectives),
    ("rl", gap),
    ("rl", support),
)
"""Claims of other forms, and the arm without which there is none."""


def _above(
    question: int,
    task: str,
    claim: str,
    values: np.ndarray,
    limit: float,
    shown: np.ndarray | None = None,
) -> Verdict:
    """Judge whether the mean lies above a limit."""
    interval = found.mean_interval(values)
    if interval is None:
        return Verdict(question, task, claim, "-", UNKNOWN)
    test = found.paired(np.full_like(values, limit), values)
    chance = 1.0 if test is None else test.p_value
    judged = _judged(interval.value - limit, interval.low - limit, chance)
    told = interval if shown is None else found.mean_interval(shown)
    return Verdict(question, task, claim, f"{_interval(told)}, p = {chance:.2g}", judged)


def _within(
    question: int, size: str, claim: str, values: np.ndarray, low: float, high: float
) -> Verdict:
    """Judge whether the mean lies between two limits."""
    interval = found.mean_interval(values)
    if interval is None:
        return Verdict(question, f"{size}, expressions", claim, "–", UNKNOWN)
    inside = min(interval.value - low, high - interval.value)
    judged = _judged(inside, min(interval.low - low, high - interval.high))
    return Verdict(question, f"{size}, expressions", claim, _interval(interval), judged)


def _versus(
    question: int,
    task: str,
    claim: str,
    results: Results,
    size: str,
    arms: tuple[str, str],
    measure: Callable[[found.Run], float],
    sign: int,
) -> Verdict:
    """Judge whether the second arm has more (sign 1) or less (−1) of a measure; 0: neither."""
    one, other = (results.over_seeds(size, arm, measure) for arm in arms)
    told = _difference(question, task, claim, one, other, sign)
    if told.verdict == UNKNOWN:
        return told
    means = [_plain(found.mean_interval(values)) for values in (one, other)]
    names = " to ".join(f"{arm} {mean}" for arm, mean in zip(arms, means, strict=True))
    return told._replace(number=f"{names}; {told.number}")


def _difference(
    question: int, task: str, claim: str, one: np.ndarray, other: np.ndarray, sign: int = 1
) -> Verdict:
    """Judge whether other − one has a sign."""
    test = found.paired(one, other)
    if test is None:
        return Verdict(question, task, claim, "-", UNKNOWN)
    low = test.low if sign > 0 else -test.high
    judged = _judged(sign * test.difference, low, test.p_value) if sign else ""
    return Verdict(question, task, claim, _paired(test), judged)


def _judged(mean: float, end: float, chance: float = 0.0) -> str:
    if end > 0 and chance <= LEVEL:
        return HOLDS
    return PARTLY if mean > 0 else FAILS


def _moved(question: int, task: str, claim: str, results: Results, size: str, arm: str) -> Verdict:
    values = results.over_seeds(size, arm, found.change("probe/cosine_across_prompts"))
    interval = found.mean_interval(values)
    number = "–" if interval is None else _interval(interval)
    return Verdict(question, task, claim, number, UNKNOWN if interval is None else "")


def _table(results: Results, size: str, claim: str, arms: dict[str, str]) -> Verdict:
    """List the held-out reward of arms, with intervals; no claim is judged."""
    told = {}
    for words, arm in arms.items():
        interval = found.mean_interval(results.over_seeds(size, arm, found.last("eval/reward")))
        told[words] = "–" if interval is None else _interval(interval)
    number = "; ".join(f"{words}: {value}" for words, value in told.items())
    known = any(value != "–" for value in told.values())
    return Verdict(4, f"{size}, expressions", claim, number, "" if known else UNKNOWN)


def _interval(interval: Interval) -> str:
    return f"{interval.value:.3g} [{interval.low:.3g}, {interval.high:.3g}]"


def _plain(interval: Interval | None) -> str:
    return "–" if interval is None else f"{interval.value:.3g}"


def _paired(test: Paired) -> str:
    ends = f"[{test.low:.3g}, {test.high:.3g}]"
    return f"difference {test.difference:+.3g} {ends}, p = {test.p_value:.2g}"
