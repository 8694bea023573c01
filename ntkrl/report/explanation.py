"""Causes of a change in one optimizer step, from its ledger, in words and numbers."""

from __future__ import annotations

import dataclasses
import numbers

import numpy as np

from ntkrl.messages import did_you_mean
from ntkrl.report.records import MEASURES, StepLedger
from ntkrl.report.runs import Run
from ntkrl.report.terminal import cut, waterfall_lines

QUANTITIES = {"log_prob": "log π", "entropy": "entropy"}
WIDTH = 100


@dataclasses.dataclass(frozen=True)
class Place:
    """The probe tokens whose change is explained.

    prompt: number of a probe prompt, or a part of its text; None for the one that changed most.
    completion: number of a probe completion, or None for all of the prompt.
    token: number of one of its tokens, from 0, or None for all.
    """

    prompt: int | str | None = None
    completion: int | None = None
    token: int | None = None


@dataclasses.dataclass(frozen=True)
class Cause:
    """A contribution to a change (nats).

    name: of a part, a group of parameters, a token or a sample.
    change: R and G together. R, G: of a sample, through the classifier and through the rest.
    """

    name: str
    change: float
    R: float = float("nan")
    G: float = float("nan")


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The change of a quantity in a step, and its causes.

    title: the step and the place. measure: "log_prob" or "entropy".
    tokens: number of probe tokens. change: its sum over them (nats).
    parts: R and G of each term, momentum, decay, optimizer and curvature; they add up to it.
    groups: of parameters, over all samples. samples, places: by size, the largest first.
    """

    title: str
    measure: str
    tokens: int
    change: float
    parts: tuple[Cause, ...]
    groups: tuple[Cause, ...]
    samples: tuple[Cause, ...]
    places: tuple[Cause, ...]

    def __str__(self) -> str:
        verb = "rose" if self.change > 0 else "fell"
        words = f"{verb} by {abs(self.change):.3g} nats:" if self.change else "did not change:"
        lines = [
            self.title,
            f"Σ {QUANTITIES[self.measure]} over {self.tokens} tokens {words}",
            *waterfall_lines(
                {**{part.name: part.change for part in self.parts}, "actual": self.change}, WIDTH
            ),
        ]
        for title, causes in (
            ("by group of parameters", self.groups),
            ("by sample (R and G: through the classifier, through the rest)", self.samples),
            ("where", self.places),
        ):
            if causes:
                lines += ["", f"{title}, nats", *map(_line, causes)]
        return "\n".join(lines)


def find_ledger(run: Run, step: int) -> StepLedger:
    """Return the ledger of an optimizer step.

    Raises:
      ValueError: there is none; the message names the steps that have one.
    """
    if step in run.ledgers:
        return run.ledgers[step]
    problem = f"no ledger of step {step}; ledgers are of steps {', '.join(map(str, run.ledgers))}"
    notes = "".join(f" {note}." for note in run.notes if note.startswith("ledger/"))
    raise ValueError(
        f"{run.path} has {problem if run.ledgers else 'no ledgers'}. probe.ledger_every_steps sets "
        f"the rollout steps that get one.{notes}"
    )


def explain(
    run: Run,
    step: int | None = None,
    measure: str = "entropy",
    place: Place | None = None,
    top: int = 5,
) -> Explanation:
    """Explain the change of a quantity of some probe tokens in an optimizer step.

    Args:
      run: with ledgers.
      step: an optimizer step with a ledger; None for the last.
      measure: "entropy" or "log_prob".
      place: the tokens; None for those of the prompt that changed most.
      top: most samples and places listed.

    Raises:
      ValueError: no such ledger, measure, prompt, completion or token.
    """
    if measure not in MEASURES:
        hint = did_you_mean(str(measure), MEASURES) or "."
        raise ValueError(f"measure must be one of {', '.join(MEASURES)}, not {measure!r}{hint}")
    if not _is_number(top) or top < 1:
        raise ValueError(f"top must be a whole number ≥ 1, not {top!r}.")
    last = max(run.ledgers, default=0)
    ledger = find_ledger(run, last if step is None else step)
    tokens, words = _chosen(ledger, measure, place or Place())
    parts = [Cause(name, _sum(v, tokens)) for name, v in ledger.parts[measure].items()]
    groups = [Cause(name, _sum(v, tokens)) for name, v in ledger.terms[measure].items()]
    if len([group for group in groups if group.name != "head"]) < 2:
        groups = []  # R and G themselves
    return Explanation(
        title=f"{run.name}, seed {run.seed}, optimizer step {ledger.step}, {words}",
        measure=measure,
        tokens=len(tokens),
        change=_sum(ledger.actual[measure], tokens),
        parts=tuple(parts),
        groups=tuple(_largest(groups, len(groups))),
        samples=tuple(_largest(_samples(ledger, measure, tokens), top)),
        places=tuple(_largest(_places(ledger, measure, tokens), top)),
    )


def _chosen(ledger: StepLedger, measure: str, place: Place) -> tuple[np.ndarray, str]:
    """Return the chosen probe tokens, and words for them."""
    completions = ledger.texts.completions
    prompts = list(dict.fromkeys(completion.prompt for completion in completions))
    rows = list(range(len(completions)))
    if place.completion is not None:
        if place.prompt is not None:
            raise ValueError("choose a prompt or a completion, not both.")
        _check(place.completion, len(completions), "completion", "probe completions")
        rows = [place.completion]
        words = f"probe completion {place.completion}: {_text(ledger, place.completion)}"
    else:
        changes = ledger.texts.sums(ledger.actual[measure])
        number = _prompt(place.prompt, prompts, [c.prompt for c in completions], changes)
        rows = [row for row in rows if completions[row].prompt == prompts[number]]
        words = f"probe prompt {number}: {_short(prompts[number])}"
    starts = np.cumsum([0, *(len(completion.tokens) for completion in completions)])
    if place.token is None:
        return np.concatenate([np.arange(starts[row], starts[row + 1]) for row in rows]), words
    if place.completion is None:
        raise ValueError("a token needs the number of its completion too.")
    row = place.completion
    _check(place.token, len(completions[row].tokens), "token", f"tokens in completion {row}")
    word = completions[row].tokens[place.token]
    return np.array([starts[row] + place.token]), f"token {place.token} ({word!r}) of {words}"


def _prompt(
    prompt: int | str | None, prompts: list[str], by_completion: list[str], changes: np.ndarray
) -> int:
    """Return the number of a probe prompt."""
    if prompt is None:
        sums = [
            abs(
                sum(
                    change for text, change in zip(by_completion, changes, strict=True) if text == p
                )
            )
            for p in prompts
        ]
        return int(np.argmax(sums))
    if not isinstance(prompt, str):
        _check(prompt, len(prompts), "prompt", "probe prompts")
        return prompt
    matching = [number for number, text in enumerate(prompts) if prompt in text]
    if len(matching) != 1:
        listed = "; ".join(f"{number}: {_short(text)}" for number, text in enumerate(prompts))
        count = "no probe prompt" if not matching else f"{len(matching)} probe prompts"
        raise ValueError(f"{count} with {prompt!r}; there are {listed}.")
    return matching[0]


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _check(number: int, count: int, kind: str, things: str) -> None:
    if not _is_number(number):
        raise ValueError(f"{kind} must be a whole number, not {number!r}.")
    if not 0 <= number < count:
        raise ValueError(f"{kind} {number} does not exist: there are {count} {things}, from 0.")


def _samples(ledger: StepLedger, measure: str, tokens: np.ndarray) -> list[Cause]:
    if ledger.by != "sample":
        return []
    head_B, body_B = (values[tokens].sum(axis=0) for values in ledger.roles(measure))
    return [
        Cause(
            f"#{number}, A {sample.advantage:+.2f}: "
            + _short(f"{sample.prompt} → {sample.completion}"),
            float(r + g),
            float(r),
            float(g),
        )
        for number, (sample, r, g) in enumerate(zip(ledger.samples, head_B, body_B, strict=True))
    ]


def _places(ledger: StepLedger, measure: str, tokens: np.ndarray) -> list[Cause]:
    """Return the change of each chosen token; none of a single one."""
    if len(tokens) == 1:
        return []
    names = [
        f"{text!r} at {place} of completion {row}"
        for row, completion in enumerate(ledger.texts.completions)
        for place, text in enumerate(completion.tokens)
    ]
    return [Cause(names[token], float(ledger.actual[measure][token])) for token in tokens]


def _largest(causes: list[Cause], count: int) -> list[Cause]:
    return sorted(causes, key=lambda cause: -abs(cause.change))[:count]


def _sum(values: np.ndarray, tokens: np.ndarray) -> float:
    return float(values[tokens].sum(dtype=float))


def _line(cause: Cause) -> str:
    roles = "" if np.isnan(cause.R) else f" R {cause.R:+9.2g} G {cause.G:+9.2g}"
    return cut(f"  {cause.change:+9.3g}{roles}  {cause.name}", WIDTH)


def _text(ledger: StepLedger, row: int) -> str:
    completion = ledger.texts.completions[row]
    return _short(f"{completion.prompt} → {completion.text}")


def _short(text: str) -> str:
    return cut(" ".join(text.split()), WIDTH // 2)
