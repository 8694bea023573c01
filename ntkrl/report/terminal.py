"""A report for a terminal: the table, sparklines of curves, the last ledger, and notes."""

import dataclasses
import os
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

from ntkrl.messages import printable
from ntkrl.report.comparisons import comparison_table
from ntkrl.report.ledger_figures import (
    QUANTITY,
    bar_ends,
    first_by_sample,
    influence_map,
    last_ledgers,
    part_means,
    steps_of,
)
from ntkrl.report.plotting import coinciding, recorded
from ntkrl.report.runs import Run, by_name, comparable, mean_words, read_runs
from ntkrl.report.tables import format_table, number

BLOCKS = "▁▂▃▄▅▆▇█"
PLAIN = {**dict(zip(BLOCKS, "_.-=+*%#", strict=True)), "→": ">", "−": "-", "–": "-", "±": "~"}
PLAIN |= {"Δ": "d", "π": "p", "Σ": "S", "…": "~", "·": "|", "│": "|", "“": '"', "”": '"'}
"""Replacements where an encoding lacks a character, one for one so that columns stay aligned."""
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
      width: columns for texts and bars, at least LEAST_WIDTH; the table takes 100.
      encoding: of the output; missing characters are replaced.

    Returns:
      Lines.

    Raises:
      ValueError: as in `write_report`.
    """
    all_runs = read_runs(run_paths)
    runs, refusal = comparable(all_runs)
    width = max(width, LEAST_WIDTH)
    lines = [*format_table(runs).splitlines(), *_wrap(refusal, width)]
    lines += [*_comparisons(runs, width), *_curves(runs, width), *_ledgers(runs, width)]
    lines += [*_samples(all_runs, width), "", "notes"]
    for run in all_runs:
        notes = "; ".join(run.notes) if run.notes else "complete"
        lines += _wrap(f"{run.name}, seed {run.seed} ({run.path.name}): {notes}", width)
    text = "\n".join(printable(line.replace("\n", " ")) for line in lines)
    return encodable(text, encoding)


def encodable(text: str, encoding: str) -> str:
    """Return a text with replacements for the characters that an encoding lacks."""
    try:
        "".join(PLAIN).encode(encoding)
    except UnicodeEncodeError:
        text = "".join(PLAIN.get(character, character) for character in text)
    return text.encode(encoding, "replace").decode(encoding)


def _comparisons(runs: Sequence[Run], width: int) -> Iterator[str]:
    table = comparison_table(runs)
    if table is not None:
        yield from ("", "methods seed by seed")
        for pair, metric, seeds, gap, interval, p_value in table.rows:
            yield cut(f"  {pair}, {metric}: {gap} ({interval}), p {p_value}, {seeds} seeds", width)
        for note in table.notes:
            yield from _wrap(note, width)


def _curves(runs: Sequence[Run], width: int) -> Iterator[str]:
    """Draw each metric of each method as a sparkline, from its lowest to its highest value."""
    for name, group in by_name(runs).items():
        yield from ("", cut(name + mean_words(group), width))
        for metric, words in CURVES.items():
            curves = recorded(group, metric)
            if not curves:
                continue
            steps, values = coinciding(curves)
            finite = np.isfinite(values).all(axis=0)
            mean = values.mean(axis=0)[finite]
            if mean.size:
                ends = f"{number(mean[0])} → {number(mean[-1])}, step {steps[finite][-1]}"
                yield f"  {words:<17}{sparkline(mean, width - 42)}  {ends}"


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
            words = f"{name}, step {steps_of(ledgers)}: {quantity} of the probe tokens, nats"
            yield from ("", cut(words, width))
            yield from waterfall_lines(part_means(ledgers, measure), width)


def waterfall_lines(values: dict[str, float], width: int) -> list[str]:
    """Draw parts as bars, each from the end of the one above; "actual", the last, from 0."""
    room, (starts, ends) = width - 31, bar_ends(values)
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
    """List the most influential samples on the probe completions, in each method's first seed."""
    for run, ledger in first_by_sample(runs):
        rows, values = influence_map(ledger, SAMPLES)
        words = f"{run.name}, seed {run.seed}, step {ledger.step}: samples of most influence"
        yield from ("", cut(f"{words} (advantage; Σ|Δ log π|; Σ Δ log π, nats)", width))
        for row, change in zip(rows, values, strict=True):
            prompt, completion, advantage = dataclasses.astuple(ledger.samples[row])
            sizes = f"  {advantage:+6.2f} {np.abs(change).sum():8.3g} {change.sum():+9.3g}  "
            yield cut(sizes + " ".join(f"{prompt} → {completion}".split()), width)


def cut(text: str, width: int) -> str:
    """Cut a line to columns of a terminal; ideographs take two."""
    if _columns(text) <= width:
        return text
    text = text[:width]  # every character takes one column or more
    while _columns(text) > width - 1:
        text = text[:-1]
    return text + "…"


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    ")
