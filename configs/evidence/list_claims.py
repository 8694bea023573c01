"""Claims about the diversity of lists: members, first members, and members lost and gained.

Measured on samples of the test categories, of the starting model and after training. Criteria as in
`claims`, written before any run.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path

import numpy as np

from ntkrl.configs.evidence.arms import Arm
from ntkrl.configs.evidence.verdict import Verdict, difference, mean_text
from ntkrl.configs.pretrained import lists

END = "end"
"""Directory of a run for the evaluation of its export."""
MEASURES = {
    "members": "distinct right members of a category among the samples become fewer",
    "first_entropy": "the entropy (nats) of the first item of an answer falls",
}


def samples_file(place: Path, directory: str) -> Path:
    """Return the samples that an evaluation in a directory of a run writes."""
    return place / directory / "evaluations" / f"{place.name}.jsonl"


def list_claims(arm: Arm) -> list[Verdict]:
    """Return the claims on the diversity of an arm's lists; none where nothing was sampled."""
    seeds = arm.plan.seeds_of(arm.name)
    place = functools.partial(arm.results.place, arm.size)
    files = [
        (samples_file(place("base", seed), "test"), samples_file(place(arm.name, seed), END))
        for seed in seeds
    ]
    pairs = [[read_lists(f) for f in pair] for pair in files if all(f.exists() for f in pair)]
    if not pairs:
        return []
    listed = []
    for name, claim in MEASURES.items():
        values = np.array([[diversity(side)[name] for side in pair] for pair in pairs])
        verdict = difference(3, arm.task, f"{claim} ({arm.name})", *values.T, -1)
        words = f"{mean_text(values[:, 0])} to {mean_text(values[:, 1])}"
        listed.append(verdict._replace(number=f"{words}; {verdict.number}"))
    counts = np.array([support(*pair) for pair in pairs], float)
    claim = f"of the right members among the samples, more are lost than gained ({arm.name})"
    verdict = difference(6, arm.task, claim, counts[:, 1], counts[:, 0])
    words = f"lost {mean_text(counts[:, 0])}, gained {mean_text(counts[:, 1])}"
    return [*listed, verdict._replace(number=f"{words}; {verdict.number}")]


def read_lists(path: Path) -> dict[str, list[list[str]]]:
    """Return the items of every sample, `[]` where it is not a list of three, by category."""
    categories = {lists.QUESTION.format(name): name for name in lists.MEMBERS}
    by_category: dict[str, list[list[str]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        category = categories[row["prompt"][-1]["content"]]
        answer = row["completion"][-1]["content"]
        by_category.setdefault(category, []).append(lists.items(answer, category))
    return by_category


def diversity(samples: dict[str, list[list[str]]]) -> dict[str, float]:
    """Return the means over categories of distinct right members and of the first's entropy."""
    members = [len(_members(answers, name)) for name, answers in samples.items()]
    entropies = []
    for answers in samples.values():
        counts = np.array(list(Counter(items[0] for items in answers if items).values()), float)
        shares = counts / counts.sum()
        entropies.append(float(-(shares * np.log(shares)).sum()))
    return {"members": float(np.mean(members)), "first_entropy": float(np.mean(entropies))}


def support(
    before: dict[str, list[list[str]]], after: dict[str, list[list[str]]]
) -> tuple[int, int]:
    """Return how many right members, over all categories, only the first or second side has."""
    pairs = [(_members(before[name], name), _members(after[name], name)) for name in before]
    return sum(len(a - b) for a, b in pairs), sum(len(b - a) for a, b in pairs)


def _members(answers: list[list[str]], category: str) -> set[str]:
    return {item for items in answers for item in items} & lists.MEMBERS[category]
