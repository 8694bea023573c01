"""A report for a terminal: the table, curves in a line each, the last ledger, and notes."""

from __future__ import annotations

import os
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

from ntkrl.report.compare import caveats, cells, comparisons
from ntkrl.report.influence import influence_map, last_by_sample
from ntkrl.report.plotting import coinciding
from ntkrl.report.runs import Run, by_name, comparable, read_runs, series
from ntkrl.report.table import format_table, number
from ntkrl.report.waterfall import QUANTITY, bars, last_ledgers, means

BLOCKS = "▁▂▃▄▅▆▇█"
PLAIN = {**dict(zip(BLOCKS, "_.-=+*%#", strict=True)), "→": ">", "−": "-", "–": "-", "±": "~"}
PLAIN |= {"Δ": "d", "π": "p", "Σ": "S", "…": "~", "·": "|", "│": "|", "“": '"', "”": '"'}
"""What stands for a character where an encoding lacks it, one for one so that columns stay."""
CURVES = {
    "reward": "reward",
    "eval/reward": "held-out reward",
    "entropy": "entropy",
    "probe/entropy": "probe entropy",
    "confidence": "confidence",
    "probe/confidence": "probe confidence",
}
SAMPLES = 5
LEAST_WIDTH = 60


def format_text(
    run_paths: Sequence[str | os.PathLike], width: int = 100, encoding: str = "utf-8"
) -> str:
    """Return a report of runs as text.

    Args:
      run_paths: as in `write_report`.
      width: columns that texts and bars may take, at least LEAST_WIDTH; the table takes 100.
      encoding: of where it is written; what it lacks is replaced.

    Returns:
      Lines.

    Raises:
      ValueError: as in `write_report`.
    """
    given = read_runs(run_paths)
    runs, refusal = comparable(given)
    width = max(width, LEAST_WIDTH)
    lines = [*format_table(runs).splitlines(), *_wrapped(refusal, width)]
    lines += [*_compared(runs, width), *_curves(runs, width), *_ledgers(runs, width)]
    lines += [*_samples(given, width), "", "notes"]
    for run in given:
        told = "; ".join(run.notes) if run.notes else "complete"
        lines += _wrapped(f"{run.name}, seed {run.seed} ({run.path.name}): {told}", width)
    # a text of a run could hold codes that move the cursor
    text = "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)
    try:
        "".join(PLAIN).encode(encoding)
    except UnicodeEncodeError:
        text = text.translate(str.maketrans(PLAIN))
    return text.encode(encoding, "replace").decode(encoding)


def _compared(runs: Sequence[Run], width: int) -> Iterator[str]:
    found = comparisons(runs)
    if found:
        yield from ("", "methods seed by seed")
    for one in found:
        if one.found is not None:
            pair, metric, seeds, gap, interval, p_value = cells(one)
            yield cut(f"  {pair}, {metric}: {gap} ({interval}), p {p_value}, {seeds} seeds", width)
    for note in caveats(found):
        yield from _wrapped(note, width)


def _curves(runs: Sequence[Run], width: int) -> Iterator[str]:
    """Draw each metric of each method as one line of blocks, from its lowest to its highest."""
    for name, group in by_name(runs).items():
        yield from (
            "",
            cut(f"{name}, mean of {len(group)} runs" if len(group) > 1 else name, width),
        )
        for metric, words in CURVES.items():
            curves = [curve for curve in (series(run, metric) for run in group) if curve[0].size]
            if not curves:
                continue
            steps, values = coinciding(curves)
            kept = np.isfinite(values).all(axis=0)
            mean = values.mean(axis=0)[kept]
            if mean.size:
                ends = f"{number(mean[0])} → {number(mean[-1])}"
                yield f"  {words:<17}{sparkline(mean, width - 42)}  {ends}, step {steps[kept][-1]}"


def sparkline(values: np.ndarray, width: int) -> str:
    """Draw values as at most `width` blocks; constant ones are of middle height."""
    places = np.linspace(0, len(values) - 1, min(len(values), width)).round().astype(int)
    low, span = values.min(), np.ptp(values)
    heights = (values[places] - low) / span if span > 0 else np.full(len(places), 0.5)
    return "".join(BLOCKS[round(height * (len(BLOCKS) - 1))] for height in heights.tolist())


def _ledgers(runs: Sequence[Run], width: int) -> Iterator[str]:
    for name, group in by_name(runs).items():
        ledgers = last_ledgers(group)
        for measure, quantity in QUANTITY.items() if ledgers else ():
            steps = " or ".join(str(step) for step in sorted({one.step for one in ledgers}))
            words = f"{name}, step {steps}: {quantity} of the probe tokens, nats"
            yield from ("", cut(words, width), *waterfall_lines(means(ledgers, measure), width))


def waterfall_lines(values: dict[str, float], width: int) -> list[str]:
    """Draw parts as bars, each from where the one above ends; "actual", the last, from 0."""
    room, (starts, ends) = width - 31, bars(values)
    low, high = min(0.0, ends.min()), max(0.0, ends.max())
    scale = (room - 1) / (high - low) if high > low else 0.0
    zero = round(-low * scale)
    lines = []
    for name, start, end in zip(values, starts, ends, strict=True):
        left, right = sorted((round((start - low) * scale), round((end - low) * scale)))
        bar = [" "] * room
        bar[zero] = "│"
        bar[left : right + 1] = "█" * (right + 1 - left)
        lines.append(f"  {name[:16]:<16} {values[name]:>+11.3g} {''.join(bar).rstrip()}")
    return lines


def _samples(runs: Sequence[Run], width: int) -> Iterator[str]:
    """List the samples that moved the probe completions most, in the first seed of a method."""
    for name, group in by_name(runs).items():
        run = next((run for run in group if last_by_sample(run) is not None), None)
        if run is None:
            continue
        ledger = last_by_sample(run)
        rows, values = influence_map(ledger, run.texts, SAMPLES)
        words = f"{name}, seed {run.seed}, step {ledger.step}: samples of most influence"
        yield from ("", cut(f"{words} (advantage; Σ|Δ log π|; Σ Δ log π, nats)", width))
        for row, moved in zip(rows, values, strict=True):
            one = ledger.samples[row]
            told = f"  {one.advantage:+6.2f} {np.abs(moved).sum():8.3g} {moved.sum():+9.3g}  "
            yield cut(told + " ".join(f"{one.prompt} → {one.completion}".split()), width)


def cut(text: str, width: int) -> str:
    """Cut a line to columns of a terminal; ideographs take two."""
    if _columns(text) <= width:
        return text
    text = text[:width]  # no character takes less than one
    while _columns(text) > width - 1:
        text = text[:-1]
    return text + "…"


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    ")
