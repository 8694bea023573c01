"""The built-in task: write an expression that equals the target.

The prompt `24=` is answered by `3*8`, `4*7-4`, `(2+4)*4` and very many others, so that one
can watch a policy keep or lose its alternatives. An expression is made of non-negative
integers, + - * and parentheses.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from ntkrl.data.prompts import PromptSet

FIRST_TARGET, LAST_TARGET = 10, 49
HELD_OUT = 10
DIGITS = range(1, 10)
LAZY = 0.2
FORMS: tuple[tuple[str, Callable[..., int]], ...] = (
    ("{}*{}", lambda a, b: a * b),
    ("{}*{}+{}", lambda a, b, c: a * b + c),
    ("{}+{}+{}", lambda a, b, c: a + b + c),
    ("{}+{}+{}+{}", lambda a, b, c, d: a + b + c + d),
    ("{}+{}+{}-{}", lambda a, b, c, d: a + b + c - d),
    ("{}+{}+{}+{}+{}", lambda a, b, c, d, e: a + b + c + d + e),
)
"""Shapes of the supervised completions; every number in them is a digit from 1 to 9."""
SPLIT_SEED = 20260104
SPLITS = ("train", "test")
END, PADDING = "<|endoftext|>", "<|padding|>"


def targets(split: str) -> tuple[int, ...]:
    """Return the targets of a split, increasing.

    Args:
      split: "train" (30 targets) or "test" (10 held-out targets).

    Returns:
      Integers from 10 to 49; the two splits are disjoint and cover them all.

    Raises:
      ValueError: another split.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed are {', '.join(map(repr, SPLITS))}.")
    every = np.arange(FIRST_TARGET, LAST_TARGET + 1)
    # RandomState and not default_rng: its stream is frozen, and the split must never move.
    shuffled = np.random.RandomState(SPLIT_SEED).permutation(every)
    chosen = shuffled[:HELD_OUT] if split == "test" else shuffled[HELD_OUT:]
    return tuple(sorted(chosen.tolist()))


def prompt_set(split: str) -> PromptSet:
    """Return one prompt per target of a split, with the column "target" (int).

    Args:
      split: "train" or "test".

    Returns:
      Standard prompts such as `24=`, targets increasing.

    Raises:
      ValueError: another split.
    """
    values = targets(split)
    return PromptSet(
        prompts=tuple(f"{target}=" for target in values),
        columns={"target": list(values)},
        source=f"expressions ({split})",
    )


def supervised_set(size: int, seed: int) -> PromptSet:
    """Draw prompts of both splits with a completion each, two in ten of them lazy.

    A base model knows every number, as a pretrained one does; it is RL that sees the prompts of
    the train split alone. Like a pretraining corpus, the data is not all to the point: a lazy
    completion repeats the number, `24` for `24=`, and earns no reward. It leaves RL something
    to unlearn besides wrong arithmetic.

    Each row draws a target uniformly; unless lazy, then one of the FORMS that reach it
    uniformly, then one of that form's expressions uniformly.

    Args:
      size: rows, ≥ 1.
      seed: ≥ 0; the rows are a function of size and seed.

    Returns:
      Prompts with the columns "target" (int) and "completion" (text).

    Raises:
      ValueError: an argument outside its range.
    """
    if size < 1 or seed < 0:
        raise ValueError(f"size is {size} and seed is {seed}; size is 1 or more, seed 0 or more.")
    generator = np.random.default_rng(seed)
    chosen = [int(target) for target in generator.integers(FIRST_TARGET, LAST_TARGET + 1, size)]
    return PromptSet(
        prompts=tuple(f"{target}=" for target in chosen),
        columns={
            "target": chosen,
            "completion": [_expression(target, generator) for target in chosen],
        },
        source=f"expressions (supervised, seed {seed})",
    )


def characters() -> tuple[str, ...]:
    """Return the 16 symbols of prompts and completions."""
    return tuple("0123456789+-*()=")


def save_tokenizer(directory: str | Path) -> None:
    """Write a Hugging Face tokenizer with one token per character.

    Ids: 0 is `<|endoftext|>` (end of sequence), 1 is `<|padding|>`, then `characters()`. Any
    other character is an error when encoding, never dropped. `AutoTokenizer` loads it.

    Args:
      directory: made if missing.
    """
    tokens = (END, PADDING, *characters())
    # WordLevel without an unknown token raises on other characters; BPE would drop them.
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([END, PADDING])
    # By hand and not by `save_pretrained`, whose class name older transformers do not know.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PADDING,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


@functools.cache
def solutions(target: int) -> tuple[tuple[str, ...], ...]:
    """Return every expression that supervised data may show for a target.

    Args:
      target: the value wanted.

    Returns:
      One tuple of expressions per form that can reach the target.
    """
    return tuple(found for form in range(len(FORMS)) if (found := _table(form)[target]))


@functools.cache
def _table(form: int) -> dict[int, tuple[str, ...]]:
    template, value = FORMS[form]
    found: dict[int, list[str]] = {t: [] for t in range(FIRST_TARGET, LAST_TARGET + 1)}
    for digits in itertools.product(DIGITS, repeat=template.count("{}")):
        if value(*digits) in found:
            found[value(*digits)].append(template.format(*digits))
    return {target: tuple(texts) for target, texts in found.items()}


def _expression(target: int, generator: np.random.Generator) -> str:
    if generator.random() < LAZY:
        return str(target)
    forms = solutions(target)
    chosen = forms[generator.integers(len(forms))]
    return chosen[generator.integers(len(chosen))]
