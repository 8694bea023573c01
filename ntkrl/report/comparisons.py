"""Paired comparisons of methods over seeds: differences, intervals and sign-flip tests."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ntkrl.intervals import Paired, paired_difference
from ntkrl.report.runs import Run, by_name, series
from ntkrl.report.tables import Table, signed

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
"""Compared metrics, with their words."""
DRAWS = 4096
"""Bootstrap resamples; up to 12 seeds all sign patterns are taken."""
HEADS = ("methods", "metric", "seeds", "difference", "95 % interval", "p")


class Comparison(NamedTuple):
    """Two methods in one metric.

    first, second: names of the methods.
    metric: its name.
    seeds: number of seeds for which both have a value.
    test: difference second − first over the seeds, None below two seeds.
    """

    first: str
    second: str
    metric: str
    seeds: int
    test: Paired | None


def comparisons(runs: Sequence[Run]) -> list[Comparison]:
    """Compare every two methods in every metric that both have.

    A seed's two values are those of the last step, after the start, that both of its runs have.

    Args:
      runs: any runs; a seed that a method has twice is not paired and left out.

    Returns:
      The comparisons, by methods, then in the order of METRICS.
    """
    results = []
    for (first, a), (second, b) in itertools.combinations(by_name(runs).items(), 2):
        pairs = _pairs(a, b)
        for metric in METRICS:
            if not all(any(series(run, metric)[0].size for run in group) for group in (a, b)):
                continue
            values = [_last_common(*pair, metric) for pair in pairs]
            values = [pair for pair in values if all(map(math.isfinite, pair))]
            test = None
            if len(values) > 1:
                firsts, seconds = np.array(values).T
                test = paired_difference(firsts, seconds, draws=DRAWS)
            results.append(Comparison(first, second, metric, len(values), test))
    return results


def _pairs(first: Sequence[Run], second: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Return the pairs of runs of each seed that both methods have once, by seed."""
    counts = [Counter(run.seed for run in group) for group in (first, second)]
    seeds = sorted(seed for seed in counts[0] if counts[0][seed] == counts[1][seed] == 1)
    by_seed = [{run.seed: run for run in group} for group in (first, second)]
    return [(by_seed[0][seed], by_seed[1][seed]) for seed in seeds]


def _last_common(a: Run, b: Run, metric: str) -> tuple[float, float]:
    """Return the values at the last common step after the start, NaN where there is none."""
    (steps_a, values_a), (steps_b, values_b) = series(a, metric), series(b, metric)
    common = np.intersect1d(steps_a[steps_a > 0], steps_b)
    if not common.size:
        return math.nan, math.nan
    return float(values_a[steps_a == common[-1]][0]), float(values_b[steps_b == common[-1]][0])


def comparison_table(runs: Sequence[Run]) -> Table | None:
    """Return the tested comparisons with notes; None for a single method."""
    results = comparisons(runs)
    if not results:
        return None
    rows: list[tuple[str, ...]] = []
    most_seeds: Counter[tuple[str, str]] = Counter()
    for first, second, metric, seeds, test in results:
        most_seeds[first, second] = max(most_seeds[first, second], seeds)
        if test is None:
            continue
        cells = (
            f"{second} − {first}",
            METRICS[metric],
            str(seeds),
            signed(test.difference),
            f"{signed(test.low)} to {signed(test.high)}",
            f"{test.p_value:.2g}" + ("" if test.exact else " (drawn)"),
        )
        rows.append(cells)
    notes = [
        f"{second} and {first}: too few seeds, {seeds} seed{'' if seeds == 1 else 's'} in common; "
        "a test needs two or more, and says something from six on."
        for (first, second), seeds in most_seeds.items()
        if seeds < 2
    ]
    if rows:
        notes.append(
            "Difference: mean over seeds, at the last step that both methods have; 95 % "
            "bootstrap over seeds, too narrow with few. p: chance of a mean as far from 0 if every "
            "seed's sign were a fair coin's (paired, two-sided); n seeds give no less than 2/2^n, "
            f"so five or fewer never reach 0.05. It is not corrected for there being {len(rows)} "
            "of these tests."
        )
    return Table("Methods seed by seed", HEADS, tuple(rows), tuple(notes))
