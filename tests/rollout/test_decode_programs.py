"""The compiled decode loop: nothing of the size of a weight or of the cache is moved in it."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import pytest

from ntkrl import models, rollout
from ntkrl.plan.abstract_models import PUBLISHED_MODELS
from ntkrl.plan.hardware import machine
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
# of matrices that a GPU multiplies as it would in a run; tiny ones are padded
LARGE = {
    "GPTNeoXForCausalLM": PUBLISHED_MODELS["EleutherAI/pythia-1b"],
    "LlamaForCausalLM": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
}
FAMILIES = ("gpt-neox", "gpt-2", "llama", "qwen3", "gemma 2", "gemma 3", "mixture")


def compiled(policy, params, sharding=None, **options):
    """Return the loop over tokens, and names of weights and caches by their shapes."""
    sampler = rollout.Sampler(policy, dataclasses.replace(SETTINGS, **options))
    arguments = abstract_chunk(sampler, params, PROMPTS, PROMPT, sharding)
    copy, active = arguments[:2]
    shapes = {
        shape_of(leaf.shape): jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path((copy, active.cache.keys))
        if sum(size > 1 for size in leaf.shape) > 1
    }
    assert len(shapes) >= 4
    text = sampler.programs.decode_chunk.lower(*arguments).compile().as_text()
    return decode_loop(text), shapes


@pytest.mark.parametrize("case", FAMILIES)
def test_no_weight_or_cache_is_moved(case):
    """law: no copy, cast, slice or transpose of a weight or of a layer's whole cache."""
    loop, shapes = compiled(*small_model(case))
    # with stacked layers every weight would be cut out of its stack here
    assert loop.moved(shapes) == []
    assert loop.trips == STEPS  # known to the compiler


def test_masters_are_not_cast():
    """law: a bfloat16 copy is read as it is; CPUs widen it for a product, nothing narrows."""
    model = small_model("gpt-neox", options=models.ModelOptions(jnp.bfloat16))
    loop, shapes = compiled(*model, keep_features=True)
    weights = {shape: name for shape, name in shapes.items() if "layers" in name}
    assert len(weights) == 3 and loop.moved(weights, "bf16") == []


@pytest.mark.parametrize("architecture", sorted(LARGE))
def test_no_weight_or_cache_is_moved_on_a_gpu(architecture):
    """law: the same of the program for an H200, in bfloat16; the host is not asked per token."""
    if any(importlib.util.find_spec(name) is None for name in ("jax_cuda12_plugin", "nvidia")):
        pytest.skip("no compiler for GPUs: pip install 'ntkrl[gpu-plan]'")
    sharding = jax.sharding.SingleDeviceSharding(machine("h200").devices[0])
    config = {**LARGE[architecture], "num_hidden_layers": 2}
    options = models.ModelOptions(jnp.bfloat16)
    model = models.describe(architecture, config, options=options)
    loop, shapes = compiled(*model, sharding, completions_per_prompt=16)
    assert loop.moved(shapes) == [] and loop.trips == STEPS
