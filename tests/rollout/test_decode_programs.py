"""The compiled decode loop: nothing of the size of a weight or of the cache is moved in it."""

import dataclasses
import functools

import jax
import pytest

from ntkrl import models, rollout
from tests.decode_hlo import abstract_chunk, decode_loop, shape_of
from tests.rollout.small_models import small_model

PROMPTS, GROUP, PROMPT, STEPS = 1, 14, 9, 7
SETTINGS = rollout.SamplerSettings(
    completions_per_prompt=GROUP,
    max_completion_tokens=22,
    temperature=1.0,
    end_ids=(0, 3),
    pad_id=1,
    chunk_steps=STEPS,
)
FAMILIES = ("gpt-neox", "gpt-2", "llama", "qwen3", "gemma 2", "gemma 3", "mixture")


@functools.cache
def compiled(case, dtype=None, kept=False):
    """Return the decode loop's text, and names of weights and caches by their shapes."""
    policy, params = small_model(case, options=models.ModelOptions(dtype))
    sampler = rollout.Sampler(policy, dataclasses.replace(SETTINGS, keep_features=kept))
    copy, active, output, start = abstract_chunk(sampler, params, PROMPTS, PROMPT)
    program = sampler.programs.decode_chunk.lower(copy, active, output, start)
    shapes = {
        shape_of(leaf.shape): jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path((copy, active.cache.keys))
        if sum(size > 1 for size in leaf.shape) > 1
    }
    return program.compile().as_text(), shapes


@pytest.mark.parametrize("case", FAMILIES)
def test_no_weight_or_cache_is_moved(case):
    """law: no copy, cast, slice or transpose of a weight or of a layer's whole cache."""
    text, shapes = compiled(case)
    loop = decode_loop(text)
    assert len(shapes) >= 6 and loop.moves(shapes) == []
    assert loop.trips == STEPS  # known to the compiler
