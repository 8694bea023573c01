"""The completions of a rollout step as a line of JSON, and back.

Arrays of numbers per token are whole numbers of a unit, enough to look at: log-probs and entropies
are rounded to 0.001 nats, other values to four digits of the largest beside them, rewards to six.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

FORMAT = 1
LOG_PROB_UNIT = 1e-3
"""Nats."""
MAX_TOKEN_ID = 2**31 - 1


@dataclasses.dataclass(frozen=True, eq=False)
class StepRollouts:
    """The B completions of a rollout step, N of each prompt in adjacent rows; n tokens in all.

    rollout_step: from 1. step: optimizer steps taken by its end. stage: its name.
    prompts: P texts, B = P·N. rows: `[P]` of the prompt set.
    texts: B completions, without special tokens.
    reward: `[B]`; rewards: by name of a function `[B]`, NaN where it does not apply.
    finished: `[B]` bool, False where the budget cut the completion.
    lengths: `[B]` tokens, n in all; arrays `[n]` are those of the first completion, then of the
      second, …
    tokens: `[n]` ids. vocabulary: text by id.
    sampler_log_probs: `[n]` (nats).
    advantages: `[n]` weight on each token's score function, before those of an entropy budget; 0
      where it does not count.
    log_ratio: `[n]` log-prob of the trainer, before any update, less the sampler's (nats); or None.
    entropy: `[n]` of the sampler's distribution (nats); or None.
    """

    rollout_step: int
    step: int
    stage: str
    prompts: Sequence[str]
    rows: np.ndarray
    texts: Sequence[str]
    reward: np.ndarray
    rewards: Mapping[str, np.ndarray]
    finished: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray
    vocabulary: Mapping[int, str]
    sampler_log_probs: np.ndarray
    advantages: np.ndarray
    log_ratio: np.ndarray | None = None
    entropy: np.ndarray | None = None

    @property
    def group(self) -> int:
        """Completions per prompt, N."""
        return len(self.texts) // len(self.prompts)


def encode_rollouts(rollouts: StepRollouts) -> bytes:
    """Return the completions of a step as a line of JSON in UTF-8."""
    starts = np.cumsum(rollouts.lengths) - rollouts.lengths
    firsts_B = np.append(rollouts.advantages, 0.0)[starts]  # of an empty completion, any number
    gaps_n = np.abs(np.repeat(firsts_B, rollouts.lengths) - rollouts.advantages)
    if np.all(gaps_n <= 1e-4 * np.abs(rollouts.advantages)):
        advantages: Any = _rounded(firsts_B)  # equal for all tokens of a completion, as usual
    else:
        advantages = packed(rollouts.advantages)
    record = {
        "format": FORMAT,
        "rollout_step": rollouts.rollout_step,
        "step": rollouts.step,
        "stage": rollouts.stage,
        "group": rollouts.group,
        "prompts": rollouts.prompts,
        "rows": rollouts.rows.tolist(),
        "texts": rollouts.texts,
        "reward": _rounded(rollouts.reward),
        "rewards": {name: _rounded(values) for name, values in rollouts.rewards.items()},
        "finished": rollouts.finished.tolist(),
        "lengths": rollouts.lengths.tolist(),
        "tokens": rollouts.tokens.tolist(),
        "vocabulary": {str(token): text for token, text in rollouts.vocabulary.items()},
        "sampler_log_probs": packed(rollouts.sampler_log_probs, LOG_PROB_UNIT),
        "advantages": advantages,
    }
    if rollouts.log_ratio is not None:
        record["log_ratio"] = packed(rollouts.log_ratio)
    if rollouts.entropy is not None:
        record["entropy"] = packed(rollouts.entropy, LOG_PROB_UNIT)
    text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace") + b"\n"


def decode_rollouts(line: bytes) -> StepRollouts:
    """Return the completions in a line of `encode_rollouts`.

    Raises:
      ValueError: it is not such a line; the message is about the line alone.
    """
    try:
        # not `parse_json`, which visits every number
        record = json.loads(line, parse_constant=_refuse)
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r}, not {FORMAT}")
        return _decoded(record)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"is no record of completions ({error})") from error
    except RecursionError as error:
        raise ValueError("is no record of completions (nested too deep)") from error


def packed(values: np.ndarray, unit: float | None = None) -> dict[str, Any]:
    """Return an array as integers of a unit; null where it is not finite.

    Args:
      values: `[n]`.
      unit: None for four digits of the largest.
    """
    finite = np.isfinite(values)
    known = np.where(finite, values, 0.0)
    if unit is None:
        largest = float(np.abs(known).max(initial=0.0))
        unit = 10.0 ** (math.floor(math.log10(largest)) - 3) if largest > 0 else 1.0
    numbers: list[int | None] = np.rint(known / unit).astype(np.int64).tolist()
    if not finite.all():
        numbers = [n if f else None for n, f in zip(numbers, finite.tolist(), strict=True)]
    return {"unit": float(f"{unit:.0e}"), "values": numbers}


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} in place of a number")


def _rounded(values: np.ndarray) -> list[float | None]:
    """Round to six digits of the largest; None where a value is not finite."""
    finite = np.isfinite(values)
    largest = float(np.abs(values, where=finite, out=np.zeros(values.shape)).max(initial=0.0))
    digits = 5 - math.floor(math.log10(largest)) if largest > 0 else 0
    numbers: list[float | None] = np.asarray(values, np.float64).round(digits).tolist()
    if finite.all():
        return numbers
    return [n if f else None for n, f in zip(numbers, finite.tolist(), strict=True)]


def _decoded(record: Mapping[str, Any]) -> StepRollouts:
    prompts, texts = _texts(record["prompts"]), _texts(record["texts"])
    completions = len(texts)
    lengths = _integers(record["lengths"], completions)
    if not texts or not prompts or completions != len(prompts) * int(record["group"]):
        raise ValueError(
            f"{completions} completions of {len(prompts)} prompts, {record['group']} each"
        )
    total = int(lengths.sum())
    tokens = _integers(record["tokens"], total)
    advantages = record["advantages"]
    if isinstance(advantages, list):
        advantages_n = np.repeat(_floats(advantages, completions), lengths)
    else:
        advantages_n = _unpacked(advantages, total)
    vocabulary = {int(token): str(text) for token, text in record["vocabulary"].items()}
    missing = set(tokens.tolist()) - vocabulary.keys()
    if missing:
        raise ValueError(f"no text of token {min(missing)}")
    log_ratio, entropy = (
        _unpacked(record[name], total) if name in record else None
        for name in ("log_ratio", "entropy")
    )
    return StepRollouts(
        rollout_step=int(record["rollout_step"]),
        step=int(record["step"]),
        stage=str(record["stage"]),
        prompts=prompts,
        rows=_integers(record["rows"], len(prompts)),
        texts=texts,
        reward=_floats(record["reward"], completions),
        rewards={str(n): _floats(v, completions) for n, v in record["rewards"].items()},
        finished=_floats(record["finished"], completions) == 1,
        lengths=lengths,
        tokens=tokens,
        vocabulary=vocabulary,
        sampler_log_probs=_unpacked(record["sampler_log_probs"], total),
        advantages=advantages_n,
        log_ratio=log_ratio,
        entropy=entropy,
    )


def _texts(values: Any) -> list[str]:
    if not isinstance(values, list):
        raise ValueError(f"{type(values).__name__} in place of a list of texts")
    return [str(value) for value in values]


def _integers(values: Any, size: int | None = None) -> np.ndarray:
    numbers = np.array(values, np.int64).reshape(-1) if values else np.zeros(0, np.int64)
    if numbers.size and not (numbers.min() >= 0 and numbers.max() <= MAX_TOKEN_ID):
        raise ValueError(f"{numbers.min()} or {numbers.max()} in place of a count")
    return _sized(numbers, size)


def _floats(values: Any, size: int) -> np.ndarray:
    return _sized(np.array([math.nan if v is None else v for v in values], np.float64), size)


def _unpacked(values: Mapping[str, Any], size: int) -> np.ndarray:
    return _floats(values["values"], size) * float(values["unit"])


def _sized(values: np.ndarray, size: int | None) -> np.ndarray:
    if values.ndim != 1 or size not in (None, values.size):
        raise ValueError(f"an array of shape {values.shape} in place of ({size},)")
    return values
