"""Cosines of features of different contexts, raw and without their mean, at every depth."""

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
from ntkrl.configs.evidence.answers import encode_answers, first_answers
from ntkrl.study import Results
from ntkrl.types import Params, Policy

PER_PROMPT = 6
"""Samples of each prompt whose features are compared."""
KINDS = ("first_token", "within_response", "across_responses", "across_prompts")
"""Pairs of tokens: the first of answers to different prompts; two of an answer; of two answers to a
prompt; of answers to different prompts. With `centred_` before it: the mean feature subtracted."""
MEAN_SHARE = "mean_share"
"""‖mean φ‖² over the mean of ‖φ‖²: the mean feature's part of R's trace."""
DEPTH = "depth"
MOST_DEPTHS = 8
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
      out: JSON of lists over depths: DEPTH, the number of layers before the final norm, at most
        MOST_DEPTHS of them with 1 and all; the names of `similarities`.
    """
    policy, params = models.load(export)
    texts = first_answers(data.read_set(samples, ("prompt", "completion")), PER_PROMPT)
    answers = encode_answers(export, texts, policy.max_tokens)
    batch, row_O, column_O = answers.batch, answers.rows, answers.columns
    listed: dict[str, list[float]] = {}
    layers = policy.config.num_hidden_layers
    for depth in np.unique(np.linspace(1, layers, min(layers, MOST_DEPTHS)).round()).astype(int):
        shallow, shallow_params = _truncated(policy, params, depth)
        features = jax.jit(shallow.features)(shallow_params, batch.tokens, batch.mask)
        phi_OD = features[row_O, column_O + answers.prompt_length - 1]
        measures = similarities(phi_OD, row_O, column_O, answers.groups[row_O])
        for name, value in {DEPTH: int(depth), **measures}.items():
            listed.setdefault(name, []).append(value)
    durable_files.save_text(out, json.dumps(listed) + "\n")


def similarities(
    phi_OD: jax.Array, rows: np.ndarray, columns: np.ndarray, groups: np.ndarray
) -> dict[str, float]:
    """Return the mean cosines of KINDS, raw and centred, and MEAN_SHARE.

    Args:
      phi_OD: `[O, D]` features.
      rows, columns, groups: `[O]` completion, place in it and prompt of each token.
    """
    mean_D = jnp.mean(phi_OD, axis=0)
    share = jnp.sum(mean_D**2) / jnp.mean(jnp.sum(phi_OD**2, axis=1))
    result, first = {MEAN_SHARE: float(share)}, columns == 0
    for prefix, features in (("", phi_OD), ("centred_", phi_OD - mean_D[None])):
        places = jnp.asarray(rows), jnp.asarray(groups)
        measures = probe.feature_measures(features, features, *places)
        result |= {prefix + kind: float(measures[f"cosine_{kind}"]) for kind in KINDS[1:]}
        firsts = features[first]
        measures = probe.feature_measures(firsts, firsts, *(place[first] for place in places))
        result[f"{prefix}first_token"] = float(measures["cosine_across_prompts"])
    return result


def read_similarities(results: Results, size: str, arm: str) -> list[dict[str, list[float]]]:
    """Return the cosines by kind and depth of each seed of an arm that has them."""
    files = [results.place(size, arm, seed) / FILE for seed in results.seeds]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


def _truncated(policy: Policy, params: Params, depth: int) -> tuple[Policy, Params]:
    """Return the network of the first layers, followed by the final norm."""
    shallow = policy.rebuild(dataclasses.replace(policy.config, num_hidden_layers=int(depth)))
    return shallow, {
        name: jax.tree.map(lambda leaf: leaf[:depth], leaves) if name in policy.stacked else leaves
        for name, leaves in params.items()
    }
