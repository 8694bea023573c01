"""An evaluation against the samples of another policy, which an earlier evaluation saved.

Samples are compared prompt by prompt, so that no second model is needed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ntkrl import data, intervals, probe, reward
from ntkrl.assembly.rewards import Problems
from ntkrl.assembly.settings import EvalSettings

DRAWS = 2000
"""Resamples of prompts for an interval: its ends then vary by a twentieth of its length."""


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


def compare(base: Samples, own: Samples, threshold: float) -> dict[str, float]:
    """Compare the samples of a policy with those of a base.

    A pair is a sample of either for the same prompt, all with all, and the larger reward wins; an
    equal one is half a win. An answer (`reward.final_answer`) is correct where either policy was
    rewarded for it.

    Args:
      base, own: of the same prompts, N samples each.
      threshold: a sample with at least this reward is a success.

    Returns:
      Metrics, those of intervals over prompts with `_low` and `_high`; `diversity/crossing_k` is
      infinite where the base's pass@k lies nowhere above the policy's up to N, and a share NaN
      where there is nothing to share.
    """
    pairs = own.rewards[:, :, None], base.rewards[:, None, :]
    wins_P = np.mean(np.greater(*pairs) + 0.5 * np.equal(*pairs), axis=(1, 2))
    gaps_P = own.rewards.mean(axis=1) - base.rewards.mean(axis=1)
    found = mean_interval("eval/win_rate", wins_P)
    found |= mean_interval("eval/reward_difference", gaps_P)
    both = base, own
    samples = own.rewards.shape[1]
    ks = powers(samples)
    best = [np.array([probe.coverage.best_of_n(row, ks) for row in one.rewards]) for one in both]
    for k, gap_P in zip(ks, (best[1] - best[0]).T, strict=True):
        found |= mean_interval(f"diversity/gap_best_of_{k}", gap_P)
    solved = [one.rewards >= threshold for one in both]
    curves = [probe.coverage.pass_curves(s.sum(axis=1), samples, ks) for s in solved]
    crossing = probe.coverage.crossing_interval(*curves, ks, draws=DRAWS)
    found |= _named("diversity/crossing_k", crossing)
    answers = [[list(map(reward.final_answer, group)) for group in one.texts] for one in both]
    correct: list[set[str]] = [set() for _ in own.texts]
    for said, right in zip(answers, solved, strict=True):
        for i, (group, flags) in enumerate(zip(said, right, strict=True)):
            correct[i] |= {answer for answer, flag in zip(group, flags, strict=True) if flag}
    support = probe.coverage.support_change(*answers, correct)
    words = (*support._fields, "retention", "discovery", "score", "change")
    return found | {f"diversity/support_{word}": float(getattr(support, word)) for word in words}


def mean_interval(name: str, values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Return a mean over prompts under a metric's name, with `_low` and `_high`."""
    return _named(name, intervals.mean_interval(np.asarray(values), draws=DRAWS))


def _named(name: str, interval: intervals.Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def powers(samples: int) -> list[int]:
    """Return the powers of two up to a number of samples, and the number."""
    return sorted({2**i for i in range(samples.bit_length())} | {samples})
