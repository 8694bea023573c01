"""Adapters against PEFT: loaded, trained as a group, merged, written; and vocabularies resized."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

import ntkrl
from ntkrl import models, ntk, trees, update
from tests.models.families import EACH, tokens_and_mask, torch_logits, torch_model
from tests.models.test_families import equal_trees

TARGETS = {
    "gpt2": ["c_attn", "c_fc"],
    "gpt-neox": ["query_key_value", "dense_4h_to_h"],
    "phi 3": ["qkv_proj", "gate_up_proj", "down_proj"],
    "qwen3 moe": ["q_proj", "v_proj", "o_proj"],
}


def with_adapters(case, directory, **settings):
    """A PEFT model of a case with random adapters, saved with its base."""
    base = torch_model(case, directory / "base")
    targets = TARGETS[case] if case in TARGETS else ["q_proj", "v_proj", "down_proj"]
    settings = {"r": 3, "lora_alpha": 7, "target_modules": targets, **settings}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT corrects fan_in_fan_out for GPT-2 by itself
        model = peft.get_peft_model(base, config).eval()
    model.base_model.model.config._name_or_path = str(directory / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    model.peft_config["default"].base_model_name_or_path = str(directory / "base")
    model.save_pretrained(directory / "adapter")
    return model


@pytest.mark.parametrize("case", EACH)
def test_adapters_equal_peft(tmp_path, case):
    """oracle: PEFT's logits with its adapters, read here; merged on export; written for PEFT."""
    model = with_adapters(case, tmp_path)
    policy, params = ntkrl.load(tmp_path / "adapter")
    tokens, mask = tokens_and_mask(policy.vocab_size)
    expected, _ = torch_logits(model, tokens, mask)

    def logits(policy, params):
        features = jax.jit(policy.features)(params, jnp.asarray(tokens), jnp.asarray(mask))
        return np.asarray(policy.head(params, features))[mask]

    np.testing.assert_allclose(logits(policy, params), expected[mask], atol=1e-4)
    bare, bare_params = ntkrl.load(tmp_path / "base")
    assert np.abs(logits(bare, bare_params) - expected[mask]).max() > 1e-2
    models.export_adapter(tmp_path / "again", policy, params)
    equal_trees(params, ntkrl.load(tmp_path / "again")[1])
    fresh = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path / "again").eval()
    np.testing.assert_allclose(
        torch_logits(theirs, tokens, mask)[0][mask], expected[mask], atol=1e-5
    )
    ntkrl.export(tmp_path / "merged", policy, params)
    np.testing.assert_allclose(logits(*ntkrl.load(tmp_path / "merged")), expected[mask], atol=1e-4)


def test_rank_stabilised_scaling(tmp_path):
    """oracle: PEFT's α/√r."""
    model = with_adapters("qwen3", tmp_path, use_rslora=True)
    policy, params = ntkrl.load(tmp_path / "adapter")
    tokens, mask = tokens_and_mask(policy.vocab_size)
    features = jax.jit(policy.features)(params, jnp.asarray(tokens), jnp.asarray(mask))
    expected = torch_logits(model, tokens, mask)[1]
    np.testing.assert_allclose(np.asarray(features)[mask], expected[mask], atol=1e-4)


# settings of PEFT that change nothing for us, or that are read
EQUAL: list[dict] = [
    {"use_rslora": True},
    {"init_lora_weights": False},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"exclude_modules": ["v_proj"]},
    {"lora_dropout": 0.5},
]
REFUSED: list[dict] = [
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_2"},
    {"init_lora_weights": "olora"},
    {"alora_invocation_tokens": [7, 8]},
    {"bias": "lora_only"},
    {"bias": "all"},
    {"lora_bias": True},
    {"use_dora": True},
    {"rank_pattern": {"q_proj": 2}},
    {"alpha_pattern": {"q_proj": 2}},
    {"modules_to_save": ["lm_head"]},
    {"layers_to_transform": [0]},
    {"trainable_token_indices": [1, 2]},
    {"target_parameters": ["mlp.gate_proj.weight"]},
    {"layer_replication": [[0, 2], [1, 2]]},
]


@pytest.mark.parametrize("settings", EQUAL, ids=str)
def test_settings_of_peft_that_are_supported(tmp_path, settings):
    """oracle: the logits of PEFT's model, loaded from the same directories."""
    with_adapters("qwen3", tmp_path, **{"r": 4, **settings})
    policy, params = ntkrl.load(tmp_path / "adapter")
    tokens, mask = tokens_and_mask(policy.vocab_size)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    expected = torch_logits(theirs, tokens, mask)[0]
    features = jax.jit(policy.features)(params, jnp.asarray(tokens), jnp.asarray(mask))
    ours = np.asarray(policy.head(params, features))
    np.testing.assert_allclose(ours[mask], expected[mask], atol=1e-4)


@pytest.mark.parametrize("settings", REFUSED, ids=str)
def test_settings_of_peft_that_are_refused(tmp_path, settings):
    """law: an adapter that computes something else is refused by the setting's name."""
    with_adapters("qwen3", tmp_path, **settings)
    (name,) = settings
    with pytest.raises(ValueError, match=rf"adapter_config.json.*{name} .* is not supported, only"):
        ntkrl.load(tmp_path / "adapter")
    with pytest.raises(ValueError, match=name):
        models.check(tmp_path / "adapter")


def test_settings_that_peft_may_add(tmp_path):
    """law: an unknown setting is refused unless it is off."""
    with_adapters("qwen3", tmp_path)
    path = tmp_path / "adapter" / "adapter_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "use_new": 1, "new_config": {}, "other": None}))
    with pytest.raises(ValueError, match="use_new 1 is not supported, only None, False") as caught:
        ntkrl.load(tmp_path / "adapter")
    assert "new_config" not in str(caught.value) and "other" not in str(caught.value)
    path.write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        ntkrl.load(tmp_path / "adapter")


