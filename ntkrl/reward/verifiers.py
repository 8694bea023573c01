"""Built-in reward functions, with their published defaults.

    exact_match    1 where the final answer equals the column `answer`
    math_verify    1 where math-verify finds the answer equal to the column `solution`; None where
                   the solution cannot be read (TRL's accuracy_reward; needs the extra `math`)
    think_format   1 where the text is one <think>…</think> block and an answer (TRL)
    soft_overlong  0 to −1 over the last tokens of the budget (DAPO 2503.14476; TRL)
    cosine_length  right answers are worth more when short, wrong ones less bad when long (Yeo et
                   al. 2502.03373; open-r1)
    repetition     ≤ 0: the share of repeated n-grams (Yeo et al. 2502.03373; open-r1)

Completions come as texts or as lists of messages, of which the last one's content counts.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ntkrl.reward import expressions

THINK = re.compile(r"^<think>(?!.*<think>)(.*?)</think>.*$", re.DOTALL)
IN_PROCESS = ("math_verify",)
"""Those that a process of their own has to serve: what they call may not return."""


def text_of(completion: Any) -> str:
    """Return the text of a completion in either form."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def final_answer(text: str) -> str:
    r"""Return what follows the last `####`, else the last `\boxed{…}`, else the whole text."""
    if "####" in text:
        return _plain(text.rsplit("####", 1)[1])
    start = text.rfind(r"\boxed{")
    if start < 0:
        return _plain(text)
    depth = 0
    for end in range(start + len(r"\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if not depth:
            return _plain(text[start + len(r"\boxed{") : end])
    return _plain(text)


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".")


def exact_match(completions: Sequence[Any], answer: Sequence[Any]) -> list[float]:
    """Compare final answers, white space and a full stop at the end aside."""
    pairs = zip(completions, answer, strict=True)
    return [float(final_answer(text_of(c)) == final_answer(str(a))) for c, a in pairs]


def math_verify(completions: Sequence[Any], solution: Sequence[Any]) -> list[float | None]:
    """Compare mathematical answers by math-verify, as TRL's accuracy_reward does."""
    try:
        from latex2sympy2_extended import NormalizationConfig
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError as error:
        raise ValueError("math_verify needs the extra `math`: pip install 'ntkrl[math]'") from error
    normal = NormalizationConfig(units=True)
    extraction = LatexExtractionConfig(
        boxed_match_priority=0,
        normalization_config=normal,
        try_extract_without_anchor=False,
    )
    rewards: list[float | None] = []
    for completion, wanted in zip(completions, solution, strict=True):
        gold = parse(str(wanted))
        if not gold:
            rewards.append(None)
            continue
        found = parse(
            text_of(completion), extraction_config=[extraction], extraction_mode="first_match"
        )
        rewards.append(float(verify(gold, found)))
    return rewards


def think_format(completions: Sequence[Any]) -> list[float]:
    """Check for one block of thought before the answer."""
    return [float(THINK.match(text_of(completion)) is not None) for completion in completions]


def soft_overlong(
    completion_ids: Sequence[Sequence[int]],
    max_completion_len: int = 16384,
    soft_punish_cache: int = 4096,
) -> list[float]:
    """Punish completions that come near the budget, linearly over the last tokens.

    Args:
      completion_ids: token ids of each completion.
      max_completion_len: tokens, from which on the punishment is 1.
      soft_punish_cache: tokens before that over which it grows.
    """
    over = [len(ids) - (max_completion_len - soft_punish_cache) for ids in completion_ids]
    return [-min(max(n / soft_punish_cache, 0.0), 1.0) for n in over]


def cosine_length(
    completions: Sequence[Any],
    answer: Sequence[Any],
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
    max_len: int = 1000,
) -> list[float]:
    """Scale right and wrong (by `exact_match`) along a half cosine of the length in characters.

    Right answers fall from `max_value_correct` to `min_value_correct`, wrong ones rise from
    `min_value_wrong` to `max_value_wrong`, over `max_len` characters; longer ones stay at the end.
    """
    rewards = []
    right = exact_match(completions, answer)
    for completion, correct in zip(completions, right, strict=True):
        start, end = (
            (max_value_correct, min_value_correct)
            if correct
            else (min_value_wrong, max_value_wrong)
        )
        progress = min(len(text_of(completion)) / max_len, 1.0)
        rewards.append(end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress)))
    return rewards


def repetition(
    completions: Sequence[Any], ngram_size: int = 3, max_penalty: float = -1.0
) -> list[float]:
    """Punish n-grams of words that occur again: max_penalty · (1 − distinct / all).

    Args:
      completions: the completions.
      ngram_size: words in a row, n.
      max_penalty: ≤ 0.
    """
    rewards = []
    for completion in completions:
        words = text_of(completion).lower().split()
        ngrams = list(zip(*(words[i:] for i in range(ngram_size)), strict=False))
        share = 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
        rewards.append(share * max_penalty)
    return rewards


BUILT_IN: dict[str, Callable[..., Any]] = {
    "expressions": expressions.score,
    "exact_match": exact_match,
    "math_verify": math_verify,
    "think_format": think_format,
    "soft_overlong": soft_overlong,
    "cosine_length": cosine_length,
    "repetition": repetition,
}


def built_in(name: str, options: Mapping[str, Any]) -> Callable[..., Any]:
    """Return a built-in function with some of its defaults replaced."""
    function = BUILT_IN[name]
    return functools.partial(function, **options) if options else function
