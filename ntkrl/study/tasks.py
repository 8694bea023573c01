"""The files a study's runs read: prompts in three parts, right answers, and preferences."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ntkrl import data, runtime

ASIDE = 6
"""Training targets that rates are chosen by."""
PAIRS_PER_PROMPT = 64


def write_prompts(root: Path) -> None:
    """Write train, validation and test prompts, and right answers `a+b+c-d` for the first.

    The targets set aside are spread over the training targets by rank.
    """
    targets = data.targets("train")
    places = np.linspace(0, len(targets) - 1, ASIDE + 2).round().astype(int)[1:-1]
    aside = {targets[place] for place in places}
    parts = {
        "train": [target for target in targets if target not in aside],
        "validation": sorted(aside),
        "test": list(data.targets("test")),
    }
    for name, chosen in parts.items():
        _write(root / "data" / f"{name}.jsonl", map(_prompt, chosen))
    answers = [
        {**_prompt(target), "completion": text}
        for target in parts["train"]
        for form in data.solutions(target)
        for text in form
        if "-" in text
    ]
    _write(root / "data" / "supervised.jsonl", answers)


def write_preferences(samples: Path, out: Path, seed: int) -> None:
    """Pair completions of a prompt whose true rewards differ, the better one first.

    Args:
      samples: an evaluation's JSONL: prompt, completion, reward.
      out: JSONL of prompt, chosen, rejected.
      seed: of which completions are paired.

    Raises:
      ValueError: no prompt has completions of different rewards.
    """
    rng, by_prompt = np.random.default_rng(seed), {}
    for line in samples.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_prompt.setdefault(row["prompt"], []).append((row["reward"], row["completion"]))
    pairs = []
    for prompt, found in by_prompt.items():
        room = len(pairs) + PAIRS_PER_PROMPT
        for first, second in rng.integers(len(found), size=(4 * PAIRS_PER_PROMPT, 2)):
            (high, chosen), (low, rejected) = found[first], found[second]
            if high > low and len(pairs) < room:
                pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    if not pairs:
        raise ValueError(f"{samples}: completions of no prompt differ in reward; train the base.")
    rng.shuffle(pairs)
    _write(out, pairs)


def _prompt(target: int) -> dict[str, Any]:
    return {"prompt": f"{target}=", "target": target}


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        runtime.save_text(path, "".join(json.dumps(row) + "\n" for row in rows))
