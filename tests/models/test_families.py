"""Every family against transformers' torch models, in and out of Hugging Face directories."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import ntkrl
from ntkrl import models
from ntkrl.models.families import FAMILIES
from tests.models.families import CASES, EACH, tokens_and_mask, torch_logits, torch_model

ROOT = Path(__file__).resolve().parents[2]


def test_every_family_is_seen():
    """law: the registry, the cases and the table of configs/README.md list the same families."""
    assert {CASES[case][1] for case in EACH} == set(FAMILIES)
    document = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    _, table = document.split("\n| family |")
    rows = table.split("\n\n")[0].splitlines()[2:]
    labels = [row.split("|")[1].split(" (and")[0].strip() for row in rows]
    assert sorted(labels) == sorted(family.label for family in FAMILIES.values())


def equal_trees(a, b):
    """Same bits everywhere."""
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_features_equal_torch(tmp_path, case):
    """oracle: transformers' model on odd shapes, with left and right padding."""
    model = torch_model(case, tmp_path)
    policy, params = ntkrl.load(tmp_path)
    tokens, mask = tokens_and_mask(policy.vocab_size)
    expected_logits, expected_features = torch_logits(model, tokens, mask)
    features = jax.jit(policy.features)(params, jnp.asarray(tokens), jnp.asarray(mask))
    logits = policy.head(params, features)
    assert np.abs(expected_logits)[mask].max() > 0.5
    assert np.abs(np.asarray(features) - expected_features)[mask].max() < 1e-4
    assert np.abs(np.asarray(logits) - expected_logits)[mask].max() < 1e-4
    assert policy.tied == model.config.tie_word_embeddings


@pytest.mark.parametrize("case", CASES)
def test_import_export_import_is_bit_identical(tmp_path, case):
    """law: a round trip changes no bit, and transformers loads the export as the same model."""
    model = torch_model(case, tmp_path / "hf")
    policy, params = ntkrl.load(tmp_path / "hf")
    ntkrl.export(tmp_path / "out", policy, params)
    equal_trees(params, ntkrl.load(tmp_path / "out")[1])
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is type(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    kept, restored = model.config.to_dict(), again.config.to_dict()
    apart = {k for k in kept if kept[k] != restored[k]} - {"dtype", "transformers_version"}
    assert not apart - {"_name_or_path"}


@pytest.mark.parametrize("case", EACH)
def test_decoding(tmp_path, case):
    """law: prefill plus steps equal a full pass. oracle: 64 greedy tokens of transformers."""
    model = torch_model(case, tmp_path)
    policy, params = ntkrl.load(tmp_path)
    tokens, mask = tokens_and_mask(policy.vocab_size)
    mask[1] = True  # decoding reads to the right of its prompt
    prompt = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask).long()}
    expected = model.generate(
        **prompt, max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=None
    ).numpy()
    cache = policy.init_cache(3, 9 + 64)
    decode, copy = jax.jit(policy.decode), policy.decode_params(params)
    features, cache = decode(copy, cache, jnp.asarray(tokens), jnp.asarray(mask))

    def step(carry, _):
        phi, cache = carry
        token = jnp.argmax(policy.head(params, phi), axis=-1)[:, None]
        moved, cache = policy.decode(copy, cache, token, jnp.ones((3, 1), bool))
        return (moved[:, 0], cache), (token[:, 0], moved[:, 0])

    _, (chosen, stepped) = jax.lax.scan(step, (features[:, -1], cache), None, 64)
    np.testing.assert_array_equal(np.asarray(chosen).T, expected[:, 9:])
    full_mask = np.concatenate([mask, np.ones((3, 64), bool)], axis=1)
    full = jax.jit(policy.features)(params, jnp.asarray(expected), jnp.asarray(full_mask))
    gap = np.abs(np.asarray(full[:, 9:]) - np.asarray(stepped).transpose(1, 0, 2))
    assert gap.max() < 1e-4 * np.abs(np.asarray(full)).max()


@pytest.mark.parametrize("case", EACH)
def test_masters_stay_float32_and_compute_is_bfloat16(tmp_path, case):
    """law: params keep their dtype, features come in bfloat16, close to torch's in bfloat16."""
    model = torch_model(case, tmp_path)
    policy, params = ntkrl.load(tmp_path, options=models.ModelOptions(jnp.bfloat16))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32"}
    tokens, mask = tokens_and_mask(policy.vocab_size)
    exact = torch_logits(model, tokens, mask)[1]
    features = jax.jit(policy.features)(params, jnp.asarray(tokens), jnp.asarray(mask))
    assert features.dtype == jnp.bfloat16
    gap = np.abs(np.asarray(features, np.float32) - exact)[mask]
    theirs = np.abs(torch_logits(model.to(torch.bfloat16), tokens, mask)[1] - exact)[mask]
    # rounding errors of the same size as the reference makes in bfloat16
    assert 0 < gap.mean() < 2 * theirs.mean()


@pytest.mark.parametrize("case", ["gpt2", "llama", "gpt-neox"])
def test_a_trunk_saved_alone(tmp_path, case):
    """law: names without the full model's prefix are read too, if no head is missing."""
    model = torch_model(case, tmp_path / "whole", tie_word_embeddings=True)
    _, params = ntkrl.load(tmp_path / "whole")
    trunk = next(model.children())
    trunk.config.architectures = [type(model).__name__]
    trunk.save_pretrained(tmp_path / "trunk")
    config = (tmp_path / "whole" / "config.json").read_text()
    (tmp_path / "trunk" / "config.json").write_text(config)
    equal_trees(params, ntkrl.load(tmp_path / "trunk")[1])


def test_a_hub_name_without_a_network(tmp_path, monkeypatch):
    """law: a name that cannot be fetched is one sentence, with the way out."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="could not be fetched from the Hugging Face hub"):
        ntkrl.load("EleutherAI/pythia-14m")
    with pytest.raises(ValueError, match="is not a directory; give a Hugging Face model directory"):
        ntkrl.load("./missing")


OLDER = {
    "gemma 2": ({"rope_theta": 10000.0}, []),
    "gemma 3": (
        {"sliding_window_pattern": 3},  # bases 1e6 and 1e4 by default
        [
            {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            {"rope_theta": 2e6},
            {"rope_local_base_freq": 2e4},
        ],
    ),
    "qwen2 tied, local": ({"rope_theta": 10000.0}, [{"rope_theta": 5e5}]),
    "llama 3": (
        {
            "rope_theta": 500.0,
            "rope_scaling": {
                "type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        [{"rope_theta": 501.0}],
    ),
}


@pytest.mark.parametrize("case", OLDER)
def test_older_configs_say_the_same(tmp_path, case):
    """law: files that leave kinds of layers and rotary sections to the usual order and names."""
    torch_model(case, tmp_path)
    written = ntkrl.load(tmp_path)[0].config
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    older, others = OLDER[case]
    kept = {k: v for k, v in raw.items() if k not in ("layer_types", "rope_parameters")}
    kept.pop("_sliding_window_pattern", None)
    path.write_text(json.dumps({**kept, **older}))
    assert ntkrl.load(tmp_path)[0].config == written
    for other in others:
        path.write_text(json.dumps({**kept, **older, **other}))
        assert ntkrl.load(tmp_path)[0].config != written
