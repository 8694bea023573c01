"""The sampler's draws of a key, for every form of layer and every way to sample."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl import rollout
from ntkrl.types import PromptBatch
from tests.rollout.small_models import CASES, small_model

GOLDEN = Path(__file__).parent / "golden_draws.json"
SETTINGS = rollout.SamplerSettings(
    completions_per_prompt=4,
    max_completion_tokens=21,
    temperature=1.0,
    end_ids=(0, 30),
    pad_id=1,
    chunk_steps=24,
    fewest_rows=16,
)
WAYS = {
    "greedy": {"temperature": 0.0},
    "cooler": {"temperature": 0.7},
    "top-k": {"top_k": 5},
    "top-p, min-p": {"top_p": 0.8, "min_p": 0.02},
    "bfloat16 cache": {"cache_dtype": jnp.bfloat16},
    "small chunks": {"chunk_steps": 4, "fewest_rows": 2},
    "stop strings": {},
}


def prompts():
    """Three left-padded prompts; the last is a copy of the first."""
    tokens, mask = np.full((3, 6), 1), np.zeros((3, 6), bool)
    for row, length in enumerate((2, 6, 2)):
        tokens[row, 6 - length :] = np.random.default_rng(length).integers(2, 30, length)
        mask[row, 6 - length :] = True
    return PromptBatch(
        tokens=jnp.asarray(tokens),
        mask=jnp.asarray(mask),
        rows=jnp.asarray([0, 1, 0]),
        copies=jnp.asarray([0, 0, 1]),
    )


def find_stop(ids):
    """End after the first two neighbours that sum to 20 or 30."""
    ends = [i + 2 for i in range(len(ids) - 1) if ids[i] + ids[i + 1] in (20, 30)]
    return ends[0] if ends else None


def draws(case, way=None):
    """Return the completions' tokens and log-probs, one list per row."""
    policy, params = small_model(case)
    settings = dataclasses.replace(SETTINGS, **WAYS.get(way, {}))
    sampler = rollout.Sampler(policy, settings, find_stop if way == "stop strings" else None)
    drawn = sampler(params, prompts(), jax.random.key(3))
    mask = np.asarray(drawn.completion_mask)
    tokens = np.asarray(drawn.tokens)[:, -mask.shape[1] :]
    log_probs = np.asarray(drawn.sampler_log_probs - drawn.kept_log_mass)
    return {
        "tokens": [row[real].tolist() for row, real in zip(tokens, mask, strict=True)],
        "log_probs": [
            [round(float(value), 6) for value in row[real]]
            for row, real in zip(log_probs, mask, strict=True)
        ],
        "finished": np.asarray(drawn.finished).tolist(),
    }


def cases():
    """Every model, and one in every way to sample; slow's but for the most different ones."""
    quick = ("llama", "gemma 2", "mixture", "gpt-neox, small chunks", "gpt-neox, stop strings")
    for case in [*CASES, *(f"gpt-neox, {way}" for way in WAYS)]:
        yield pytest.param(case, marks=[] if case in quick else [pytest.mark.slow])


@pytest.mark.parametrize("case", [*cases()])
def test_draws_of_a_key_stay(case):
    """golden: tokens to the last, log-probs to 1e-5 nats, rows that ended."""
    expected = json.loads(GOLDEN.read_text())[case]
    model, _, way = case.partition(", ")
    result = draws(model, way) if way else draws(case)
    assert result["tokens"] == expected["tokens"]
    assert result["finished"] == expected["finished"]
    tolerance = 0.01 if way == "bfloat16 cache" else 1e-5
    for row, values in zip(result["log_probs"], expected["log_probs"], strict=True):
        np.testing.assert_allclose(row, values, rtol=0, atol=tolerance)
    assert len({len(row) for row in expected["tokens"]}) > 1  # rows end at different times
