"""Read the samples of the policy that evaluations are compared with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from ntkrl import data, reward
from ntkrl.settings import EvalSettings
from ntkrl.setup.rewards import Problems


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """What a policy said to P prompts, N times each.

    texts: P lists of N. rewards: `[P, N]`.
    """

    texts: list[list[str]]
    rewards: np.ndarray


def read_base(
    settings: EvalSettings, held_out: data.PromptSet, rewards: reward.RewardSet
) -> Samples:
    """Read as many samples of the evaluation `settings.base` as are drawn for each prompt.

    Its rewards are summed with the weights and the normalisation of this config.

    Args:
      settings: of the evaluation, with a base.
      held_out: its prompts, of which the first `settings.prompts` count.
      rewards: of the run.

    Raises:
      ValueError: files that are missing or of another form, other prompts, fewer samples or other
        reward functions than this evaluation has; all in one message.
    """
    path, problems = Path(settings.base), Problems()
    place = f"eval.base {path}"
    found, raw = None, None
    with problems:
        found = _read_samples(path, place)
    with problems:
        raw = reward.read_rewards(path.with_suffix(".rewards.json"), "eval.base")
    if found is not None:
        with problems:
            rows = _chosen(settings, place, found, held_out)
    if raw is not None:
        with problems:
            _check_functions(place, raw, rewards)
    if found is not None and raw is not None:
        with problems:
            _check_counts(place, len(found.prompts), raw)
    problems.finish()
    texts = found.columns["completion"]
    rewards_B = rewards.total(raw, texts)
    return Samples([[texts[i] for i in own] for own in rows], rewards_B[np.array(rows)])


def _read_samples(path: Path, place: str) -> data.PromptSet:
    if path.suffix != ".jsonl":
        raise ValueError(
            f"{place} is no file of samples; name a .jsonl that `ntkrl evaluate` wrote, such as "
            "runs/sft/evaluations/sft.jsonl."
        )
    found = data.read_set(path)
    held = found.columns["completion"] if "completion" in found.columns else [None]
    if not all(isinstance(text, str) for text in held):
        raise ValueError(f"{place}: every row needs a 'completion' of text.")
    return found


def _chosen(
    settings: EvalSettings, place: str, found: data.PromptSet, held_out: data.PromptSet
) -> list[list[int]]:
    """Return which rows of the base answer each prompt."""
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(found.prompts):
        rows.setdefault(_key(prompt), []).append(row)
    asked = held_out.prompts[: settings.prompts]
    unknown = [prompt for prompt in asked if _key(prompt) not in rows]
    if unknown:
        raise ValueError(
            f"{place} is of other prompts: {len(unknown)} of the {len(asked)} asked here are not "
            f"in it, such as {unknown[0]!r:.60}. Evaluate the base on the same data.eval_path, or "
            "data.path and data.held_out, and on as many eval.prompts."
        )
    wanted = settings.samples_per_prompt * settings.repeats
    least = min(len(rows[_key(prompt)]) for prompt in asked)
    if least < wanted:
        raise ValueError(
            f"{place} holds {least} samples of a prompt, and {wanted} are drawn here "
            "(eval.samples_per_prompt × eval.repeats); draw fewer, or evaluate the base with as "
            "many."
        )
    return [rows[_key(prompt)][:wanted] for prompt in asked]


def _check_functions(place: str, raw: dict[str, np.ndarray], rewards: reward.RewardSet) -> None:
    own = [function.name for function in rewards.functions]
    if set(own) != set(raw):
        raise ValueError(
            f"{place} has rewards of {', '.join(raw)}, this config of {', '.join(own)}; evaluate "
            "the base with the same reward.function."
        )


def _check_counts(place: str, rows: int, raw: dict[str, np.ndarray]) -> None:
    wrong = [f"{len(values)} of {name}" for name, values in raw.items() if len(values) != rows]
    if wrong:
        raise ValueError(
            f"{place} has {rows} samples, and rewards beside it are {', '.join(wrong)}; evaluate "
            "the base again."
        )


def _key(prompt: Any) -> str:
    return json.dumps(prompt, sort_keys=True)
