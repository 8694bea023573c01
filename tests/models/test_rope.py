"""Rotary settings of a config.json against transformers' reading, in every spelling and family."""

import copy
import inspect
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import ntkrl
from ntkrl.models.families import family_of
from ntkrl.models.rope import rotary_tables
from ntkrl.rollout import check_length
from tests.models.families import CASES, EACH, LLAMA3, LONGROPE, YARN, torch_model

ABSENT = object()
OLDER = {"rope_parameters": ABSENT}
LINEAR = {"rope_type": "linear", "factor": 3.0}
NESTED = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 9.0}}
# entries changed in a config.json that transformers wrote
EDITS = [
    {},
    OLDER,
    {"rope_parameters": None},
    {**OLDER, "rope_theta": 77.0},
    {**OLDER, "rope_theta": 77.0, "rope_scaling": LINEAR},
    {**OLDER, "rope_theta": 77.0, "rope_scaling": {"type": "linear", "factor": 3.0}},
    {**OLDER, "rope_theta": 77.0, "rope_scaling": {}},
    {**OLDER, "rope_theta": 77, "rope_scaling": None},
    {**OLDER, "rope_local_base_freq": 20.0},
    {**OLDER, "rotary_pct": 0.75, "rotary_emb_base": 100},
    {**OLDER, "partial_rotary_factor": 0.5},
    {**OLDER, "partial_rotary_factor": 0.5, "rope_scaling": LINEAR},
    {"partial_rotary_factor": 0.5},
    {"rope_theta": 33.0},
    # both spellings
    {"rope_scaling": LINEAR},
    {"rope_scaling": {"type": "linear", "factor": 3.0}},
    {"rope_scaling": {**LINEAR, "rope_theta": 55.0}},
    {"rope_theta": 33.0, "rope_scaling": LINEAR},
    {"rope_scaling": YARN},
    {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 5}},
    {"rope_scaling": {}},
    # scalings
    {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    {"rope_parameters": LINEAR},
    {"rope_parameters": LLAMA3},
    {"rope_parameters": {**LLAMA3, "low_freq_factor": 2, "high_freq_factor": 3}},
    {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}},
    {"rope_parameters": {"rope_type": "no such"}},
    *(
        {"rope_parameters": {**YARN, **change}}
        for change in (
            {},
            {"attention_factor": 0.7},
            {"mscale": 0.7, "mscale_all_dim": 0.4},
            {"mscale": 0.7},
            {"mscale": 0.7, "mscale_all_dim": 0.0},
            {"beta_fast": None, "beta_slow": None},
            {"beta_fast": 2, "beta_slow": 2},
            {"truncate": False},
            {"factor": None},
            {"factor": 0.5},
            {"original_max_position_embeddings": 128},
            {"partial_rotary_factor": 1.0},
        )
    ),
    {"rope_parameters": {**YARN, "truncate": False}, "original_max_position_embeddings": 16},
    *(
        {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 8, **change}}
        for change in (
            {},
            {"factor": 4.0},
            {"factor": 0.5},
            {"attention_factor": 1.3},
            {"short_factor": [1.0]},
        )
    ),
    {"rope_parameters": LONGROPE, "original_max_position_embeddings": 12},
    {
        "rope_parameters": {
            **LONGROPE,
            "rope_type": "su",
            "original_max_position_embeddings": 8,
        }
    },
    {"rope_parameters": {**LONGROPE, "rope_type": "yarn"}},
    # a section for each type of layer
    {"rope_parameters": NESTED},
    {"rope_parameters": NESTED, "rope_scaling": LINEAR},
    {"rope_parameters": {**NESTED, "sliding_attention": None}},
    {"rope_parameters": {"sliding_attention": LINEAR}},
    {"rope_parameters": {**NESTED, "full_attention": {**YARN, "truncate": False}}},
    {"rope_parameters": {**NESTED, "truncate": False}},
    {**OLDER, "rope_scaling": {**YARN, "rope_theta": 44.0}, "rope_theta": 33.0},
]


def reference_tables(config, model_class, length):
    """Cos and sin of transformers by type of layer, or of every layer under None."""
    module = sys.modules[model_class.__module__]
    name = model_class.__name__.removesuffix("ForCausalLM") + "RotaryEmbedding"
    rotary = getattr(module, name)(config=config)
    x, positions = torch.zeros(1, 1, 1), torch.arange(length)[None]
    if "layer_type" not in inspect.signature(type(rotary).forward).parameters:
        return {None: rotary(x, positions)}
    return {kind: rotary(x, positions, kind) for kind in set(config.layer_types)}


def layer_gaps(raw, case, length):
    """Differences of cos and sin at every layer, and ours under a wrong length."""
    config_class, model_class = (getattr(transformers, name) for name in CASES[case][:2])
    parsed = family_of(raw, "config.json").parse(raw)
    try:
        tables = reference_tables(config_class.from_dict(copy.deepcopy(raw)), model_class, length)
    except Exception as error:
        raise ReferenceError("read here and not by transformers") from error
    position, sizes = jnp.arange(length)[None], jnp.full((1, 1), length)
    for layer, kind in enumerate(parsed.layer_kinds):
        rope = parsed.kinds[kind].rope
        if rope.scaling == "none":
            continue
        ours = rotary_tables(position, sizes, rope)
        theirs = tables[None if None in tables else raw["layer_types"][layer]]
        for a, b in zip(ours, theirs, strict=True):
            yield np.abs(a - b.numpy()).max() if a.shape == b.shape else np.inf


@pytest.mark.parametrize("case", [case for case in EACH if case != "gpt2"])
def test_every_spelling(case):
    """oracle: cos and sin at every layer, below and above the original length; or a refusal."""
    config_class, model_class, settings = CASES[case]
    # transformers changes the sections that it is given
    raw = getattr(transformers, config_class)(**copy.deepcopy(settings)).to_dict()
    raw["architectures"], problems, read = [model_class], [], 0
    for changes in EDITS:
        entries = {k: v for k, v in {**raw, **changes}.items() if v is not ABSENT}
        for length in (4, 40):
            try:
                gap = max(layer_gaps(entries, case, length))
            except ValueError as error:
                assert "rotary" in str(error) or "rope" in str(error) or "partial" in str(error)
                continue
            except ReferenceError as error:
                problems.append(f"{changes}: {error}: {error.__cause__!r}")
                continue
            read += 1
            if not gap < 1e-5:
                problems.append(f"{changes}, {length} tokens: {gap:.2g}")
    assert not problems, "\n".join(problems)
    assert read > 15


def test_longrope_by_rows_and_segments(tmp_path):
    """law: a sequence alone, beside others and packed gets the factors of its own length."""
    torch_model("llama longrope", tmp_path)  # an original context of 6 tokens
    policy, params = ntkrl.load(tmp_path)
    tokens = np.random.default_rng(0).integers(2, 29, (1, 14))
    packed = jnp.asarray([[1] * 4 + [2] * 8 + [0] * 2])
    together = policy.features(params, jnp.asarray(tokens), packed)[0]
    for start, end in ((0, 4), (4, 12)):
        alone = policy.features(params, jnp.asarray(tokens[:, start:end]))[0]
        np.testing.assert_allclose(together[start:end], alone, atol=1e-5)
    long = policy.features(params, jnp.asarray(tokens[:, :12]))[0, :4]
    assert np.abs(long - together[:4]).max() > 1e-2
    check_length(policy, 4, 2)
    # a cache holds keys rotated by the short factors
    with pytest.raises(ValueError, match="exceed the 6 tokens of original_max_position_embeddings"):
        check_length(policy, 4, 3)
