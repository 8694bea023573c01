"""The probe set of a run: held-out prompts with completions of several families.

Families, after Ren & Sutherland 2407.10490: "own", sampled from the starting model; "other", the
own completions of another prompt; "shuffled", the own tokens in random order; and texts that come
with the prompts: "reference" (column completion or chosen), "rejected", "paraphrased" (columns of
that name). It is drawn once and kept in the run directory, so that a resumed run reads the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ntkrl import data, runtime
from ntkrl.generate import make_sample, prompt_batch
from ntkrl.numerics import bucket_length
from ntkrl.probe import FAMILIES, FAMILY_COLUMNS, SAMPLED_FAMILIES
from ntkrl.setup.assemble import Setup
from ntkrl.types import Array, ProbeSet

FORMAT = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Probes:
    """A probe set, and what a person reads of it.

    held: its arrays. families: `[B]` names. digest: of the arrays. texts: what set.json holds.
    """

    held: ProbeSet
    families: tuple[str, ...]
    digest: str
    texts: dict[str, Any]


def make_probes(setup: Setup, directory: Path, key: Array) -> Probes:
    """Read the probe set of a run, or draw it where there is none yet.

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
    rows = np.arange(min(setup.settings.probe.prompts, setup.held_out.size))
    own = _sampled(setup, rows, key)
    completions: list[list[int]] = []
    groups: list[int] = []
    families: list[str] = []
    for family in setup.settings.probe.families:
        found = _drawn(family, own) if family in SAMPLED_FAMILIES else _given(setup, family, rows)
        for group, texts in enumerate(found):
            completions += texts
            groups += [group] * len(texts)
            families += [family] * len(texts)
    encoded = [setup.held_out.encoded[row] for row in rows]
    batch = data.supervised_batch(
        [encoded[group] for group in groups],
        completions,
        range(len(completions)),
        setup.tokenizer.pad_token_id,
        bucket_length(max(map(len, encoded)), setup.settings.data.max_prompt_tokens),
        max(map(len, completions)),
    )
    held = ProbeSet(
        tokens=batch.tokens,
        mask=batch.mask,
        completion_mask=batch.completion_mask,
        groups=jnp.asarray(groups, jnp.int32),
    )
    return _told(setup, held, tuple(families))


def save_probes(probes: Probes, directory: Path) -> None:
    """Write `probes/set.npz` and, for people and the report, `probes/set.json`."""
    arrays = {name: np.asarray(value) for name, value in probes.held.items()}
    arrays["families"] = np.asarray([FAMILIES.index(family) for family in probes.families])
    runtime.save_text(directory / "probes" / "set.json", json.dumps(probes.texts))
    runtime.save_arrays(directory / "probes" / "set.npz", arrays)


def _read(setup: Setup, path: Path) -> Probes:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        families = tuple(FAMILIES[number] for number in arrays.pop("families"))
        held = ProbeSet(**{name: jnp.asarray(value) for name, value in arrays.items()})
    except (OSError, ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}); remove the directory it is in "
            "to draw the probe set anew, or start another run."
        ) from error
    return _told(setup, held, families)


def _sampled(setup: Setup, rows: np.ndarray, key: Array) -> list[list[list[int]]]:
    """Return the token ids of completions of the starting model, by prompt."""
    count = setup.settings.probe.completions_per_prompt
    sample = make_sample(setup, count, setup.settings.rollout.temperature)
    drawn = runtime.fetch(sample(setup.params, prompt_batch(setup, setup.held_out, rows), key))
    length = drawn.completion_mask.shape[1]
    tokens, mask = np.asarray(drawn.tokens)[:, -length:], np.asarray(drawn.completion_mask)
    ids = [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]
    return [ids[start : start + count] for start in range(0, len(ids), count)]


def _drawn(family: str, own: Sequence[list[list[int]]]) -> Sequence[list[list[int]]]:
    if family == "other":
        return [own[(group + 1) % len(own)] for group in range(len(own))]
    if family == "own":
        return own
    shuffle = np.random.default_rng(0).permutation  # the last token, most often the end, stays
    return [[[*shuffle(ids[:-1]).tolist(), ids[-1]] for ids in texts] for texts in own]


def _given(setup: Setup, family: str, rows: np.ndarray) -> list[list[list[int]]]:
    columns, source = setup.held_out.prompt_set.columns, setup.held_out.prompt_set.source
    name = next((name for name in FAMILY_COLUMNS[family] if name in columns), None)
    if name is None:
        raise ValueError(
            f"probe.families names {family!r}, but {source} has no column "
            f"{' or '.join(FAMILY_COLUMNS[family])}; add it to the held-out prompts or leave it "
            "out."
        )
    chosen = data.take(setup.held_out.prompt_set, rows)
    texts = dataclasses.replace(chosen, columns={"completion": chosen.columns[name]})
    budget = setup.settings.rollout.max_completion_tokens
    return [[ids] for ids in data.encode_completions(setup.tokenizer, texts, budget)]


def _told(setup: Setup, held: ProbeSet, families: tuple[str, ...]) -> Probes:
    tokens, mask = np.asarray(held.tokens), np.asarray(held.completion_mask)
    digest = hashlib.sha256()
    for name, value in sorted(held.items()):
        digest.update(f"{name} {value.shape}".encode() + np.asarray(value).tobytes())
    texts, ids = data.decode_completions(
        setup.tokenizer, tokens, mask, setup.tokenizer.eos_token_id
    )
    groups = np.asarray(held.groups)
    prompts = prompt_texts(setup.tokenizer, held.tokens, held.mask, mask.shape[1])
    told = {
        "format": FORMAT,
        "digest": digest.hexdigest()[:16],
        "prompts": [prompts[int(np.argmax(groups == group))] for group in range(groups.max() + 1)],
        "completions": [
            {
                "prompt": int(group),
                "family": family,
                "text": text,
                "tokens": [setup.tokenizer.decode([token]) for token in own],
            }
            for group, family, text, own in zip(groups, families, texts, ids, strict=True)
        ],
    }
    return Probes(held, families, told["digest"], told)


def prompt_ids(tokens: Array, mask: Array, length: int) -> list[list[int]]:
    """Return the tokens that stand before the last `length` columns of each row."""
    before = (np.asarray(leaf)[:, : leaf.shape[1] - length] for leaf in (tokens, mask))
    return [row[keep > 0].tolist() for row, keep in zip(*before, strict=True)]


def prompt_texts(tokenizer: Any, tokens: Array, mask: Array, length: int) -> list[str]:
    """Return `prompt_ids` as text."""
    return [tokenizer.decode(ids) for ids in prompt_ids(tokens, mask, length)]


def rows_of(held: ProbeSet, families: Sequence[str]) -> dict[str, np.ndarray]:
    """Return, by family, which probe tokens `[O]` belong to it."""
    rows, _ = np.nonzero(np.asarray(held.completion_mask))
    named = np.asarray(families)[rows]
    return {family: np.asarray(named == family) for family in dict.fromkeys(families)}
