"""The probe set of a run: held-out prompts with completions of several families.

Families, after Ren & Sutherland 2407.10490: "own", sampled from the starting model; "other", own
completions of another prompt; "shuffled", own tokens in random order; and texts that come with the
prompts: "reference" (column completion or chosen), "rejected", "paraphrased" (columns of that
name). It is drawn once and kept in the run directory, so that a resumed run reads the same.
"""

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ntkrl import data, durable_files, runtime
from ntkrl.generate import SampleRequest, make_sampler, prompt_batch
from ntkrl.numerics import bucket_length
from ntkrl.probe import FAMILIES, FAMILY_COLUMNS, SAMPLED_FAMILIES
from ntkrl.setup import RunSetup
from ntkrl.types import Array, ProbeSet

FORMAT = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Probes:
    """A probe set and its texts.

    arrays: the completions. families: `[B]` names. digest: hash of the arrays. texts: content
    of set.json.
    """

    arrays: ProbeSet
    families: tuple[str, ...]
    digest: str
    texts: dict[str, Any]


def make_probes(setup: RunSetup, directory: Path, key: Array) -> Probes:
    """Read the probe set of a run, or draw it if there is none yet.

    Args:
      setup: the run, with held-out prompts.
      directory: the run's.
      key: consumed.

    Raises:
      ValueError: a family without its column, completions that do not fit, a damaged file.
    """
    path = directory / "probes" / "set.npz"
    if runtime.allgather_object("whether there is a probe set", path.is_file())[0]:
        return _read(setup, path)
    settings, held_out = setup.settings, setup.held_out_prompts
    rows = np.arange(min(settings.probe.prompts, held_out.size))
    sampled = _sample(setup, rows, key)
    completions: list[list[int]] = []
    groups: list[int] = []
    families: list[str] = []
    for family in settings.probe.families:
        if family in SAMPLED_FAMILIES:
            by_prompt = _sampled_family(family, sampled)
        else:
            by_prompt = _column_family(setup, family, rows)
        for group, texts in enumerate(by_prompt):
            completions += texts
            groups += [group] * len(texts)
            families += [family] * len(texts)
    encoded = [held_out.encoded[row] for row in rows]
    batch = data.supervised_batch(
        [encoded[group] for group in groups],
        completions,
        range(len(completions)),
        setup.model.tokenizer.pad_token_id,
        bucket_length(max(map(len, encoded)), settings.data.max_prompt_tokens),
        max(map(len, completions)),
    )
    arrays = ProbeSet(
        tokens=batch.tokens,
        mask=batch.mask,
        completion_mask=batch.completion_mask,
        groups=jnp.asarray(groups, jnp.int32),
    )
    return _described(setup, arrays, tuple(families))


def save_probes(probes: Probes, directory: Path) -> None:
    """Write `probes/set.npz` and, for people and the report, `probes/set.json`."""
    arrays = {name: np.asarray(value) for name, value in vars(probes.arrays).items()}
    arrays["families"] = np.asarray([FAMILIES.index(family) for family in probes.families])
    durable_files.save_text(directory / "probes" / "set.json", json.dumps(probes.texts))
    durable_files.save_arrays(directory / "probes" / "set.npz", arrays)


def _read(setup: RunSetup, path: Path) -> Probes:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        families = tuple(FAMILIES[number] for number in arrays.pop("families"))
        probe_set = ProbeSet(**{name: jnp.asarray(value) for name, value in arrays.items()})
    except (OSError, ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}); remove the directory it is in "
            "to draw the probe set anew, or start another run."
        ) from error
    return _described(setup, probe_set, families)


