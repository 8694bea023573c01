"""Invalid model directories: one clear message, and no partial model."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ntkrl
from tests.toys import torch_neox


@pytest.fixture(scope="module")
def good_models(tmp_path_factory):
    """A good model directory in one file, and one in shards."""
    place = tmp_path_factory.mktemp("models")
    model = torch_neox(place / "one")
    model.save_pretrained(place / "many", max_shard_size="5KB")
    return place


@pytest.fixture
def model_dir(good_models, tmp_path):
    """A copy to break."""
    return shutil.copytree(good_models / "one", tmp_path / "m")


def edit_config(directory, **changes):
    """Change entries of config.json; None removes one."""
    path = directory / "config.json"
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))


def edit_tensors(directory, change):
    """Rewrite the tensors through a function on the dict."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def fails(directory, *parts):
    """Loading raises one ValueError that holds all the parts."""
    with pytest.raises(ValueError) as caught:
        ntkrl.load(directory)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_no_directory(tmp_path):
    """law: a path that is not a directory, or is empty: the message lists the expected files."""
    fails(tmp_path / "nope", "is not a directory", "config.json, *.safetensors")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "has no config.json; it holds nothing")


def test_half_written(model_dir):
    """law: weights cut short, or a config that is not JSON, name the file."""
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    fails(model_dir, "model.safetensors is not a complete safetensors file")
    path.write_bytes(b"")
    fails(model_dir, "model.safetensors is not a complete safetensors file")
    path.unlink()
    fails(model_dir, "holds neither model.safetensors nor model.safetensors.index.json")
    (model_dir / "config.json").write_text('{"architectures":')
    fails(model_dir, "config.json is not valid JSON")


def test_pickle_is_refused(model_dir):
    """law: a pickle-only directory is refused with the way out, and never opened."""
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    fails(model_dir, "only pickle checkpoints (pytorch_model.bin)", "safe_serialization=True")


def test_unknown_architecture(model_dir):
    """law: the message lists the known architectures."""
    edit_config(model_dir, architectures=["MambaForCausalLM"])
    fails(
        model_dir, "architecture ['MambaForCausalLM'] is unknown; known are", "GPTNeoXForCausalLM"
    )


def test_all_tensor_problems_at_once(model_dir):
    """law: missing, unknown, misshapen and wrongly typed tensors come in one message."""

    def change(tensors):
        tensors["stranger"] = np.ones(3, np.float32)
        del tensors["gpt_neox.final_layer_norm.bias"]
        tensors["embed_out.weight"] = np.ones((23, 15), np.float32)
        name = "gpt_neox.layers.1.mlp.dense_h_to_4h.bias"
        tensors[name] = tensors[name].astype(np.int32)

    edit_tensors(model_dir, change)
    fails(
        model_dir,
        "gpt_neox.final_layer_norm.bias is missing",
        "stranger is not part of this architecture",
        "embed_out.weight has shape (23, 15), expected (23, 16)",
        "gpt_neox.layers.1.mlp.dense_h_to_4h.bias has dtype I32",
    )


def test_old_buffers_are_ignored(model_dir):
    """law: buffers of older checkpoints are known by name and carry nothing."""

    def change(tensors):
        tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = np.ones(2, np.float32)
        tensors["gpt_neox.layers.1.attention.masked_bias"] = np.ones((), np.float32)

    edit_tensors(model_dir, change)
    ntkrl.load(model_dir)


def test_all_config_problems_at_once(model_dir):
    """law: missing, mistyped and impossible entries come in one message."""
    edit_config(
        model_dir, hidden_size=None, num_hidden_layers=2.5, hidden_act="cube", layer_norm_eps="x"
    )
    fails(
        model_dir,
        "hidden_size must be a positive integer, not None",
        "num_hidden_layers must be a positive integer, not 2.5",
        "hidden_act 'cube' is not among",
        "layer_norm_eps must be a number, not 'x'",
    )


def test_impossible_shapes(model_dir):
    """law: heads that do not divide the width, odd rotations, other rotary scalings."""
    edit_config(model_dir, num_attention_heads=3)
    fails(model_dir, "hidden_size 16 is not a multiple of num_attention_heads 3")
    edit_config(model_dir, num_attention_heads=2, rope_parameters=None, rotary_pct=0.4)
    fails(model_dir, "gives 3 rotated dimensions; it must be even")
    edit_config(model_dir, rope_scaling={"type": "dynamic", "factor": 2.0})
    fails(
        model_dir,
        "rope_type 'dynamic' is not supported, only default, linear, llama3, yarn, longrope",
    )
    edit_config(model_dir, rope_scaling={"type": "llama3", "factor": "x"})
    fails(
        model_dir,
        "rotary factor must be a number, not 'x'",
        "rotary low_freq_factor must be a number, not None",
    )


def test_shards(good_models, tmp_path):
    """law: a missing shard, a wrong index, a shard outside the directory."""
    many = shutil.copytree(good_models / "many", tmp_path / "m")
    index = many / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    shards = sorted(set(raw["weight_map"].values()))
    assert len(shards) > 1
    lying = {**raw, "weight_map": {**raw["weight_map"], "embed_out.weight": shards[0]}}
    if raw["weight_map"]["embed_out.weight"] == shards[0]:
        lying["weight_map"]["embed_out.weight"] = shards[1]
    index.write_text(json.dumps(lying))
    fails(many, "places tensors in shards that do not hold them: embed_out.weight")
    lying["weight_map"]["embed_out.weight"] = "../one/model.safetensors"
    index.write_text(json.dumps(lying))
    fails(many, "names shards that are not in", "../one/model.safetensors")
    index.write_text(json.dumps(raw))
    (many / shards[1]).unlink()
    fails(many, "names shards that are not in", shards[1])


def test_random_damage_never_crashes(good_models, tmp_path):
    """law: bytes flipped in the header give a ValueError or an intact model, nothing else."""
    rng = np.random.default_rng(0)
    original = (good_models / "one" / "model.safetensors").read_bytes()
    refused = 0
    for trial in range(30):
        place = shutil.copytree(good_models / "one", tmp_path / str(trial))
        damaged = bytearray(original)
        for at in rng.integers(0, 2000, 3):
            damaged[at] = rng.integers(0, 256)
        (place / "model.safetensors").write_bytes(bytes(damaged))
        try:
            ntkrl.load(place)
        except ValueError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_random_damage_of_json_never_crashes(good_models, tmp_path, name):
    """law: bytes of a JSON file flipped, cut or doubled: a ValueError or a complete model."""
    rng = np.random.default_rng(1)
    original = (good_models / "many" / name).read_bytes()
    place = shutil.copytree(good_models / "many", tmp_path / "m")
    refused = 0
    for trial in range(60):
        damaged = bytearray(original)
        at = int(rng.integers(0, len(damaged)))
        if trial % 3 == 0:
            damaged[at] = rng.integers(0, 256)
        elif trial % 3 == 1:
            del damaged[at : at + int(rng.integers(1, 30))]
        else:
            damaged[at:at] = damaged[at : at + int(rng.integers(1, 30))]
        (place / name).write_bytes(bytes(damaged))
        try:
            ntkrl.models.check(place)
        except ValueError:
            refused += 1
    assert refused > 20


def test_build_and_export_misuse(tmp_path):
    """law: export accepts only a policy of this package."""
    from tests.toys import toy_params, toy_policy

    policy = toy_policy()
    with pytest.raises(ValueError, match="a policy made by ntkrl.load or ntkrl.build"):
        ntkrl.export(tmp_path / "x", policy, toy_params(policy))