def test_adapters_are_a_group_of_parameters(tmp_path):
    """law: new ones change nothing, train alone by a stage, and are a part of the kernel."""
    torch_model("llama 3", tmp_path)
    lora = models.Lora(rank=2, alpha=4.0, modules="q_proj|mlp/.*")
    policy, params = ntkrl.load(tmp_path, options=models.ModelOptions(lora=lora))
    plain, plain_params = ntkrl.load(tmp_path)
    tokens = jnp.asarray(tokens_and_mask(policy.vocab_size)[0])
    np.testing.assert_array_equal(
        policy.features(params, tokens), plain.features(plain_params, tokens)
    )
    names = [name for name in trees.names(params) if "lora" in name]
    assert [n for n in names if n.endswith("lora_a")] == [
        f"layers/{module}/lora_a"
        for module in ("attention/query", "mlp/down", "mlp/gate", "mlp/up")
    ]
    stage = update.Stage("adapters", 1, ((".*/lora_[ab]", 1e-2), (".*", None)))
    bound_stage = update.bind_stage(stage, policy, params)
    assert sum(bound_stage.trained) == len(names) == 8
    groups = ((".*/lora_[ab]", "adapters"), (".*", "rest"))
    params = jax.tree.map(lambda leaf: leaf + 0.01, params)
    kernel = ntk.kernel(policy, params, ntk.last_positions(tokens), groups=groups)
    parts = [np.asarray(kernel.trace(part)) for part in ("adapters", "rest", "full")]
    np.testing.assert_allclose(parts[0] + parts[1], parts[2], rtol=1e-3)
    assert np.abs(parts[0]).min() > 0


def test_routers_and_experts_take_no_adapters(tmp_path):
    """law: new adapters skip them or name them; PEFT's, of parameters, are refused by name."""
    with_adapters("qwen3 moe", tmp_path, target_modules=["q_proj", "down_proj"])
    everywhere = models.ModelOptions(lora=models.Lora(modules=".*"))
    adapted = ntkrl.load(tmp_path / "base", options=everywhere)[0].config.adapters.modules
    assert adapted == tuple(f"attention/{name}" for name in ("query", "key", "value", "out"))
    for modules in ("mlp/experts/up", "mlp/router"):
        with pytest.raises(ValueError, match="routers and experts take no adapters"):
            ntkrl.load(
                tmp_path / "base", options=models.ModelOptions(lora=models.Lora(modules=modules))
            )
    with pytest.raises(ValueError, match=r"target_parameters \['down_proj'\] is not supported"):
        ntkrl.load(tmp_path / "adapter")


def test_what_adapters_cannot_do(tmp_path):
    """law: patterns that match nothing, DoRA, saved modules, no base: one sentence each."""
    with_adapters("qwen3", tmp_path)

    def with_lora(lora, name="base"):
        return ntkrl.load(tmp_path / name, options=models.ModelOptions(lora=lora))

    with pytest.raises(ValueError, match="matches no module; a layer has attention/query"):
        with_lora(models.Lora(modules="qkv"))
    with pytest.raises(ValueError, match="rank 0 and alpha 16.0 must be positive"):
        with_lora(models.Lora(rank=0))
    with pytest.raises(ValueError, match="holds adapters already"):
        with_lora(models.Lora(), "adapter")
    with pytest.raises(ValueError, match="has no adapters"):
        models.export_adapter(tmp_path / "x", *ntkrl.load(tmp_path / "base"))
    with pytest.raises(ValueError, match="base is for adapter directories"):
        ntkrl.load(tmp_path / "base", base=tmp_path / "base")
    path = tmp_path / "adapter" / "adapter_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "use_dora": True, "modules_to_save": ["lm_head"]}))
    with pytest.raises(ValueError, match=r"modules_to_save \['lm_head'\] is not") as caught:
        ntkrl.load(tmp_path / "adapter")
    assert "use_dora True is not supported" in str(caught.value)
    path.write_text(json.dumps({**raw, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="names no base model; give it as base"):
        ntkrl.load(tmp_path / "adapter")
    ntkrl.load(tmp_path / "adapter", base=tmp_path / "base")


@pytest.mark.parametrize("case", ["gpt-neox", "gemma 3"])
def test_resizing(tmp_path, case):
    """oracle: transformers' resize_token_embeddings for fewer rows; more rows are the mean."""
    model = torch_model(case, tmp_path / "hf")
    policy, params = ntkrl.load(tmp_path / "hf")
    rows = policy.vocab_size
    smaller, cut = models.resized(policy, params, rows - 4)
    model.resize_token_embeddings(rows - 4)
    tokens, mask = tokens_and_mask(rows - 4)
    expected = torch_logits(model, tokens, mask)[0]
    features = jax.jit(smaller.features)(cut, jnp.asarray(tokens), jnp.asarray(mask))
    np.testing.assert_allclose(
        np.asarray(smaller.head(cut, features))[mask], expected[mask], atol=1e-4
    )
    ntkrl.export(tmp_path / "out", smaller, cut)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.vocab_size == smaller.vocab_size == rows - 4
    larger, grown = models.resized(policy, params, rows + 3)
    weight = np.asarray(grown["embed"]["embedding"])
    assert larger.vocab_size == weight.shape[0] == rows + 3
    np.testing.assert_allclose(
        weight[rows:], np.tile(weight[:rows].mean(axis=0), (3, 1)), atol=1e-6
    )
    np.testing.assert_array_equal(weight[:rows], np.asarray(params["embed"]["embedding"]))
