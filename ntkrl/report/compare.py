"""Methods against each other, seed by seed: paired differences with intervals and tests."""

from __future__ import annotations

import html
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ntkrl.intervals import Paired, paired_difference
from ntkrl.report.runs import Run, by_name, series
from ntkrl.report.table import number

METRICS = {
    "eval/reward": "held-out reward",
    "eval/pass@1": "pass@1",
    "eval/pass@k": "pass@k",
    "eval/distinct_solutions": "distinct solutions",
    "eval/distinct_completions": "distinct texts",
    "diversity/answer_entropy": "entropy of answers, nats",
    "diversity/self_bleu": "self-BLEU",
    "entropy": "entropy on own samples, nats",
    "probe/entropy": "entropy on the probe set, nats",
    "confidence": "confidence on own samples",
    "probe/confidence": "confidence on the probe set",
}
"""What is compared, in words."""
DRAWS = 4096
"""Resamples; sign patterns are all taken up to 12 seeds."""


class Comparison(NamedTuple):
    """Two methods in one metric.

    first, second: names of the methods.
    metric: its name.
    seeds: how many seeds both have with a value.
    found: difference second − first over the seeds, None below two seeds.
    """

    first: str
    second: str
    metric: str
    seeds: int
    found: Paired | None


def comparisons(runs: Sequence[Run]) -> list[Comparison]:
    """Compare every two methods in every metric that both have.

    A seed's two values are those of the last step, after the start, that both of its runs have.

    Args:
      runs: any runs; a seed that a method has twice is no pair and left out.

    Returns:
      The comparisons, by methods, then in the order of METRICS.
    """
    found = []
    for (first, one), (second, other) in itertools.combinations(by_name(runs).items(), 2):
        pairs = list(zip(*_paired(one, other), strict=True))
        for metric in METRICS:
            if not all(any(series(run, metric)[0].size for run in group) for group in (one, other)):
                continue
            values = [_last(a, b, metric) for a, b in pairs]
            values = [pair for pair in values if all(map(math.isfinite, pair))]
            test = None
            if len(values) > 1:
                test = paired_difference(*np.array(values).T, draws=DRAWS)
            found.append(Comparison(first, second, metric, len(values), test))
    return found


def _paired(one: Sequence[Run], other: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Return the runs of the seeds that both have once."""
    counts = [Counter(run.seed for run in group) for group in (one, other)]
    seeds = {seed for seed in counts[0] if counts[0][seed] == counts[1][seed] == 1}
    chosen = ([run for run in group if run.seed in seeds] for group in (one, other))
    return tuple(sorted(group, key=lambda run: run.seed) for group in chosen)


def _last(a: Run, b: Run, metric: str) -> tuple[float, float]:
    """Return the values at the last common step after the start, NaN where there is none."""
    (steps_a, values_a), (steps_b, values_b) = series(a, metric), series(b, metric)
    common = np.intersect1d(steps_a[steps_a > 0], steps_b)
    if not common.size:
        return math.nan, math.nan
    return float(values_a[steps_a == common[-1]][0]), float(values_b[steps_b == common[-1]][0])


def caveats(found: Sequence[Comparison]) -> list[str]:
    """Say what a reader of the comparisons must know, in sentences."""
    tested = [one for one in found if one.found is not None]
    notes = []
    for pair in dict.fromkeys((one.first, one.second) for one in found):
        seeds = [one.seeds for one in found if (one.first, one.second) == pair]
        if max(seeds) < 2:
            count = f"{max(seeds)} seed{'s' if max(seeds) != 1 else ''}"
            notes.append(
                f"{pair[1]} and {pair[0]}: too few seeds, {count} in common; a test needs two or "
                "more, and says something from six on."
            )
    if tested:
        notes.append(
            "Difference: mean over seeds of second − first at the last step both have; 95 % "
            "bootstrap over seeds, too narrow with few. p: chance of a mean as far from 0 if every "
            "seed's sign were a fair coin's (paired, two-sided); n seeds give no less than 2/2^n, "
            f"so five or fewer never reach 0.05. It is not corrected for there being {len(tested)} "
            "of these tests."
        )
    return notes


def cells(one: Comparison) -> tuple[str, ...]:
    """Write a tested comparison: pair, metric, seeds, difference, interval, p."""
    told = one.found
    return (
        f"{one.second} − {one.first}",
        METRICS[one.metric],
        str(one.seeds),
        _signed(told.difference),
        f"{_signed(told.low)} to {_signed(told.high)}",
        f"{told.p_value:.2g}" + ("" if told.exact else " (drawn)"),
    )


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + number(value)


HEADS = ("methods", "metric", "seeds", "difference", "95 % interval", "p")


def comparison_section(runs: Sequence[Run]) -> str:
    """Return the comparisons as a section of the page, "" for a single method."""
    found = comparisons(runs)
    if not found:
        return ""
    rows = []
    for one in found:
        if one.found is not None:
            first, *rest = map(html.escape, cells(one))
            row = "".join(f"<td>{cell}</td>" for cell in rest)
            rows.append(f'<tr><th scope="row">{first}</th>{row}</tr>')
    heads = "".join(f'<th scope="col">{head}</th>' for head in HEADS)
    table = (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{heads}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>\n"
    )
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in caveats(found))
    return (
        f"<section><h2>Methods seed by seed</h2>\n{table if rows else ''}"
        f'<div class="small">{notes}</div></section>'
    )
