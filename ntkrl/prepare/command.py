"""`ntkrl prepare`: published examples and preferences into the files of a setting.

Writes into the run directory:

    sft.jsonl             prompt, completion
    reward.jsonl          prompt, chosen, rejected, scores: the part for reward models
    rl.jsonl, test.jsonl  the same of the part for RL, and of the test split
    rl_selected.jsonl, test_selected.jsonl    some of either, for statistics and evaluation
    scores/               rewards of every pair
    summary.json          what was read, left out, swapped and written; last
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from ntkrl import data, models, runtime
from ntkrl.prepare import made_up, schemas
from ntkrl.prepare.labels import scores_of
from ntkrl.prepare.splits import select, split
from ntkrl.settings import RunSettings, read_settings
from ntkrl.setup import load_rewards

SUMMARY = "summary.json"
TOGETHER = 1024  # texts encoded at a time, between looks at the progress


@dataclasses.dataclass(frozen=True)
class PrepareSettings:
    """What is made of what; paths as in data/published.py.

    supervised: rows of instruction, input and output; None: chosen responses of the reward part.
    preferences, test: rows of prompt, chosen and rejected.
    tokenizer: model whose tokens are counted, or None for the config's model.
    max_tokens: of a prompt and of a response, ≥ 1, without what a template writes.
    relabel: order every pair by the config's reward function.
    reward_share: of the preferences, for reward models, in (0, 1); the rest is for RL.
    split_seed, selection_seed: ≥ 0.
    selected: prompts chosen of RL's and of the test split, ≥ 1.
    made_up: directory where tiny models and data are written first if it is missing, or None.
    """

    supervised: str | None
    preferences: str
    test: str
    tokenizer: str | None
    max_tokens: int
    relabel: bool
    reward_share: float
    split_seed: int
    selected: int
    selection_seed: int
    made_up: str | None

    def __post_init__(self):
        problems = [
            f"prepare.{name} must be ≥ {least}, not {getattr(self, name)}"
            for name, least in (("max_tokens", 1), ("selected", 1), ("split_seed", 0))
            if getattr(self, name) < least
        ]
        if self.selection_seed < 0:
            problems.append(f"prepare.selection_seed must be ≥ 0, not {self.selection_seed}")
        if not 0 < self.reward_share < 1:
            problems.append(f"prepare.reward_share must be in (0, 1), not {self.reward_share}")
        if problems:
            raise ValueError("; ".join(problems) + ".")


def prepare(config: ConfigDict) -> Path:
    """Prepare the data of a setting; return the directory. Finished work is not done again.

    Args:
      config: see configs/paper/data.py; `prepare`, `model`, `reward`, `mesh` and `run_dir` count.

    Raises:
      ValueError: a mistake in the config or the files it names, a config or inputs that differ
        from those that the directory was begun with, or a reward function's fault.
    """
    if "prepare" not in config:
        raise ValueError("this config has no section prepare; see configs/paper/data.py.")
    directory = Path(config.run_dir)
    asked = runtime.read_section(PrepareSettings, config.prepare, "prepare")
    settings = read_settings(config)
    given = runtime.to_json(config)
    runtime.check_alike("config", given)
    runtime.check_claim(directory, given)
    if runtime.agree("whether it is prepared", (directory / SUMMARY).exists())[0]:
        runtime.tell(f"{directory} is prepared; remove it to prepare again.")
        return directory
    if asked.made_up is not None:
        if runtime.is_writer():
            made_up.write(Path(asked.made_up))
        runtime.agree("the made-up inputs")
    parts = _read(asked, settings)
    if runtime.is_writer():
        runtime.claim(directory, given)
    runtime.agree("the config")
    if asked.relabel:
        _label(parts, settings, directory)
    if runtime.is_writer():
        _write(asked, parts, directory)
    runtime.agree("the end of preparing")
    return directory


@dataclasses.dataclass(eq=False)
class Part:
    """An input: its rows that are kept, what was counted on the way, the digest of its files."""

    kept: data.PromptSet
    counts: dict[str, Any]
    digest: str


def _read(asked: PrepareSettings, settings: RunSettings) -> dict[str, Part]:
    """Read every input and leave out what is too long; problems of all in one message."""
    problems, parts, tokenizer = runtime.ErrorCollector(), {}, None
    with problems:
        source = settings.model.path if asked.tokenizer is None else asked.tokenizer
        tokenizer = data.load_tokenizer(models.tokenizer_directory(source))
    for name in ("supervised", "preferences", "test"):
        path = getattr(asked, name)
        with problems:
            if path is not None:
                parts[name] = _part(path, name == "supervised")
    problems.finish()
    for name, part in parts.items():
        _leave_out_long(name, part, tokenizer, asked.max_tokens)
    return parts


def _part(path: str, supervised: bool) -> Part:
    files, found = data.files_of(path), data.read_rows(path)
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    rows = [(number, row) for number, row in found.rows if not schemas.without_prompt(row)]
    convert = schemas.examples if supervised else schemas.preferences
    counts = {
        "path": path,
        "files": [file.name for file in files],
        "sha256": digest.hexdigest(),
        "rows": len(found.rows),
        "without_prompt": len(found.rows) - len(rows),
    }
    return Part(convert(found._replace(rows=rows)), counts, digest.hexdigest())


def _leave_out_long(name: str, part: Part, tokenizer: Any, most: int) -> None:
    texts = {"prompt": part.kept.prompts} | {
        column: part.kept.columns[column]
        for column in ("completion", "chosen", "rejected")
        if column in part.kept.columns
    }
    size = len(part.kept.prompts)
    fits = np.ones(size, bool)
    shown = {"desc": f"tokens of {name}", "total": size * len(texts), "mininterval": 0.5}
    with tqdm(disable=not runtime.is_writer(), **shown) as bar:
        for column, conversations in texts.items():
            lengths = _lengths(conversations, tokenizer, bar)
            fits &= lengths <= most
            part.counts[f"{column}_too_long"] = int(np.sum(lengths > most))
    part.kept = data.take(part.kept, np.flatnonzero(fits))
    part.counts["kept"] = int(fits.sum())
    if not fits.any():
        raise ValueError(f"{part.counts['path']}: no row has at most {most} tokens in every text.")


def _lengths(conversations: Sequence[Any], tokenizer: Any, bar: tqdm) -> np.ndarray:
    """Return the tokens of each conversation's messages, without a template's."""
    found = []
    for first in range(0, len(conversations), TOGETHER):
        some = conversations[first : first + TOGETHER]
        texts = [message["content"] for messages in some for message in messages]
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        counts = iter(map(len, ids))
        found += [sum(next(counts) for _ in messages) for messages in some]
        bar.update(len(some))
    return np.asarray(found)


def _label(parts: dict[str, Part], settings: RunSettings, directory: Path) -> None:
    """Order every pair by its rewards."""
    rewards = load_rewards(settings.reward, runtime.make_mesh(**settings.mesh))
    for name in ("preferences", "test"):
        part = parts[name]
        path = directory / "scores" / f"{name}.jsonl"
        together = 4 * settings.reward.batch_size
        scores = scores_of(part.kept, rewards, path, part.digest, together)
        swapped = scores[:, 0] < scores[:, 1]
        part.counts["swapped"] = int(swapped.sum())
        part.counts["equal"] = int(np.sum(scores[:, 0] == scores[:, 1]))
        columns = dict(part.kept.columns)
        pairs = list(zip(columns["chosen"], columns["rejected"], strict=True))
        for side, column in enumerate(("chosen", "rejected")):
            other = [pair[side ^ int(turn)] for pair, turn in zip(pairs, swapped, strict=True)]
            columns[column] = other
        columns["score_chosen"] = scores.max(axis=1).tolist()
        columns["score_rejected"] = scores.min(axis=1).tolist()
        columns["swapped"] = swapped.tolist()
        part.kept = dataclasses.replace(part.kept, columns=columns)


def _write(asked: PrepareSettings, parts: dict[str, Part], directory: Path) -> None:
    """Divide, choose and write; the summary last."""
    preferences, test = parts["preferences"].kept, parts["test"].kept
    reward_rows, rl_rows = split(len(preferences.prompts), asked.reward_share, asked.split_seed)
    sets = {"reward": data.take(preferences, reward_rows), "rl": data.take(preferences, rl_rows)}
    sets["test"] = test
    for number, name in enumerate(("rl", "test")):
        rows = select(len(sets[name].prompts), asked.selected, asked.selection_seed + number)
        sets[f"{name}_selected"] = data.take(sets[name], rows)
    if "supervised" in parts:
        sets["sft"] = parts["supervised"].kept
    else:
        chosen = {"completion": sets["reward"].columns["chosen"]}
        sets["sft"] = dataclasses.replace(sets["reward"], columns=chosen)
    for name, one in sets.items():
        _write_rows(directory / f"{name}.jsonl", one)
    summary = {
        "settings": dataclasses.asdict(asked),
        "inputs": {name: part.counts for name, part in parts.items()},
        "written": {f"{name}.jsonl": len(one.prompts) for name, one in sets.items()},
    }
    runtime.save_text(directory / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    for name, counts in summary["inputs"].items():
        told = [f"{key} {value}" for key, value in counts.items() if isinstance(value, int)]
        print(f"{name}: {', '.join(told)} ({counts['path']})")
    print(f"{directory}: {', '.join(f'{n} {count}' for n, count in summary['written'].items())}")


def _write_rows(path: Path, rows: data.PromptSet) -> None:
    names = list(rows.columns)
    columns = zip(*rows.columns.values(), strict=True)
    lines = [
        json.dumps({"prompt": prompt, **dict(zip(names, values, strict=True))}, ensure_ascii=False)
        for prompt, values in zip(rows.prompts, columns, strict=True)
    ]
    runtime.save_text(path, "\n".join(lines) + "\n")
