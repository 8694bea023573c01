"""`ntkrl prepare`: convert published instructions and preferences to the files of training runs.

Writes to the run directory:

    sft.jsonl             prompt, completion
    reward.jsonl          prompt, chosen, rejected, scores: the part for reward models
    rl.jsonl, test.jsonl  the same for the RL part and for the test split
    rl_selected.jsonl, test_selected.jsonl    subsets of both, for statistics and evaluation
    scores/               rewards of every pair
    summary.json          numbers of rows read, left out, swapped and written; written last
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from ntkrl import data, durable_files, models, reward, runtime
from ntkrl.json_files import parse_json
from ntkrl.json_values import readable
from ntkrl.prepare import schemas
from ntkrl.settings import RunSettings, read_settings
from ntkrl.setup import load_rewards

SUMMARY = "summary.json"
FILES = (
    *("sft.jsonl", "reward.jsonl", "rl.jsonl", "test.jsonl"),
    *("rl_selected.jsonl", "test_selected.jsonl", "scores"),
)
ENCODE_ROWS = 1024  # per update of the progress bar


@dataclasses.dataclass(frozen=True)
class PrepareSettings:
    """Inputs and options; paths as in data/published.py.

    supervised: rows of instruction, input and output; None for the chosen responses of the reward
      part.
    preferences, test: rows of prompt, chosen and rejected.
    tokenizer: model whose tokens are counted, or None for the config's model.
    max_tokens: of a prompt and of a response, ≥ 1, excluding the template's.
    relabel: order every pair by the config's reward function.
    reward_share: of the preferences, for reward models, in (0, 1); the rest is for RL.
    split_seed, selection_seed: ≥ 0.
    selected: number of prompts in each selected subset, ≥ 1.
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

    def __post_init__(self):
        minima = {"max_tokens": 1, "selected": 1, "split_seed": 0, "selection_seed": 0}
        problems = [
            f"prepare.{name} must be ≥ {least}, not {getattr(self, name)}"
            for name, least in minima.items()
            if getattr(self, name) < least
        ]
        if not 0 < self.reward_share < 1:
            problems.append(f"prepare.reward_share must be in (0, 1), not {self.reward_share}")
        if problems:
            raise ValueError("; ".join(problems) + ".")


def prepare(config: ConfigDict) -> Path:
    """Prepare data and return its directory; do nothing if it is complete.

    Args:
      config: see configs/paper/data.py; reads `prepare`, `model`, `reward`, `mesh`, `run_dir`.

    Raises:
      ValueError: a mistake in the config or its files, a config or inputs that differ from those
        that the directory was begun with, another process that writes there, or an error of a
        reward function.
    """
    if "prepare" not in config:
        raise ValueError("this config has no section prepare; see configs/paper/data.py.")
    directory = Path(config.run_dir)
    options = runtime.parse_section(PrepareSettings, config.prepare, "prepare")
    settings = read_settings(config)
    with runtime.locked(directory, "prepare", SUMMARY):
        _prepare(config, options, settings, directory)
    return directory


def _prepare(
    config: ConfigDict, options: PrepareSettings, settings: RunSettings, directory: Path
) -> None:
    values = runtime.to_json(config)
    runtime.check_consistent("config", values)
    runtime.check_run_dir(directory, values, FILES)
    if runtime.allgather_object("prepared data", (directory / SUMMARY).exists())[0]:
        runtime.log(f"{directory} is prepared; remove it to prepare again.")
        return
    inputs = _read(options, settings)
    if runtime.is_writer():
        runtime.claim_run_dir(directory, values)
    runtime.allgather_object("the config")
    if options.relabel:
        _relabel(inputs, settings, directory)
    if runtime.is_writer():
        _write(options, inputs, directory)
    runtime.allgather_object("the end of prepare")


@dataclasses.dataclass(eq=False)
class InputSet:
    """One input: its remaining rows, counts of what was left out, and the digest of its files."""

    rows: data.PromptSet
    counts: dict[str, Any]
    digest: str


def _read(options: PrepareSettings, settings: RunSettings) -> dict[str, InputSet]:
    """Read all inputs and drop rows that are too long; one error lists all problems."""
    problems, inputs, tokenizer = runtime.ErrorCollector(), {}, None
    with problems:
        source = settings.model.path if options.tokenizer is None else options.tokenizer
        if source is None:
            raise ValueError("model.path and prepare.tokenizer are None; set one of them.")
        tokenizer = data.load_tokenizer(models.tokenizer_directory(source))
    for name in ("supervised", "preferences", "test"):
        path = getattr(options, name)
        with problems:
            if path is not None:
                inputs[name] = _read_input(path, name == "supervised")
    problems.finish()
    for name, part in inputs.items():
        _drop_long(name, part, tokenizer, options.max_tokens)
    return inputs


