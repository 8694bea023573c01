"""Files that the study's runs read: prompts in three parts, right answers, and preferences."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ntkrl import data, durable_files

SET_ASIDE = 6
"""Number of training targets that choose rates."""
PAIRS_PER_PROMPT = 64


def write_prompts(root: Path) -> None:
    """Write train, validation and test prompts, and right answers `a+b+c-d` for the first.

    The validation targets are spread over the training targets by rank.
    """
    targets = data.targets("train")
    places = np.linspace(0, len(targets) - 1, SET_ASIDE + 2).round().astype(int)[1:-1]
    validation = {targets[place] for place in places}
    parts = {
        "train": [target for target in targets if target not in validation],
        "validation": sorted(validation),
        "test": list(data.targets("test")),
    }
    for name, part in parts.items():
        _write(root / "data" / f"{name}.jsonl", map(_prompt, part))
    answers = [
        {**_prompt(target), "completion": text}
        for target in parts["train"]
        for form in data.solutions(target)
        for text in form
        if "-" in text
    ]
    _write(root / "data" / "supervised.jsonl", answers)


def write_preferences(samples: Path, out: Path, seed: int) -> None:
    """Pair completions of a prompt with different true rewards, the better one chosen.

    Args:
      samples: an evaluation's JSONL: prompt, completion, reward.
      out: JSONL of prompt, chosen, rejected.
      seed: of the random pairing.

    Raises:
      ValueError: no prompt has completions of different rewards.
    """
    rng, by_prompt = np.random.default_rng(seed), {}
    for line in samples.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_prompt.setdefault(row["prompt"], []).append((row["reward"], row["completion"]))
    pairs = []
    for prompt, scored in by_prompt.items():
        room = len(pairs) + PAIRS_PER_PROMPT
        for first, second in rng.integers(len(scored), size=(4 * PAIRS_PER_PROMPT, 2)):
            (high, chosen), (low, rejected) = scored[first], scored[second]
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
        durable_files.save_text(path, "".join(json.dumps(row) + "\n" for row in rows))
