"""Built-in reward functions, with their published defaults.

    expressions    1 if the completion is an arithmetic expression equal to the column `target`
    exact_match    1 if the final answer equals the column `answer`
    math_verify    1 if math-verify finds the answer equal to the column `solution`; None if it
                   cannot parse the solution (TRL's accuracy_reward; needs the extra `math`), with
                   a time limit per row
    think_format   1 if the text is one <think>…</think> block and an answer (TRL)
    soft_overlong  0 to −1 over the last tokens of the budget (DAPO 2503.14476; TRL)
    cosine_length  correct answers score higher when short, wrong ones when long (Yeo et al.
                   2502.03373; open-r1)
    repetition     ≤ 0: minus the share of repeated n-grams (Yeo et al. 2502.03373; open-r1)

Completions are texts or lists of messages, of which the content of the last counts. Expressions are
parsed by recursive descent, never by `eval`, with caps on the work per completion:

    expression := term (('+' | '-') term)*
    term       := factor ('*' factor)*
    factor     := integer | '(' expression ')'
"""

import dataclasses
import functools
import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from ntkrl.messages import listed
from ntkrl.reward.row_limits import RowScores

THINK = re.compile(r"^<think>(?!.*<think>)(.*?)</think>.*$", re.DOTALL)
IN_WORKER = ("math_verify",)
"""Functions that need a worker process, since their calls may not return."""
MAX_CHARACTERS = 64
MAX_NESTING = 16
MAX_DIGITS = 6
DIGITS = "0123456789"  # str.isdigit accepts other scripts and superscripts