def _read_input(path: str, supervised: bool) -> InputSet:
    files, table = data.files_of(path), data.read_rows(path)
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    rows = [(number, row) for number, row in table.rows if not schemas.without_prompt(row)]
    convert = schemas.examples if supervised else schemas.preferences
    counts = {
        "path": path,
        "files": [file.name for file in files],
        "sha256": digest.hexdigest(),
        "rows": len(table.rows),
        "without_prompt": len(table.rows) - len(rows),
    }
    return InputSet(convert(table._replace(rows=rows)), counts, digest.hexdigest())


def _drop_long(name: str, part: InputSet, tokenizer: Any, max_tokens: int) -> None:
    texts = {"prompt": part.rows.prompts} | {
        column: part.rows.columns[column]
        for column in ("completion", "chosen", "rejected")
        if column in part.rows.columns
    }
    size = len(part.rows.prompts)
    fits = np.ones(size, bool)
    total, quiet = size * len(texts), not runtime.is_writer()
    with tqdm(desc=f"tokens of {name}", total=total, mininterval=0.5, disable=quiet) as bar:
        for column, conversations in texts.items():
            lengths = _token_counts(
                conversations, tokenizer, f"{part.counts['path']}, {column}", bar
            )
            fits &= lengths <= max_tokens
            part.counts[f"{column}_too_long"] = int(np.sum(lengths > max_tokens))
    part.rows = data.take(part.rows, np.flatnonzero(fits))
    part.counts["kept"] = int(fits.sum())
    if not fits.any():
        raise ValueError(f"{part.counts['path']}: no row has at most {max_tokens} tokens per text.")


def _token_counts(
    conversations: Sequence[Any], tokenizer: Any, source: str, bar: tqdm
) -> np.ndarray:
    """Return the tokens of each conversation's messages, without a template's."""
    totals = []
    for first in range(0, len(conversations), ENCODE_ROWS):
        chunk = conversations[first : first + ENCODE_ROWS]
        texts = [message["content"] for messages in chunk for message in messages]
        ids = data.encode_plain(tokenizer, texts, source)
        counts = iter(map(len, ids))
        totals += [sum(next(counts) for _ in messages) for messages in chunk]
        bar.update(len(chunk))
    return np.asarray(totals)


def _relabel(inputs: dict[str, InputSet], settings: RunSettings, directory: Path) -> None:
    """Order every pair by its rewards."""
    sizes = settings.mesh
    mesh = runtime.make_mesh(sizes["data"], sizes["fsdp"], sizes["tensor"])
    rewards = load_rewards(settings.reward, mesh)
    for name in ("preferences", "test"):
        part = inputs[name]
        path = directory / "scores" / f"{name}.jsonl"
        batch = 4 * settings.reward.batch_size
        scores = score_pairs(part.rows, rewards, path, part.digest, batch)
        swapped = scores[:, 0] < scores[:, 1]
        part.counts["swapped"] = int(swapped.sum())
        part.counts["equal"] = int(np.sum(scores[:, 0] == scores[:, 1]))
        columns = dict(part.rows.columns)
        pairs = list(zip(columns["chosen"], columns["rejected"], strict=True))
        for side, column in enumerate(("chosen", "rejected")):
            columns[column] = [
                pair[side ^ int(swap)] for pair, swap in zip(pairs, swapped, strict=True)
            ]
        columns["score_chosen"] = scores.max(axis=1).tolist()
        columns["score_rejected"] = scores.min(axis=1).tolist()
        columns["swapped"] = swapped.tolist()
        part.rows = dataclasses.replace(part.rows, columns=columns)


def score_pairs(
    pairs: data.PromptSet, rewards: reward.RewardSet, path: Path, digest: str, batch: int
) -> np.ndarray:
    """Score every pair, reusing scores on disk.

    The file is JSON Lines: a header with the digest of the pairs, then [chosen, rejected] per pair.
    The longest pairs come first, so that texts of a batch have similar lengths and one that does
    not fit is detected at once. An interrupted run continues after the last complete line.

    Args:
      pairs: conversational, with the columns "chosen" and "rejected".
      rewards: reward functions.
      path: of the scores.
      digest: of the pairs.
      batch: pairs scored and written at a time.

    Returns:
      `[P, 2]` float64: chosen, rejected.

    Raises:
      ValueError: scores of other pairs, or errors of the reward functions.
    """
    count = len(pairs.prompts)
    order = np.argsort([-_pair_length(pairs, row) for row in range(count)], kind="stable")
    pairs = data.take(pairs, order)
    scores = _read_scores(path, digest)[:count]
    start = runtime.allgather_object(f"scored pairs of {path.name}", len(scores))[0]
    quiet = not runtime.is_writer()
    bar = tqdm(desc=path.stem, initial=start, total=count, mininterval=0.5, disable=quiet)
    with bar:
        for first in range(start, count, batch):
            new = _score_batch(pairs, rewards, slice(first, first + batch))
            scores += new
            if runtime.is_writer():
                with path.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(pair) + "\n" for pair in new)
            bar.update(len(new))
    scores_P2 = np.empty((count, 2))
    scores_P2[order] = scores
    return scores_P2


