"""GPT-NeoX against transformers' torch model, in and out of Hugging Face directories."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import ntkrl
from ntkrl.models import ModelOptions
from tests.models.families import tokens_and_mask, torch_logits
from tests.toys import TINY, torch_neox

SHAPES = {
    "parallel": {},
    "sequential": {"use_parallel_residual": False},
    "full rotary": {"rotary_pct": 1.0},
    "pythia's quarter": {"rotary_pct": 0.25, "hidden_size": 32},
    "odd sizes": {
        "vocab_size": 31,
        "hidden_size": 36,
        "num_attention_heads": 3,
        "intermediate_size": 17,
        "num_hidden_layers": 3,
    },
    "other base and act": {"rotary_emb_base": 500.0, "hidden_act": "gelu_new"},
    "tied": {"tie_word_embeddings": True},
    "no attention bias": {"attention_bias": False},
}


@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES.keys())
def test_logits_and_features_equal_torch(tmp_path, overrides):
    """oracle: transformers' model on odd shapes, with left and right padding."""
    model = torch_neox(tmp_path, **overrides)
    policy, params = ntkrl.load(tmp_path)
    tokens, mask = tokens_and_mask(policy.vocab_size)
    expected_logits, expected_features = torch_logits(model, tokens, mask)
    features = jax.jit(policy.features)(params, jnp.asarray(tokens), jnp.asarray(mask))
    logits = policy.head(params, features)
    assert np.abs(np.asarray(logits) - expected_logits)[mask].max() < 1e-4
    assert np.abs(np.asarray(features) - expected_features)[mask].max() < 1e-4


def test_old_and_new_rotary_spelling_agree(tmp_path):
    """law: rotary_pct/rotary_emb_base and rope_parameters describe the same model."""
    torch_neox(tmp_path, rotary_pct=0.25, rotary_emb_base=700.0, hidden_size=32)
    policy, params = ntkrl.load(tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    rope = raw.pop("rope_parameters")
    assert rope["partial_rotary_factor"] == 0.25
    raw.update(rotary_pct=0.25, rotary_emb_base=700.0)
    path.write_text(json.dumps(raw))
    old_policy, old_params = ntkrl.load(tmp_path)
    tokens, _ = tokens_and_mask(policy.vocab_size)
    new = policy.features(params, jnp.asarray(tokens))
    old = old_policy.features(old_params, jnp.asarray(tokens))
    np.testing.assert_array_equal(np.asarray(new), np.asarray(old))
    # the likely bug reads the default base 10000 in one spelling
    raw.update(rotary_emb_base=10000.0)
    path.write_text(json.dumps(raw))
    other_policy, other_params = ntkrl.load(tmp_path)
    other = other_policy.features(other_params, jnp.asarray(tokens))
    assert np.abs(np.asarray(other) - np.asarray(new)).max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_dtypes_and_shards(tmp_path, dtype):
    """oracle: single and sharded files of every float dtype hold the same numbers."""
    model = torch_neox(dtype=dtype)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="5KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    _, single = ntkrl.load(tmp_path / "one")
    _, many = ntkrl.load(tmp_path / "many")
    expected = model.get_output_embeddings().weight.detach().float().numpy()
    np.testing.assert_array_equal(np.asarray(single["head"]["weight"]), expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), single, many
    )


def test_export_in_shards(tmp_path):
    """law: a sharded export with its index equals the single file."""
    from ntkrl.models import hf_export, hf_files

    rng = np.random.default_rng(0)
    tensors = {f"t{i}": rng.normal(size=(8, 4)).astype(np.float32) for i in range(5)}
    hf_export.write_model(
        tmp_path / "m", {"a": 1}, tensors, hf_export.Companions(), shard_bytes=300
    )
    located = hf_files.tensor_files(tmp_path / "m")
    assert set(located) == set(tensors)
    assert len(set(located.values())) == 3  # 128 bytes each, two to a shard


def test_padding_changes_nothing():
    """law: features of real tokens do not depend on the content or amount of padding."""
    policy, params = ntkrl.build("GPTNeoXForCausalLM", TINY, jax.random.key(0))
    tokens = jnp.asarray([[3, 4, 5, 6]])
    bare = policy.features(params, tokens)
    padded = jnp.asarray([[9, 8, 3, 4, 5, 6, 7]])
    mask = jnp.asarray([[0, 0, 1, 1, 1, 1, 0]], bool)
    np.testing.assert_allclose(
        np.asarray(policy.features(params, padded, mask)[:, 2:6]), np.asarray(bare), atol=2e-6
    )


def test_remat_and_compute_dtype(tmp_path):
    """law: rematerialised gradients are equal; bfloat16 compute stays within its rounding."""
    torch_neox(tmp_path, initializer_range=0.1)
    policy, params = ntkrl.load(tmp_path)
    remat, _ = ntkrl.load(tmp_path, options=ModelOptions(remat="all"))
    half, half_params = ntkrl.load(tmp_path, options=ModelOptions(jnp.bfloat16))
    tokens = jnp.asarray(tokens_and_mask(policy.vocab_size)[0])
    assert half_params["head"]["weight"].dtype == jnp.float32

    def total(p, which):
        return jnp.sum(which.head(p, which.features(p, tokens)).astype(jnp.float32) ** 2)

    gradient = jax.jit(jax.grad(total), static_argnums=1)
    plain, again = gradient(params, policy), gradient(params, remat)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-4, atol=1e-4),
        plain,
        again,
    )
    assert half.features(params, tokens).dtype == jnp.bfloat16
    gap = half.features(params, tokens).astype(jnp.float32) - policy.features(params, tokens)
    # 8 bits of mantissa through two layers: a few per cent of features of size about one
    assert 0 < np.abs(np.asarray(gap)).max() < 0.2


def test_untie_copies_the_head(tmp_path):
    """law: untying keeps the logits, adds a head leaf and exports as untied."""
    torch_neox(tmp_path / "tied", tie_word_embeddings=True)
    policy, params = ntkrl.load(tmp_path / "tied")
    free, free_params = ntkrl.load(tmp_path / "tied", options=ModelOptions(untie=True))
    assert policy.tied and not free.tied
    tokens = jnp.asarray(tokens_and_mask(policy.vocab_size)[0])
    np.testing.assert_array_equal(
        np.asarray(policy.head(params, policy.features(params, tokens))),
        np.asarray(free.head(free_params, free.features(free_params, tokens))),
    )
    ntkrl.export(tmp_path / "out", free, free_params)
    assert not transformers.AutoConfig.from_pretrained(tmp_path / "out").tie_word_embeddings
