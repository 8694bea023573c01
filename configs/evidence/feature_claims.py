"""Claims about the similarity of features, and about what R does on other prompts.

Criteria as in `claims`, written before any run.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from ntkrl.configs.evidence.arms import Arm
from ntkrl.configs.evidence.similarity import DEPTH, KINDS, MEAN_SHARE, read_similarities
from ntkrl.configs.evidence.spread import PARTS, QUANTITIES, Spread, read_spreads
from ntkrl.configs.evidence.verdict import Verdict, above, difference, interval_text, number_only
from ntkrl.report import Run, read_arrays, step_files
from ntkrl.study import mean_interval

PLACES = {
    "first_token": "the first tokens of answers to different prompts",
    "within_response": "tokens of an answer",
    "across_responses": "answers to a prompt",
    "across_prompts": "answers to different prompts",
}
ALIKE, APART = 0.5, 0.1
"""Cosines above which features count as alike, and below which as apart."""
SHARES = {"entropy_change_": "change of entropy", "arg_max_change_": "Δ log π of the arg-max token"}


def feature_claims(rl: Arm) -> list[Verdict]:
    """Return the claims on features before RL, and what RL does to them."""
    by_arm = {arm: read_similarities(rl.results, rl.size, arm) for arm in ("base", "rl")}
    listed = []
    for kind in KINDS:
        claim = f"features of {PLACES[kind]} are alike before RL: cosine > {ALIKE}"
        listed.append(above(1, rl.task, claim, _last(by_arm["base"], kind), ALIKE))
        claim = f"without the mean feature those of {PLACES[kind]} are not: cosine < {APART}"
        below = -_last(by_arm["base"], f"centred_{kind}")
        listed.append(_negated(above(1, rl.task, claim, below, -APART), below))
    claim = "the mean feature makes most of R's trace: ‖mean φ‖² over the mean of ‖φ‖² > ½"
    listed.append(above(1, rl.task, claim, _last(by_arm["base"], MEAN_SHARE), 0.5))
    listed += [_by_depth(rl, by_arm, kind) for kind in KINDS]
    listed += _by_position(rl)
    return listed + _on_other_prompts(rl)


def _last(seeds: list[dict[str, list[float]]], name: str) -> np.ndarray:
    """Return a similarity at full depth of each seed; one NaN without any."""
    return np.array([seed[name][-1] for seed in seeds] or [np.nan])


def _negated(verdict: Verdict, values: np.ndarray) -> Verdict:
    """Return a verdict on −values with the interval of the values themselves."""
    interval = mean_interval(-values)
    if interval is None:
        return verdict
    words = f"{interval.value:.3g} [{interval.low:.3g}, {interval.high:.3g}]"
    return verdict._replace(number=f"{words}, p{verdict.number.partition(', p')[2]}")


def _by_depth(rl: Arm, by_arm: dict[str, list[dict[str, list[float]]]], kind: str) -> Verdict:
    """List the cosines by depth, before and after RL; no claim."""
    claim = f"cosine of {PLACES[kind]} by depth, before and after RL"
    if not all(by_arm.values()):
        return number_only(1, rl.task, claim, None)
    ends = (np.mean([seed[kind] for seed in seeds], axis=0) for seeds in by_arm.values())
    layers = [
        f"{depth}: {before:.3g} to {after:.3g}"
        for depth, before, after in zip(by_arm["base"][0][DEPTH], *ends, strict=True)
    ]
    return number_only(1, rl.task, claim, f"layers {'; '.join(layers)}")


def _by_position(rl: Arm) -> Iterator[Verdict]:
    """List R's share of predicted changes on first and on later tokens of answers; no claim."""
    for prefix, words in SHARES.items():
        texts = []
        for place, later in (("first tokens", False), ("later tokens", True)):
            measure = functools.partial(position_share, prefix=prefix, later=later)
            interval = mean_interval(rl.over_seeds(measure))
            if interval is not None:
                texts.append(f"{place} {interval_text(interval)}")
        claim = f"R's share of the predicted {words}, by position in the answer"
        yield number_only(3, rl.task, claim, "; ".join(texts) or None)


def _on_other_prompts(rl: Arm) -> list[Verdict]:
    """Return the claims on what one prompt's gradient does to the answers to other prompts."""
    listed = []
    for quantity, words in QUANTITIES.items():
        before, after = (read_spreads(rl.results, rl.size, arm, quantity) for arm in ("base", "rl"))
        reach = {part: _reach(before, part) for part in PARTS}
        claim = (
            f"a prompt's gradient changes the {words} at other prompts by more than half of its "
            "change at its own (root mean square per token)"
        )
        listed.append(above(3, rl.task, claim, reach["total"], 0.5))
        claim = (
            f"R's change of the {words} at other prompts is a larger part of that at its own than "
            "G's is"
        )
        listed.append(difference(3, rl.task, claim, reach["G"], reach["R"]))
        texts = [
            f"{words}: {interval_text(interval)}"
            for words, seeds, side in (
                ("own prompt", before, "share_own"),
                ("other prompts", before, "share_other"),
                ("own prompt after RL", after, "share_own"),
                ("other prompts after RL", after, "share_other"),
            )
            if (interval := mean_interval(np.array([seed[side] for seed in seeds]))) is not None
        ]
        claim = f"R's share of a gradient's change of the {words}"
        listed.append(number_only(3, rl.task, claim, "; ".join(texts) or None))
    return listed


def _reach(seeds: list[Spread], part: str) -> np.ndarray:
    """Return the root mean square of other prompts over that of the gradient's own, by seed."""
    ratios = [seed[f"{part}_other"] / seed[f"{part}_own"] for seed in seeds]
    return np.sqrt(np.array(ratios or [np.nan]))


def position_share(run: Run, prefix: str, later: bool) -> float:
    """Return R's share of a predicted change over the probe's first or later tokens.

    The share is ⟨Δ_R, Δ⟩/⟨Δ, Δ⟩ over these tokens of all probed steps.

    Args:
      run: of which `probes/` is read.
      prefix: of the arrays, see `probe.prober.PREDICTED`.
      later: the tokens after the first of each answer, else the first.
    """
    arrays = read_arrays(run.path / "probes" / "set.npz")
    if arrays is None:
        return float("nan")
    _, column_O = np.nonzero(arrays["completion_mask"])
    chosen_O = (column_O > 0) == later
    products = squares = 0.0
    for _, path in step_files(run.path / "probes", ".npz"):
        step = read_arrays(path) or {}
        parts = {
            name: values.astype(float)[chosen_O]
            for name, values in step.items()
            if name.startswith(prefix) and values.size == chosen_O.size
        }
        if f"{prefix}head" in parts:
            total = np.sum(list(parts.values()), axis=0)
            products += parts[f"{prefix}head"] @ total
            squares += total @ total
    return products / squares if squares else float("nan")
