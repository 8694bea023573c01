"""Data of a step's ledger for the rollouts view: changes of probe tokens by sample.

R is what a sample did through the classifier, G through the rest of the network.
"""

from typing import Any

import numpy as np

from ntkrl.report.records import StepLedger
from ntkrl.report.rollouts_records import StepRollouts, packed
from ntkrl.report.runs import Run

ENTRIES = 1_500_000
"""Most numbers by sample and token of a ledger."""
READINGS = ("log_probs", "entropy")
"""Arrays of a probe file that are shown beside a ledger, read before the step."""


def ledger_data(run: Run, ledger: StepLedger, rollouts: StepRollouts) -> dict[str, Any]:
    """Return the ledger of an optimizer step as JSON values.

    Args:
      run: the run.
      ledger: of the last optimizer step of a rollout step.
      rollouts: completions of that rollout step.
    """
    parts = ledger.parts["log_prob"]
    data: dict[str, Any] = {
        "rollout_step": rollouts.rollout_step,
        "step": ledger.step,
        "stage": ledger.stage,
        "completions": [
            {"family": c.family, "prompt": c.prompt, "text": c.text, "tokens": c.tokens}
            for c in ledger.texts.completions
        ],
        "actual": packed(ledger.actual["log_prob"]),
        "samples": [],
    }
    for role in ("R", "G"):
        terms = [values for part, values in parts.items() if part.endswith(f" {role}")]
        data[role] = packed(np.sum([np.zeros(ledger.texts.size), *terms], axis=0))
    readings = run.probes[ledger.step] if ledger.step in run.probes else {}
    for name in READINGS:
        if name in readings and readings[name].shape == (ledger.texts.size,):
            data[name] = packed(readings[name])
    if ledger.influence is None or ledger.head_influence is None:
        data["note"] = (
            "The ledger of this step keeps samples together (probe.ledger_by): no causes by sample."
        )
        return data
    count = max(1, ENTRIES // (2 * max(1, ledger.texts.size)))
    strongest = np.argsort(-np.abs(ledger.influence).sum(axis=0), kind="stable")[:count]
    rows = completions_of(ledger, rollouts)
    for sample in sorted(strongest.tolist()):
        text = ledger.samples[sample]
        head = ledger.head_influence[:, sample]
        data["samples"].append(
            {
                "completion": None if rows is None else rows[sample],
                "advantage": text.advantage,
                "text": text.completion[:200],
                "R": packed(head),
                "G": packed(ledger.influence[:, sample] - head),
            }
        )
    if count < len(ledger.samples):
        data["note"] = (
            f"The {count} most influential of {len(ledger.samples)} samples are listed; R and G of "
            "all samples are complete."
        )
    return data


def completions_of(ledger: StepLedger, rollouts: StepRollouts) -> list[int] | None:
    """Return the completion that each sample of a ledger is; None where they do not match.

    A minibatch is a part of consecutive completions; the last of a rollout step is analysed.
    """
    prompts = [text for text in rollouts.prompts for _ in range(rollouts.group)]
    pairs = list(zip(prompts, rollouts.texts, strict=True))
    samples = [(sample.prompt, sample.completion) for sample in ledger.samples]
    size = len(samples)
    for start in range(len(pairs) - size, -1, -max(1, size)):
        if pairs[start : start + size] == samples:
            return list(range(start, start + size))
    return None