def _pair_length(pairs: data.PromptSet, row: int) -> int:
    """Return the characters of a pair's prompt and longer response."""
    texts = (pairs.columns[name][row][0]["content"] for name in ("chosen", "rejected"))
    conversation: Any = pairs.prompts[row]
    return sum(len(message["content"]) for message in conversation) + max(map(len, texts))


def _score_batch(
    pairs: data.PromptSet, rewards: reward.RewardSet, rows: slice
) -> list[list[float]]:
    prompts = pairs.prompts[rows]
    responses = [
        message[0]["content"]
        for name in ("chosen", "rejected")
        for message in pairs.columns[name][rows]
    ]
    no_ids: list[list[int]] = [[] for _ in responses]
    result = rewards((*prompts, *prompts), responses, no_ids, {}, conversational=True)
    return result.rewards.astype(np.float64).reshape(2, -1).T.tolist()


def _read_scores(path: Path, digest: str) -> list[list[float]]:
    """Return the scores on disk; remove an incomplete last line, or create the file."""
    header = json.dumps({"digest": digest}) + "\n"
    if not path.exists():
        if runtime.is_writer():
            durable_files.save_text(path, header)
        return []
    complete, _, partial = path.read_bytes().rpartition(b"\n")
    lines = complete.decode("utf-8").split("\n")
    if lines[0] + "\n" != header:
        raise ValueError(
            f"{path} has scores of other pairs: the inputs have changed since. Remove its "
            "directory to score again."
        )
    if partial and runtime.is_writer():
        durable_files.save_text(path, complete.decode("utf-8") + "\n")
    try:
        return [parse_json(line) for line in lines[1:]]
    except ValueError as error:
        raise ValueError(
            f"{path} has a damaged line ({error}); remove the file to score again."
        ) from error


def _write(options: PrepareSettings, inputs: dict[str, InputSet], directory: Path) -> None:
    """Split, select and write the rows; the summary last."""
    preferences = inputs["preferences"].rows
    size = len(preferences.prompts)
    reward_rows, rl_rows = schemas.split(size, options.reward_share, options.split_seed)
    sets = {"reward": data.take(preferences, reward_rows), "rl": data.take(preferences, rl_rows)}
    sets["test"] = inputs["test"].rows
    for number, name in enumerate(("rl", "test")):
        size, seed = len(sets[name].prompts), options.selection_seed + number
        rows = schemas.select(size, options.selected, seed)
        sets[f"{name}_selected"] = data.take(sets[name], rows)
    if "supervised" in inputs:
        sets["sft"] = inputs["supervised"].rows
    else:
        chosen = {"completion": sets["reward"].columns["chosen"]}
        sets["sft"] = dataclasses.replace(sets["reward"], columns=chosen)
    for name, prompt_set in sets.items():
        _write_rows(directory / f"{name}.jsonl", prompt_set)
    summary = {
        "settings": dataclasses.asdict(options),
        "inputs": {name: part.counts for name, part in inputs.items()},
        "written": {f"{name}.jsonl": len(rows.prompts) for name, rows in sets.items()},
    }
    durable_files.save_text(
        directory / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
    )
    for name, counts in summary["inputs"].items():
        numbers = [f"{key} {value}" for key, value in counts.items() if isinstance(value, int)]
        print(f"{name}: {', '.join(numbers)} ({counts['path']})")
    print(f"{directory}: {', '.join(f'{n} {count}' for n, count in summary['written'].items())}")


def _write_rows(path: Path, rows: data.PromptSet) -> None:
    names = list(rows.columns)
    columns = zip(*rows.columns.values(), strict=True)
    lines = []
    for prompt, values in zip(rows.prompts, columns, strict=True):
        row = readable({"prompt": prompt, **dict(zip(names, values, strict=True))})
        lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False))
    durable_files.save_text(path, "\n".join(lines) + "\n")
