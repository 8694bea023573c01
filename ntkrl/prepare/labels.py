"""Rewards of the two responses of every pair, kept on disk as they are computed.

`PATH` is JSON Lines: a head with the digest of what is scored, then [chosen, rejected] per pair.
The longest pairs come first, so that texts of a batch are of like length and one that does not fit
is found at once. A run that was cut off goes on after the last whole line.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ntkrl import data, reward, runtime


def scores_of(
    pairs: data.PromptSet, rewards: reward.RewardSet, path: Path, digest: str, together: int
) -> np.ndarray:
    """Score every pair that is not scored yet.

    Args:
      pairs: conversational, with the columns "chosen" and "rejected".
      rewards: what scores.
      path: of the scores.
      digest: of what is scored.
      together: pairs scored at a time, and written.

    Returns:
      `[P, 2]` float64: chosen, rejected.

    Raises:
      ValueError: scores of something else, or what the reward functions raise.
    """
    count = len(pairs.prompts)
    order = np.argsort([-_size(pairs, row) for row in range(count)], kind="stable")
    pairs = data.take(pairs, order)
    scores = _held(path, digest)[:count]
    start = runtime.agree(f"how many pairs of {path.name} are scored", len(scores))[0]
    shown = {"desc": path.stem, "initial": start, "total": count, "unit": "pairs"}
    with tqdm(disable=not runtime.is_writer(), mininterval=0.5, **shown) as bar:
        for first in range(start, count, together):
            found = _scored(pairs, rewards, slice(first, first + together))
            scores += found
            if runtime.is_writer():
                with path.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(pair) + "\n" for pair in found)
            bar.update(len(found))
    found_P2 = np.empty((count, 2))
    found_P2[order] = scores
    return found_P2


def _size(pairs: data.PromptSet, row: int) -> int:
    """Return the characters of a pair's longer text."""
    texts = (pairs.columns[name][row][0]["content"] for name in ("chosen", "rejected"))
    prompt = sum(len(message["content"]) for message in pairs.prompts[row])
    return prompt + max(map(len, texts))


def _scored(pairs: data.PromptSet, rewards: reward.RewardSet, rows: slice) -> list[list[float]]:
    prompts = pairs.prompts[rows]
    texts = [
        message[0]["content"]
        for name in ("chosen", "rejected")
        for message in pairs.columns[name][rows]
    ]
    none: list[list[int]] = [[] for _ in texts]
    given = rewards((*prompts, *prompts), texts, none, {}, conversational=True).rewards
    return given.astype(np.float64).reshape(2, -1).T.tolist()


def _held(path: Path, digest: str) -> list[list[float]]:
    """Return the scores that are there, and cut off a line that was not finished."""
    head = json.dumps({"digest": digest}) + "\n"
    if not path.exists():
        if runtime.is_writer():
            runtime.save_text(path, head)
        return []
    # bytes after the last line break are of a line that was cut off
    whole, _, rest = path.read_bytes().rpartition(b"\n")
    lines = whole.decode("utf-8").split("\n")
    if lines[0] + "\n" != head:
        raise ValueError(
            f"{path} holds scores of other pairs: the inputs have changed since. Remove its "
            "directory to score anew."
        )
    if rest and runtime.is_writer():
        runtime.save_text(path, whole.decode("utf-8") + "\n")
    return [json.loads(line) for line in lines[1:]]
