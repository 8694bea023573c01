"""What the page's script shows of single steps: ledgers and texts as JSON, kept small.

The script is `page.js`; it gets everything from one JSON element and sets texts as texts.
"""

from __future__ import annotations

import html
import importlib.resources
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ntkrl.report.influence import MAX_SAMPLES, influence_map
from ntkrl.report.ledgers import MEASURES, StepLedger
from ntkrl.report.runs import Run, by_name

PAGE_BYTES = 2_800_000
"""What figures and steps may take on the page together, …"""
LEAST_BYTES = 400_000
"""… of which steps get so much even beside very large figures."""
MAX_TEXT = 400
LADDER = (
    (None, 12, None),
    *((1, steps, None) for steps in (12, 8, 6, 4, 3, 2, 1)),
    *((1, 1, tokens) for tokens in (16, 4)),
)
"""Seeds per method, steps per run and completions by token, until there is room for it."""
EXPLAINED = (
    "What one optimizer step changed on the probe completions, as a sum of parts. R and G: what "
    "the step's own minibatch did through the classifier, and through the rest of the network. "
    "Momentum: gradients of earlier minibatches. Decay: weight decay. Optimizer: what an optimizer "
    "does that is not linear in its gradient; for most of them nothing. Curvature: what first "
    "order leaves out. Kinds of probe completions: own, drawn from the starting model; other, of "
    "another prompt; shuffled, the own tokens in random order; reference, rejected and "
    "paraphrased, given with the prompts."
)


def step_views(runs: Sequence[Run], taken: int = 0) -> str:
    """Return the section of the page with the views of single steps, "" without ledgers.

    Args:
      runs: any runs.
      taken: bytes that figures take on the page.
    """
    room = max(PAGE_BYTES - taken, LEAST_BYTES)
    groups = {name: [r for r in group if r.ledgers] for name, group in by_name(runs).items()}
    groups = {name: group for name, group in groups.items() if group}
    if not groups:
        return ""
    for seeds, steps, tokens in LADDER:
        chosen = [run for group in groups.values() for run in group[:seeds]]
        data = json.dumps(
            {"runs": [_run(run, steps, tokens) for run in chosen]},
            ensure_ascii=False,
            allow_nan=False,
            separators=(",", ":"),
        )
        # nothing in a text may end the element or start a comment
        data = data.replace("<", "\\u003c")
        if len(data.encode()) <= room:
            break
    else:
        return (
            "<section><h2>One step, sample by sample and token by token</h2>\n<p>Left out: even "
            f"one step of one run takes more than {room / 1e6:.1f} MB here. The figures show the "
            "last step.</p></section>"
        )
    total = sum(map(len, groups.values()))
    script = importlib.resources.files("ntkrl.report").joinpath("page.js").read_text("utf-8")
    return (
        '<section id="steps"><h2>One step, sample by sample and token by token</h2>\n'
        f'<p class="small">{html.escape(EXPLAINED)}</p>\n'
        "<noscript><p>These views need scripts; the figures above show the last step.</p>"
        '</noscript>\n<div id="step-views"></div>\n'
        f'<p class="small">{html.escape(_limits(len(chosen), total, steps, tokens))}</p>\n'
        f'<script type="application/json" id="step-data">{data}</script>\n'
        f"<script>\n{script}</script></section>"
    )


def _limits(chosen: int, total: int, steps: int, tokens: int | None) -> str:
    """Say what of the runs is on the page."""
    of_steps = f"at most {steps} of its accounted steps" if steps > 1 else "the last accounted step"
    seeds = "" if chosen == total else " (the first of each method, to keep the page small)"
    by_token = "every one" if tokens is None else f"the first {tokens}"
    return (
        f"On this page: {chosen} of {total} runs with ledgers{seeds}; of each {of_steps}; "
        f"of a step the {MAX_SAMPLES} most influential samples and all probe "
        f"completions, {by_token} of them by token; texts are cut after {MAX_TEXT} characters. "
        "Numbers are rounded to four digits of the largest beside them."
    )


def _run(run: Run, steps: int, tokens: int | None) -> dict[str, Any]:
    """Return what the page shows of one run."""
    places = np.linspace(0, len(run.ledgers) - 1, min(len(run.ledgers), steps)).round().astype(int)
    # the last step counts most, so one step alone is the last
    places = places if len(places) > 1 else [len(run.ledgers) - 1]
    chosen = [sorted(run.ledgers)[place] for place in places]
    completions, start = [], 0
    for number, one in enumerate(run.texts.completions):
        told = {"family": one.family, "prompt": _cut(one.prompt), "text": _cut(one.text)}
        if tokens is None or number < tokens:
            told |= {"tokens": one.tokens, "start": start}
            start += len(one.tokens)
        completions.append(told)
    kept = [_step(run, run.ledgers[step], start) for step in chosen]
    return {"name": run.name, "seed": run.seed, "completions": completions, "steps": kept}


def _step(run: Run, ledger: StepLedger, tokens: int) -> dict[str, Any]:
    told: dict[str, Any] = {"step": ledger.step, "stage": ledger.stage, "measures": {}}
    for measure in MEASURES:
        parts = {"actual": ledger.actual[measure]} | _roles(ledger.parts[measure])
        told["measures"][measure] = {part: _packed(v[:tokens]) for part, v in parts.items()}
    if ledger.influence is not None:
        rows, values = influence_map(ledger, run.texts)
        told["rows"] = [_packed(row) for row in values]
        told["samples"] = [
            {
                "prompt": _cut(ledger.samples[row].prompt),
                "completion": _cut(ledger.samples[row].completion),
                "advantage": ledger.samples[row].advantage,
            }
            for row in rows
        ]
    return told


def _roles(parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sum all terms by role, R and G; leave the other parts."""
    found: dict[str, np.ndarray] = {}
    for part, values in parts.items():
        role = part.split(" ")[-1]
        found[role] = found[role] + values if role in found else values
    return found


def _packed(values: np.ndarray) -> dict[str, Any]:
    """Write an array as whole numbers of a unit, four digits for the largest."""
    largest = float(np.abs(values).max(initial=0))
    unit = 10.0 ** (math.floor(math.log10(largest)) - 3) if largest > 0 else 1.0
    return {"unit": float(f"{unit:.0e}"), "values": np.rint(values / unit).astype(int).tolist()}


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…"