def _sample(setup: RunSetup, rows: np.ndarray, key: Array) -> list[list[list[int]]]:
    """Return the token ids of completions of the starting model, by prompt."""
    settings, model = setup.settings, setup.model
    count = settings.probe.completions_per_prompt
    sampler = make_sampler(settings, model, count, settings.rollout.temperature)
    prompts = prompt_batch(setup, SampleRequest(setup.held_out_prompts, rows))
    drawn = runtime.fetch(sampler(model.params, prompts, key))
    length = drawn.completion_mask.shape[1]
    tokens, mask = np.asarray(drawn.tokens)[:, -length:], np.asarray(drawn.completion_mask)
    ids = [row[counted].tolist() for row, counted in zip(tokens, mask, strict=True)]
    return [ids[start : start + count] for start in range(0, len(ids), count)]


def _sampled_family(family: str, sampled: Sequence[list[list[int]]]) -> Sequence[list[list[int]]]:
    if family == "other":
        return [sampled[(group + 1) % len(sampled)] for group in range(len(sampled))]
    if family == "own":
        return sampled
    shuffle = np.random.default_rng(0).permutation  # the last token, most often the end, stays
    return [[[*shuffle(ids[:-1]).tolist(), ids[-1]] for ids in texts] for texts in sampled]


def _column_family(setup: RunSetup, family: str, rows: np.ndarray) -> list[list[list[int]]]:
    held_out = setup.held_out_prompts.prompt_set
    columns, source = held_out.columns, held_out.source
    name = next((name for name in FAMILY_COLUMNS[family] if name in columns), None)
    if name is None:
        raise ValueError(
            f"probe.families names {family!r}, but {source} has no column "
            f"{' or '.join(FAMILY_COLUMNS[family])}; add it to the held-out prompts or leave it "
            "out."
        )
    prompts = data.take(held_out, rows)
    texts = dataclasses.replace(prompts, columns={"completion": prompts.columns[name]})
    budget = setup.settings.rollout.max_completion_tokens
    return [[ids] for ids in data.encode_completions(setup.model.tokenizer, texts, budget)]


def _described(setup: RunSetup, arrays: ProbeSet, families: tuple[str, ...]) -> Probes:
    """Return a probe set with its digest and its texts."""
    tokenizer = setup.model.tokenizer
    sha = hashlib.sha256()
    for name, value in sorted(vars(arrays).items()):
        sha.update(f"{name} {value.shape}".encode() + np.asarray(value).tobytes())
    digest = sha.hexdigest()[:16]
    texts, ids = data.decode_completions(
        tokenizer, arrays.tokens, arrays.completion_mask, setup.model.end_ids
    )
    groups = np.asarray(arrays.groups)
    prompts = prompt_texts(tokenizer, arrays.tokens, arrays.mask, arrays.completion_mask.shape[1])
    content = {
        "format": FORMAT,
        "digest": digest,
        "prompts": [prompts[int(np.argmax(groups == group))] for group in range(groups.max() + 1)],
        "completions": [
            {
                "prompt": int(group),
                "family": family,
                "text": text,
                "tokens": [tokenizer.decode([token]) for token in row],
            }
            for group, family, text, row in zip(groups, families, texts, ids, strict=True)
        ],
    }
    return Probes(arrays, families, digest, content)


def prompt_ids(tokens: Array, mask: Array, length: int) -> list[list[int]]:
    """Return the tokens before the last `length` columns of each row."""
    before = (np.asarray(leaf)[:, : leaf.shape[1] - length] for leaf in (tokens, mask))
    return [row[real > 0].tolist() for row, real in zip(*before, strict=True)]


def prompt_texts(tokenizer: Any, tokens: Array, mask: Array, length: int) -> list[str]:
    """Return `prompt_ids` as text."""
    return [tokenizer.decode(ids) for ids in prompt_ids(tokens, mask, length)]


def rows_of(arrays: ProbeSet, families: Sequence[str]) -> dict[str, np.ndarray]:
    """Return `[O]` bool by family, True on its probe tokens."""
    rows, _ = np.nonzero(np.asarray(arrays.completion_mask))
    named = np.asarray(families)[rows]
    return {family: np.asarray(named == family) for family in dict.fromkeys(families)}
