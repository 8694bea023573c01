"""Built-in task: write an arithmetic expression that equals the target.

The prompt `24=` has very many correct completions, such as `3*8`, `4*7-4` and `(2+4)*4`, so that
the diversity of a policy can be measured. Expressions consist of non-negative integers, + - * and
parentheses.
"""

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from ntkrl import durable_files
from ntkrl.data.prompts import PromptSet

FIRST_TARGET, LAST_TARGET = 10, 49
TEST_TARGETS = 10
DIGITS = range(1, 10)
LAZY_SHARE = 0.2
FORMS: tuple[tuple[str, Callable[..., int]], ...] = (
    ("{}*{}", lambda a, b: a * b),
    ("{}*{}+{}", lambda a, b, c: a * b + c),
    ("{}+{}+{}", lambda a, b, c: a + b + c),
    ("{}+{}+{}+{}", lambda a, b, c, d: a + b + c + d),
    ("{}+{}+{}-{}", lambda a, b, c, d: a + b + c - d),
    ("{}+{}+{}+{}+{}", lambda a, b, c, d, e: a + b + c + d + e),
)
"""Forms of the supervised completions; every number is a digit from 1 to 9."""
SPLIT_SEED = 20260104
SPLITS = ("train", "test")
END, PADDING = "<|endoftext|>", "<|padding|>"


def targets(split: str) -> tuple[int, ...]:
    """Return the 30 targets of "train" or the 10 of "test", increasing; together 10 to 49.

    Raises:
      ValueError: another split.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed are {', '.join(map(repr, SPLITS))}.")
    every = np.arange(FIRST_TARGET, LAST_TARGET + 1)
    # the stream of RandomState is frozen, unlike that of default_rng, and the split must not change
    shuffled = np.random.RandomState(SPLIT_SEED).permutation(every)
    chosen = shuffled[:TEST_TARGETS] if split == "test" else shuffled[TEST_TARGETS:]
    return tuple(sorted(chosen.tolist()))


def expression_prompts(split: str) -> PromptSet:
    """Return a prompt such as `24=` per target of a split, with the column "target" (int).

    Raises:
      ValueError: a split other than "train" and "test".
    """
    values = targets(split)
    return PromptSet(
        prompts=tuple(f"{target}=" for target in values),
        columns={"target": list(values)},
        source=f"expressions ({split})",
    )


def supervised_set(size: int, seed: int) -> PromptSet:
    """Draw prompts of both splits with columns "target" and "completion", some of them lazy.

    The base model sees all targets, as a pretrained model would; only RL is limited to the train
    split. A lazy completion repeats the number, `24` for `24=`, and earns no reward, so that RL has
    more to unlearn than wrong arithmetic. Each row draws a target uniformly; unless lazy, it then
    draws one of the FORMS that reach the target and one of its expressions, each uniformly.

    Args:
      size: rows, ≥ 1.
      seed: ≥ 0; the rows are a function of size and seed.

    Raises:
      ValueError: an argument outside its range.
    """
    if size < 1 or seed < 0:
        raise ValueError(f"size is {size} and seed is {seed}; size must be ≥ 1 and seed ≥ 0.")
    generator = np.random.default_rng(seed)
    drawn = [int(target) for target in generator.integers(FIRST_TARGET, LAST_TARGET + 1, size)]
    return PromptSet(
        prompts=tuple(f"{target}=" for target in drawn),
        columns={
            "target": drawn,
            "completion": [_expression(target, generator) for target in drawn],
        },
        source=f"expressions (supervised, seed {seed})",
    )


def characters() -> tuple[str, ...]:
    """Return the 16 symbols of prompts and completions."""
    return tuple("0123456789+-*()=")


def save_tokenizer(directory: str | Path) -> None:
    """Write a Hugging Face tokenizer with one token per character, creating the directory.

    Ids: 0 is `<|endoftext|>` (end of sequence), 1 is `<|padding|>`, then `characters()`. Encoding
    any other character is an error. `AutoTokenizer` loads it.
    """
    tokens = (END, PADDING, *characters())
    # WordLevel without an unknown token raises on other characters; BPE would drop them
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([END, PADDING])
    # older transformers do not know the class name that `save_pretrained` writes
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PADDING,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    directory = Path(directory)
    durable_files.save_text(directory / "tokenizer.json", backend.to_str(pretty=True))
    text = json.dumps(settings, indent=2) + "\n"
    durable_files.save_text(directory / "tokenizer_config.json", text)


@functools.cache
def solutions(target: int) -> tuple[tuple[str, ...], ...]:
    """Return all expressions of supervised data for a target, a tuple per form that reaches it."""
    return tuple(texts for form in range(len(FORMS)) if (texts := _table(form)[target]))


@functools.cache
def _table(form: int) -> dict[int, tuple[str, ...]]:
    template, value = FORMS[form]
    table: dict[int, list[str]] = {t: [] for t in range(FIRST_TARGET, LAST_TARGET + 1)}
    for digits in itertools.product(DIGITS, repeat=template.count("{}")):
        if value(*digits) in table:
            table[value(*digits)].append(template.format(*digits))
    return {target: tuple(texts) for target, texts in table.items()}


def _expression(target: int, generator: np.random.Generator) -> str:
    if generator.random() < LAZY_SHARE:
        return str(target)
    forms = solutions(target)
    texts = forms[generator.integers(len(forms))]
    return texts[generator.integers(len(texts))]
