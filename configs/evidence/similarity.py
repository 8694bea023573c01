"""Cosines of features of different contexts, at every depth of a network."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ntkrl import data, durable_files, models, probe
from ntkrl.study import Results
from ntkrl.types import Params, Policy

PER_PROMPT = 6
"""Samples of each prompt whose features are compared."""
KINDS = ("within_response", "across_responses", "across_prompts")
FILE = "similarity.json"


def write_all(results: Results, arms: Mapping[str, tuple[str, ...]]) -> None:
    """Write the cosines of the base models, RL and CF-RL of every size and seed."""
    places = [
        (results.place(size, "base", seed), results.place(size, arm, seed))
        for size in arms
        for arm in ("base", *(arm for arm in arms[size] if arm in ("rl", "cfrl")))
        for seed in results.seeds
    ]
    for base, place in tqdm(places, desc="similarity by layer"):
        samples = base / "test" / "evaluations" / f"{base.name}.jsonl"
        if not (place / FILE).exists():
            write_similarities(place / "export", samples, place / FILE)


def write_similarities(export: Path, samples: Path, out: Path) -> None:
    """Write the mean cosines by depth and kind of pair.

    Args:
      export: Hugging Face directory.
      samples: an evaluation's JSONL: prompt, completion.
      out: JSON, `{kind: [cosine after 1, 2, …, L layers and the final norm]}`.
    """
    policy, params = models.load(export)
    texts = _first_samples(data.read_set(samples, ("prompt", "completion")))
    tokenizer = data.load_tokenizer(str(export))
    encoded = data.encode_prompts(tokenizer, texts, policy.max_tokens)
    completions = data.encode_completions(tokenizer, texts, policy.max_tokens)
    lengths = max(map(len, encoded)), max(map(len, completions))
    rows = range(len(encoded))
    batch = data.supervised_batch(encoded, completions, rows, tokenizer.pad_token_id, *lengths)
    row_O, column_O = np.nonzero(np.asarray(batch.completion_mask))
    _, group_B = np.unique(np.array(texts.prompts), return_inverse=True)
    cosines: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for depth in range(1, policy.config.num_hidden_layers + 1):
        shallow, shallow_params = _truncated(policy, params, depth)
        features = shallow.features(shallow_params, batch.tokens, batch.mask)
        phi_OD = features[row_O, column_O + lengths[0] - 1]
        places = jnp.asarray(row_O), jnp.asarray(group_B[row_O])
        measures = probe.feature_measures(phi_OD, phi_OD, *places)
        for kind in KINDS:
            cosines[kind].append(float(measures[f"cosine_{kind}"]))
    durable_files.save_text(out, json.dumps(cosines) + "\n")


def read_similarities(results: Results, size: str, arm: str) -> list[dict[str, list[float]]]:
    """Return the cosines by kind and depth of each seed of an arm that has them."""
    files = [results.place(size, arm, seed) / FILE for seed in results.seeds]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


def _first_samples(texts: data.PromptSet) -> data.PromptSet:
    counts: dict[object, int] = {}
    rows = []
    for row, prompt in enumerate(texts.prompts):
        counts[prompt] = counts.setdefault(prompt, 0) + 1
        if counts[prompt] <= PER_PROMPT:
            rows.append(row)
    return data.take(texts, np.array(rows))


def _truncated(policy: Policy, params: Params, depth: int) -> tuple[Policy, Params]:
    """Return the network of the first layers, followed by the final norm."""
    shallow = policy.rebuild(dataclasses.replace(policy.config, num_hidden_layers=depth))
    return shallow, {
        name: jax.tree.map(lambda leaf: leaf[:depth], leaves) if name in policy.stacked else leaves
        for name, leaves in params.items()
    }