def text_of(completion: Any) -> str:
    """Return the text of a completion in either form."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def final_answer(text: str) -> str:
    r"""Return the text after the last `####`, else the last `\boxed{…}`, else the full text."""
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
    """Compare final answers, ignoring white space and a final full stop."""
    pairs = zip(completions, answer, strict=True)
    return [float(final_answer(text_of(c)) == final_answer(str(a))) for c, a in pairs]


@dataclasses.dataclass(frozen=True)
class MathVerify:
    """Compare mathematical answers by math-verify, as TRL's accuracy_reward does.

    A row that takes too long or fails gets `default`, and is counted in the metrics
    `math_verify/slow_rows` and `math_verify/failed_rows`.

    row_seconds: limit of a row, the limit of a comparison in math-verify.
    call_seconds: limit of all rows of a call; a part of reward.timeout, unless it is set.
    default: reward of those rows; TRL's is 0.
    """

    row_seconds: float = 5.0
    call_seconds: float = 45.0
    default: float = 0.0

    def __post_init__(self) -> None:
        if not (self.row_seconds > 0 and self.call_seconds > 0 and math.isfinite(self.default)):
            raise ValueError(
                "math_verify: row_seconds and call_seconds must be positive and default a number, "
                f"not {self.row_seconds}, {self.call_seconds} and {self.default}."
            )

    def prepare(self) -> None:
        """Import math-verify, which takes seconds; raise ValueError without it."""
        _math_comparison()

    def __call__(
        self,
        completions: Sequence[Any],
        solution: Sequence[Any],
        log_metric: Callable[[str, float], None] = lambda name, value: None,
    ) -> list[float | None]:
        """Return 1, 0 or None (a solution that math-verify cannot parse) per completion."""
        compare = _math_comparison()

        def score(row: int) -> float | None:
            return compare(text_of(completions[row]), str(solution[row]))

        count = len(completions)
        scores = RowScores(score, count, self.row_seconds, self.call_seconds)
        log_metric("math_verify/slow_rows", len(scores.slow))
        log_metric("math_verify/failed_rows", len(scores.failed))
        return [scores.values.get(row, self.default) for row in range(count)]


@functools.cache
def _math_comparison() -> Callable[[str, str], float | None]:
    """Return a function of a completion and its solution, without a time limit."""
    try:
        from latex2sympy2_extended import NormalizationConfig
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError as error:
        raise ValueError("math_verify needs the extra `math`: pip install 'ntkrl[math]'") from error
    for module in ("parser", "grader"):  # they warn that their own time limits are off
        logging.getLogger(f"math_verify.{module}").setLevel(logging.ERROR)
    extraction = LatexExtractionConfig(
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(units=True),
        try_extract_without_anchor=False,
    )

    def compare(completion: str, solution: str) -> float | None:
        gold = parse(solution, parsing_timeout=None)
        if not gold:
            return None
        answer = parse(
            completion,
            extraction_config=[extraction],
            extraction_mode="first_match",
            parsing_timeout=None,
        )
        # verify compares all pairs in order, and equal texts would wait for slow expressions
        texts, formulas = ([a for a in answer if isinstance(a, str) == kind] for kind in (1, 0))
        return float(any(verify(gold, part, timeout_seconds=None) for part in (texts, formulas)))

    for number in ("0.5", "x^2 + 1"):  # fills caches that every child process starts with
        compare(rf"\boxed{{{number}}}", f"${number}$")
    return compare


def think_format(completions: Sequence[Any]) -> list[float]:
    """Check for exactly one <think> block before the answer."""
    return [float(THINK.match(text_of(completion)) is not None) for completion in completions]


def soft_overlong(
    completion_ids: Sequence[Sequence[int]],
    max_completion_len: int = 16384,
    soft_punish_cache: int = 4096,
) -> list[float]:
    """Penalise completions near the token budget, linearly over its last tokens.

    Args:
      completion_ids: token ids of each completion.
      max_completion_len: tokens at which the penalty reaches 1; in a config, the run's budget
        unless it is set.
      soft_punish_cache: tokens over which it grows from 0.
    """
    over = [len(ids) - (max_completion_len - soft_punish_cache) for ids in completion_ids]
    return [-min(max(n / soft_punish_cache, 0.0), 1.0) for n in over]


@dataclasses.dataclass(frozen=True)
class CosineLength:
    """Score correct and wrong answers (by `exact_match`) along a half cosine of their length.

    Correct answers fall from `max_value_correct` to `min_value_correct`, wrong ones rise from
    `min_value_wrong` to `max_value_wrong`, over `max_tokens` tokens (Yeo et al., TRL) or, where
    that is None, `max_len` characters (open-r1), and stay constant beyond. In a config with
    neither, `max_tokens` is the run's budget.
    """

    min_value_wrong: float = -1.0
    max_value_wrong: float = -0.5
    min_value_correct: float = 0.5
    max_value_correct: float = 1.0
    max_len: int = 1000
    max_tokens: int | None = None

    def __call__(
        self,
        completions: Sequence[Any],
        answer: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] = (),
    ) -> list[float]:
        """Return one reward per completion; lengths in tokens need `completion_ids`."""
        if self.max_tokens is None:
            progress = [len(text_of(completion)) / self.max_len for completion in completions]
        else:
            progress = [len(ids) / self.max_tokens for ids in completion_ids]
        rewards = []
        for share, correct in zip(progress, exact_match(completions, answer), strict=True):
            start, end = self.min_value_wrong, self.max_value_wrong
            if correct:
                start, end = self.max_value_correct, self.min_value_correct
            cosine = math.cos(math.pi * min(share, 1.0))
            rewards.append(end + 0.5 * (start - end) * (1 + cosine))
        return rewards


def repetition(
    completions: Sequence[Any], ngram_size: int = 3, max_penalty: float = -1.0
) -> list[float]:
    """Penalise repeated n-grams of `ngram_size` words: max_penalty · (1 − distinct / all)."""
    rewards = []
    for completion in completions:
        words = text_of(completion).lower().split()
        ngrams = list(zip(*(words[i:] for i in range(ngram_size)), strict=False))
        share = 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
        rewards.append(share * max_penalty)
    return rewards


def evaluate(text: str) -> int | None:
    """Return the value of an expression, or None if it is not in the grammar or exceeds a cap.

    Caps: 64 characters, 16 nested parentheses, integers of 1 to 6 digits (leading zeros allowed).
    """
    if len(text) > MAX_CHARACTERS:
        return None
    parsed = _expression(text, 0, 0)
    if parsed is None or parsed[1] != len(text):
        return None
    return parsed[0]


def expression_score(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    target: Sequence[int | None],
    **columns: Any,
) -> list[float | None]:
    """Return 1 for expressions that equal their target by at least one operator, else 0.

    The target itself scores 0, since it only copies the prompt. A target of None gives None.

    Raises:
      ValueError: a target is neither an integer nor None.
    """
    wrong = [f"row {row}: {value!r}" for row, value in enumerate(target) if not _is_target(value)]
    if wrong:
        raise ValueError(f"the column 'target' must be integers (None where absent){listed(wrong)}")
    return [
        None if value is None else float(_solves(completion, value))
        for completion, value in zip(completions, target, strict=True)
    ]


def _is_target(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def _solves(completion: Any, target: int) -> bool:
    text = text_of(completion)
    # operators of the grammar are binary, so that one in a valid expression has operands
    return evaluate(text) == target and any(operator in text for operator in "+-*")


# Parsers map the text, a position and the nesting depth to (value, next position), or to None.


def _expression(text: str, at: int, nesting: int) -> tuple[int, int] | None:
    parsed = _term(text, at, nesting)
    while parsed is not None and text[parsed[1] : parsed[1] + 1] in ("+", "-"):
        value, at = parsed
        right = _term(text, at + 1, nesting)
        if right is None:
            return None
        parsed = (value + right[0] if text[at] == "+" else value - right[0], right[1])
    return parsed


def _term(text: str, at: int, nesting: int) -> tuple[int, int] | None:
    parsed = _factor(text, at, nesting)
    while parsed is not None and text[parsed[1] : parsed[1] + 1] == "*":
        right = _factor(text, parsed[1] + 1, nesting)
        if right is None:
            return None
        parsed = (parsed[0] * right[0], right[1])
    return parsed


def _factor(text: str, at: int, nesting: int) -> tuple[int, int] | None:
    if text[at : at + 1] == "(":
        if nesting == MAX_NESTING:
            return None
        inner = _expression(text, at + 1, nesting + 1)
        if inner is None or text[inner[1] : inner[1] + 1] != ")":
            return None
        return inner[0], inner[1] + 1
    end = at
    while end < len(text) and text[end] in DIGITS:
        end += 1
    if not 1 <= end - at <= MAX_DIGITS:
        return None
    return int(text[at:end]), end


BUILT_IN: dict[str, Callable[..., Any]] = {
    "expressions": expression_score,
    "exact_match": exact_match,
    "math_verify": MathVerify(),
    "think_format": think_format,
    "soft_overlong": soft_overlong,
    "cosine_length": CosineLength(),
    "repetition": repetition,
}
