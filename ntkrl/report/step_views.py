"""Data of the page's views of single steps: ledgers and texts as compact JSON for `page.js`."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from ntkrl.report.ledger_figures import MAX_SAMPLES, influence_map
from ntkrl.report.records import MEASURES, StepLedger
from ntkrl.report.rollouts_records import packed
from ntkrl.report.runs import Run, groups_with

MAX_TEXT = 400
LADDER = (
    (None, 12, None),
    *((1, steps, None) for steps in (12, 8, 6, 4, 3, 2, 1)),
    *((1, 1, tokens) for tokens in (16, 4)),
)
"""Seeds per method, steps per run and completions by token, tried until the data fit."""
EXPLANATION = (
    "What one optimizer step changed on the probe completions, as a sum of parts. R and G: what "
    "the step's own minibatch did through the classifier, and through the rest of the network. "
    "Momentum: gradients of earlier minibatches. Decay: weight decay. Optimizer: what an optimizer "
    "does that is not linear in its gradient; for most of them nothing. Curvature: what first "
    "order leaves out. Kinds of probe completions: own, drawn from the starting model; other, of "
    "another prompt; shuffled, the own tokens in random order; reference, rejected and "
    "paraphrased, given with the prompts."
)


def step_data(runs: Sequence[Run], room: int) -> tuple[str, str] | None:
    """Return the JSON of steps with ledgers in at most `room` bytes, and its limits in words.

    Args:
      runs: any runs.
      room: bytes. With less of it there are fewer seeds, then steps, then tokens.

    Returns:
      data: safe inside a script element; "" where a single step of a run is too large.
      limits: a sentence on what is left out.
      Or None where no run has ledgers.
    """
    groups = groups_with(runs, lambda run: run if run.ledgers else None)
    if not groups:
        return None
    for seeds, steps, tokens in LADDER:
        chosen = [run for group in groups.values() for run in group[:seeds]]
        data = json.dumps(
            {"runs": [_run(run, steps, tokens) for run in chosen]},
            ensure_ascii=False,
            allow_nan=False,
            separators=(",", ":"),
        )
        # no text may end the element or start a comment; lone surrogates cannot be written
        data = data.replace("<", "\\u003c").encode("utf-8", "replace").decode("utf-8")
        if len(data.encode()) <= room:
            total = sum(map(len, groups.values()))
            return data, _limits(f"{len(chosen)} of {total}", len(chosen) < total, steps, tokens)
    return "", ""


def _limits(count: str, first_seeds: bool, steps: int, tokens: int | None) -> str:
    of_steps = f"at most {steps} of its accounted steps" if steps > 1 else "the last accounted step"
    seeds = " (the first of each method, to keep the page small)" if first_seeds else ""
    by_token = "every one" if tokens is None else f"the first {tokens}"
    return (
        f"On this page: {count} runs with ledgers{seeds}; of each {of_steps}; "
        f"of a step the {MAX_SAMPLES} most influential samples and all probe "
        f"completions, {by_token} of them by token; texts are cut after {MAX_TEXT} characters. "
        "Numbers are rounded to four digits of the largest beside them."
    )


def _run(run: Run, steps: int, tokens: int | None) -> dict[str, Any]:
    ledgers = [run.ledgers[step] for step in sorted(run.ledgers)]
    places = np.linspace(0, len(ledgers) - 1, min(len(ledgers), steps)).round().astype(int)
    # a single step is the last
    chosen = [ledgers[place] for place in places] if len(places) > 1 else ledgers[-1:]
    completions, start = list[dict[str, Any]](), 0
    for index, probe in enumerate(ledgers[0].texts.completions):
        entry: dict[str, Any] = {
            "family": probe.family,
            "prompt": _cut(probe.prompt),
            "text": _cut(probe.text),
        }
        if tokens is None or index < tokens:
            entry |= {"tokens": probe.tokens, "start": start}
            start += len(probe.tokens)
        completions.append(entry)
    entries = [_step(ledger, start) for ledger in chosen]
    return {"name": run.name, "seed": run.seed, "completions": completions, "steps": entries}


def _step(ledger: StepLedger, tokens: int) -> dict[str, Any]:
    entry: dict[str, Any] = {"step": ledger.step, "stage": ledger.stage, "measures": {}}
    for measure in MEASURES:
        parts = {"actual": ledger.actual[measure]} | _roles(ledger.parts[measure])
        entry["measures"][measure] = {part: packed(v[:tokens]) for part, v in parts.items()}
    if ledger.influence is not None:
        rows, values = influence_map(ledger)
        entry["rows"] = [packed(row) for row in values]
        entry["samples"] = [
            {
                "prompt": _cut(ledger.samples[row].prompt),
                "completion": _cut(ledger.samples[row].completion),
                "advantage": ledger.samples[row].advantage,
            }
            for row in rows
        ]
    return entry


def _roles(parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sum all terms by role, R and G; leave the other parts."""
    sums: dict[str, np.ndarray] = {}
    for part, values in parts.items():
        role = part.split(" ")[-1]
        sums[role] = sums[role] + values if role in sums else values
    return sums


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…"
