"""How alike features of different contexts are, at every depth of a network."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ntkrl import data, models, probe, runtime
from ntkrl.types import Params, Policy

PER_PROMPT = 6
"""Samples of each prompt that are read."""
KINDS = ("within_response", "across_responses", "across_prompts")


def write_similarities(export: Path, samples: Path, out: Path) -> None:
    """Write the mean cosines by depth and kind of pair, where they are not written yet.

    Args:
      export: Hugging Face directory.
      samples: an evaluation's JSONL: prompt, completion.
      out: JSON, `{kind: [cosine after 1, 2, …, L layers and the final norm]}`.
    """
    if out.exists():
        return
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
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for depth in range(1, policy.config.num_hidden_layers + 1):
        shallow, own = _cut(policy, params, depth)
        features = shallow.features(own, batch.tokens, batch.mask)
        phi_OD = features[row_O, column_O + lengths[0] - 1]
        places = jnp.asarray(row_O), jnp.asarray(group_B[row_O])
        measures = probe.feature_measures(phi_OD, phi_OD, *places)
        for kind in KINDS:
            found[kind].append(float(measures[f"cosine_{kind}"]))
    runtime.save_text(out, json.dumps(found) + "\n")


def read_similarities(path: Path) -> dict[str, list[float]] | None:
    """Return what `write_similarities` wrote, None where nothing is."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _first_samples(texts: data.PromptSet) -> data.PromptSet:
    seen: dict[Any, int] = {}
    rows = []
    for row, prompt in enumerate(texts.prompts):
        seen[prompt] = seen.setdefault(prompt, 0) + 1
        if seen[prompt] <= PER_PROMPT:
            rows.append(row)
    return data.take(texts, np.array(rows))


def _cut(policy: Policy, params: Params, depth: int) -> tuple[Policy, Params]:
    """Return the network of the first layers, with the final norm after them."""
    shallow = policy.rebuild(dataclasses.replace(policy.config, num_hidden_layers=depth))
    layers = {name: leaves for name, leaves in params.items() if name not in policy.stacked}
    for name in policy.stacked:
        layers[name] = _first(params[name], depth)
    return shallow, layers


def _first(tree: Any, depth: int) -> Any:
    if isinstance(tree, dict):
        return {name: _first(leaf, depth) for name, leaf in tree.items()}
    return tree[:depth]
