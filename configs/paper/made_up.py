"""Tiny models and synthetic data in the published formats, for configs/paper/miniature.py.

Command:
    python -m ntkrl.configs.paper.made_up DIRECTORY

    DIRECTORY/pythia, llama    policies: random weights, byte-level tokenizers with the special
                               tokens of Pythia and of Llama 3.2
    DIRECTORY/reward           a reward model of ArmoRM's shape, with Llama 3's token ids
    DIRECTORY/alpaca_farm/alpaca_instructions/sft.json        a JSON list
    DIRECTORY/ultrafeedback_binarized/data/train_prefs-*.parquet    shards
    DIRECTORY/ultrafeedback_binarized/test_prefs/             a saved dataset
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from ntkrl import data, durable_files
from ntkrl.models import build, export, write_new_scorer

QUESTIONS = ("{}+{}=", "Add {} and {}.", "What is {} plus {}?", "Sum of {}, {}?")
LONG_QUESTION = "Tell me all that you know of {} and of {}, one after the other."
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 128,
}
LLAMA = {**SHAPE, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA_3_IDS = {
    "<|begin_of_text|>": 128000,
    "<|start_header_id|>": 128006,
    "<|end_header_id|>": 128007,
    "<|eot_id|>": 128009,
    "[PAD]": 128256,
}


def write(directory: Path) -> None:
    """Write all inputs atomically, unless the directory exists."""
    if directory.exists():
        return
    data.import_pyarrow(directory)  # fail before any work is done
    with durable_files.replacing_directory(directory) as fresh:
        _write_models(fresh)
        _write_examples(fresh / "alpaca_farm" / "alpaca_instructions")
        _write_preferences(fresh / "ultrafeedback_binarized")


def _write_models(directory: Path) -> None:
    special = {"<|endoftext|>": 0, "<|padding|>": 1}
    named = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    _write_tokenizer(directory / "tokens", special, {**named, "pad_token": "<|padding|>"})
    # more rows than tokens, as Pythia has
    raw = {**SHAPE, "vocab_size": 304, "rotary_pct": 0.25, "bos_token_id": 0, "eos_token_id": 0}
    _write_policy(directory / "pythia", "GPTNeoXForCausalLM", raw, directory / "tokens")
    special = {"<|begin_of_text|>": 256, "<|end_of_text|>": 257}
    named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    _write_tokenizer(directory / "tokens", special, named)
    # one matrix for both ends, and no row to spare, as Llama 3.2 has
    raw = {**LLAMA, "vocab_size": 258, "tie_word_embeddings": True}
    raw |= {"bos_token_id": 256, "eos_token_id": 257}
    _write_policy(directory / "llama", "LlamaForCausalLM", raw, directory / "tokens")
    named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "[PAD]"}
    words = {"\n\n": 271, "assistant": 78191}
    named["chat_template"] = LLAMA_3
    _write_tokenizer(directory / "tokens", LLAMA_3_IDS, named, words)
    raw = {
        **LLAMA,
        "architectures": ["LlamaForRewardModelWithGating"],
        "num_hidden_layers": 1,
        "vocab_size": 128_257,
        "pad_token_id": 128_256,
        "bos_token_id": 128_000,
        "eos_token_id": 128_009,
        "num_objectives": 19,
        "gating_hidden_dim": 8,
        "gating_n_hidden": 3,
        "gating_temperature": 10,
    }
    write_new_scorer(directory / "reward", raw, jax.random.key(2), directory / "tokens")
    shutil.rmtree(directory / "tokens")


def _write_policy(path: Path, architecture: str, raw: Mapping[str, Any], tokens: Path) -> None:
    policy, params = build(architecture, dict(raw), jax.random.key(1))
    export(path, policy, params, str(tokens))


def _write_tokenizer(
    directory: Path,
    special: Mapping[str, int],
    named: Mapping[str, str],
    words: Mapping[str, int] | None = None,
) -> None:
    """Write a tokenizer with one token per byte, per word of `words` and per special token."""
    words = {} if words is None else words
    used = {*special.values(), *words.values()}
    unused = (number for number in range(2**17) if number not in used)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    as_bytes = {byte_level.pre_tokenize_str(word)[0][0]: number for word, number in words.items()}
    vocabulary = {**special, **as_bytes} | {letter: next(unused) for letter in alphabet}
    backend = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    pattern = Regex("|".join([*words, r"[\s\S]"]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), byte_level]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        **named,
    }
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _questions(count: int, seed: int) -> list[tuple[str, str, str]]:
    """Return questions with a right and a wrong answer; one in ten is long."""
    generator = np.random.default_rng(seed)
    questions = []
    for number in range(count):
        a, b = (int(value) for value in generator.integers(1, 50, 2))
        template = LONG_QUESTION if number % 10 == 9 else QUESTIONS[number % len(QUESTIONS)]
        wrong = f"{a + b + int(generator.integers(1, 9))}!"
        questions.append((template.format(a, b), f"{a + b}", wrong))
    return questions


def _write_examples(directory: Path) -> None:
    directory.mkdir(parents=True)
    for split, count, seed in (("sft", 27, 0), ("val", 4, 1)):
        rows = [
            {"instruction": question, "input": "" if number % 3 else "Be brief.", "output": right}
            for number, (question, right, _) in enumerate(_questions(count, seed))
        ]
        (directory / f"{split}.json").write_text(json.dumps(rows, indent=2) + "\n")


def _preference(number: int, question: str, right: str, wrong: str) -> dict[str, Any]:
    turn = {"content": question, "role": "user"}
    chosen, rejected = ([turn, {"content": text, "role": "assistant"}] for text in (right, wrong))
    return {
        "prompt": question,
        "prompt_id": f"{number:064x}",
        "chosen": chosen,
        "rejected": rejected,
        "messages": chosen,
        "score_chosen": 8.0,
        "score_rejected": 6.5,
    }


def _write_preferences(directory: Path) -> None:
    """Write the training split as shards, the test split as `datasets` saves one."""
    from pyarrow import Table, ipc, parquet

    rows = [_preference(number, *question) for number, question in enumerate(_questions(44, 2))]
    (directory / "data").mkdir(parents=True)
    for shard, shard_rows in enumerate((rows[:22], rows[22:])):
        path = directory / "data" / f"train_prefs-{shard:05d}-of-00002.parquet"
        parquet.write_table(Table.from_pylist(shard_rows), path)
    questions = enumerate(_questions(9, 3))
    test = Table.from_pylist([_preference(number, *question) for number, question in questions])
    saved = directory / "test_prefs"
    saved.mkdir()
    name = "data-00000-of-00001.arrow"
    with ipc.new_stream(str(saved / name), test.schema) as stream:
        stream.write_table(test)
    _write_json(saved / "dataset_info.json", {"features": _features(test.schema.names)})
    state = {"_data_files": [{"filename": name}], "_fingerprint": "made-up", "_split": "test_prefs"}
    state |= dict.fromkeys(("_format_columns", "_format_type"))
    _write_json(saved / "state.json", {**state, "_format_kwargs": {}, "_output_all_columns": False})


def _features(names: Sequence[str]) -> dict[str, Any]:
    """Describe the columns as `datasets` does."""
    text, number = ({"dtype": dtype, "_type": "Value"} for dtype in ("string", "float64"))
    message = {"content": text, "role": text}
    messages = {"feature": message, "_type": "List"}
    kinds = {"prompt": text, "prompt_id": text, "score_chosen": number, "score_rejected": number}
    return {name: kinds[name] if name in kinds else messages for name in names}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
