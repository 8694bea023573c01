"""Files of models by anybody: declared sizes, values of wrong types, weights, tokenizers."""

import json
import os
import struct
import time
import tracemalloc

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ntkrl
from ntkrl import data, models
from ntkrl.models.families import family_of
from ntkrl.models.tensor_map import CHECKED, is_finite
from tests.models.families import EACH, torch_model
from tests.models.test_errors import edit_config, edit_tensors, fails
from tests.models.test_scorers import torch_scorer
from tests.toys import torch_neox


@pytest.fixture
def model_dir(tmp_path):
    """A good model to break, with a tokenizer."""
    torch_neox(tmp_path / "m")
    data.save_tokenizer(tmp_path / "m")
    return tmp_path / "m"


# sizes

DECLARED = {
    "num_hidden_layers": (10**9, 10**18, 9_999),
    "hidden_size": (10**9,),
    "vocab_size": (10**9,),
    "intermediate_size": (10**9,),
    "num_attention_heads": (10**9,),
    "max_position_embeddings": (10**400,),
}


def test_declared_sizes_are_compared_before_they_are_used(model_dir):
    """by hand: a list of a billion layers has 8 GB; the refusal needs 100 MB and seconds."""
    original = (model_dir / "config.json").read_text()
    tracemalloc.start()
    start = time.monotonic()
    for name, sizes in DECLARED.items():
        for size in sizes:
            edit_config(model_dir, **{name: size})
            with pytest.raises(ValueError, match=str(model_dir)):
                models.check(model_dir)
            (model_dir / "config.json").write_text(original)
    edit_config(model_dir, num_hidden_layers=10**9)
    data.load_tokenizer(models.tokenizer_directory(model_dir))  # takes no size from a config
    assert tracemalloc.get_traced_memory()[1] < 100e6
    assert time.monotonic() - start < 60
    tracemalloc.stop()


@pytest.mark.parametrize("count", [3000])
def test_declared_experts_are_compared_before_their_names_are_made(tmp_path, count):
    """by hand: the shapes of the experts alone say how many tensors there must be."""
    torch_model("qwen3 moe", tmp_path)
    edit_config(tmp_path, num_experts=count, num_local_experts=None)
    fails(tmp_path, "declares", "tensors model.layers.{i}.mlp.experts.{e}", "the files hold")


@pytest.mark.parametrize(
    "change", [{"num_objectives": 10**9}, {"gating_n_hidden": 10**9}, {"gating_hidden_dim": 10**30}]
)
def test_declared_heads_of_reward_models(change):
    """by hand: lists of a billion layers or names."""
    raw = {
        **{"architectures": ["LlamaForRewardModelWithGating"], "vocab_size": 128_257},
        **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"intermediate_size": 8, "max_position_embeddings": 8, "pad_token_id": 0},
    }
    models.describe_scorer(raw)
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be at most"):
        models.describe_scorer({**raw, **change})


# values

WRONG = (
    *(True, -1, 0, 2.5, 10**30, 1e300, float("nan"), float("inf"), "x", "9" * 1000, [], {}, [[]]),
    *([None], ["full_attention"], {"a": {}}, {"rope_type": []}, {"rope_type": "yarn", "factor": 0}),
    *({"rope_type": "yarn", "factor": 2, "rope_theta": 1}, [1e308] * 3, "y" * 100_000),
    {"rope_type": "yarn", "factor": 4, "mscale": -50, "mscale_all_dim": -50},
    {"rope_type": "llama3", "factor": 2, "low_freq_factor": 1, "high_freq_factor": 1},
    {"rope_type": "longrope", "short_factor": [0, 1, 1], "long_factor": [1, 1, 1]},
)


@pytest.mark.parametrize("case", EACH)
def test_every_entry_with_values_of_any_type(case, tmp_path):
    """law: a config with any entry replaced is read or refused in a short message."""
    torch_model(case, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    family = family_of(raw, tmp_path)
    names = [
        *raw,
        "rope_scaling",
        "sliding_window_pattern",
        "use_sliding_window",
        "mlp_only_layers",
    ]
    for name in set(names) - {"architectures"}:
        for value in WRONG:
            try:
                config = family.read({**raw, name: value}, tmp_path)
            except ValueError as error:
                assert str(tmp_path) in str(error) and len(str(error)) < 1000, (name, value)
                continue
            ropes = [kind.rope for kind in config.kinds if kind.rope is not None]
            assert all(np.isfinite(rope.frequencies()).all() for rope in ropes), (name, value)
            assert np.isfinite([config.query_scale, config.norm_eps]).all(), (name, value)


def test_messages_of_many_problems_are_short(model_dir):
    """law: a value of megabytes and a thousand unknown fields or tensors fill no screen."""
    edit_config(model_dir, hidden_act="y" * 10**6, layer_norm_eps=list(range(10**5)))
    with pytest.raises(ValueError) as caught:
        ntkrl.load(model_dir)
    assert len(str(caught.value)) < 1000
    edit_config(model_dir, hidden_act="gelu", layer_norm_eps=1e-5)
    edit_tensors(model_dir, lambda t: t.update({f"x{i}": np.ones(1) for i in range(1000)}))
    fails(model_dir, "x0 is not part of this architecture", "and 980 more")
    edit_tensors(model_dir, lambda t: t.update({10**5 * "a": np.ones(1)}))
    with pytest.raises(ValueError) as caught:
        ntkrl.load(model_dir)
    assert len(str(caught.value)) < 2000
    raw = {f"unknown{i}": i + 1 for i in range(1000)}
    (model_dir / "adapter_config.json").write_text(json.dumps(raw))
    fails(model_dir, "adapter_config.json: unknown0 1 is not supported", "more")


@pytest.mark.parametrize("places", [[1], "x", {"a": 3}, {"a": None}, {"a": ["b"]}, {"a": {}}, None])
def test_index_of_wrong_types(model_dir, places):
    """law: an index that gives no file names is refused by its name."""
    (model_dir / "model.safetensors").unlink()
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    fails(model_dir, "model.safetensors.index.json")


@pytest.mark.parametrize(
    "shard", ["../m/model.safetensors", "/etc/passwd", "..", ".", "", "a\0b", "a" * 5000, "s/../x"]
)
def test_shards_stay_in_their_directory(model_dir, shard):
    """law: a shard is a plain name of a file; a link to a file is one, as in the hub's cache."""
    index = model_dir / "model.safetensors.index.json"
    names = list(load_file(model_dir / "model.safetensors"))
    (model_dir / "model.safetensors").rename(model_dir.parent / "blob")
    (model_dir / "part.safetensors").symlink_to(model_dir.parent / "blob")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "part.safetensors")}))
    ntkrl.models.check(model_dir)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    fails(model_dir, "names shards that are not in")


def test_head_without_rows(tmp_path):
    """by hand: rows of no columns are compared 4096 at a time, 2^48 times."""
    torch_model("llama odd", tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    end = header["model.norm.weight"]["data_offsets"][0]
    empty = {"dtype": "F32", "shape": [2**60, 0], "data_offsets": [end, end]}
    old = header["model.embed_tokens.weight"]["data_offsets"]
    header = {"spare": {"dtype": "U8", "shape": [old[1] - old[0]], "data_offsets": old}, **header}
    header |= {"lm_head.weight": empty, "model.embed_tokens.weight": empty}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    fails(tmp_path, str(tmp_path))


# weights


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_not_finite(model_dir, value):
    """law: the message names the tensors, ten at most, and the file; one number is enough."""
    edit_tensors(model_dir, lambda t: t["embed_out.weight"].__setitem__((-1, -1), value))
    fails(model_dir, f"{model_dir}/model.safetensors: embed_out.weight: these weights hold NaN")

    def spoil(tensors):
        for array in tensors.values():
            array[...] = value

    edit_tensors(model_dir, spoil)
    fails(model_dir, "embed_out.weight, gpt_neox.embed_in.weight, ", "and 18 more: these weights")


def test_finite_in_the_dtype_that_is_read(model_dir):
    """by hand: 1e39 is finite in float64 and infinite in float32; 1e5 overflows float16."""
    edit_tensors(model_dir, lambda t: t.update({k: v.astype(np.float64) for k, v in t.items()}))
    ntkrl.load(model_dir)
    edit_tensors(model_dir, lambda t: t["embed_out.weight"].__setitem__((0, 0), 1e39))
    fails(model_dir, "embed_out.weight")
    edit_tensors(model_dir, lambda t: t["embed_out.weight"].__setitem__((0, 0), 1e5))
    ntkrl.load(model_dir, jnp.bfloat16)
    with pytest.raises(ValueError, match="embed_out.weight"):
        ntkrl.load(model_dir, jnp.float16)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_is_finite(dtype):
    """oracle: NumPy's check, for every place of a number that is not finite; the largest is."""
    array = np.zeros((CHECKED // 8 + 3, 9), dtype)
    largest = ml_dtypes.finfo(dtype).max
    array[-1, -1], array[0, 0] = largest, -largest
    assert is_finite(array) and is_finite(array[:0])
    for place in ((0, 0), (-1, -1), (CHECKED // 9, 5)):
        for value in (np.nan, -np.nan, np.inf, -np.inf):
            wrong = array.copy()
            wrong[place] = value
            assert not is_finite(wrong)
            assert not np.isfinite(wrong.astype(np.float64)).all()


def test_adapters_and_reward_models_that_are_not_finite(tmp_path):
    """law: every reader of tensors checks them."""
    torch_model("llama 3", tmp_path / "base")
    policy, params = ntkrl.load(
        tmp_path / "base", options=models.ModelOptions(lora=models.Lora(rank=2))
    )
    models.export_adapter(tmp_path / "adapter", policy, params)
    torch_scorer("llama 3", tmp_path / "reward")
    for directory, load in (("adapter", ntkrl.load), ("reward", models.load_scorer)):
        path = next((tmp_path / directory).glob("*.safetensors"))
        tensors = load_file(path)
        name = sorted(tensors)[0]
        tensors[name][0] = np.nan
        save_file(tensors, path)
        with pytest.raises(ValueError, match=f"{path}: {name}: these weights hold NaN"):
            load(tmp_path / directory)


# tokenizers


def tokenizer_fails(directory, *parts):
    """Loading the tokenizer raises one short ValueError that names the directory."""
    with pytest.raises(ValueError) as caught:
        data.load_tokenizer(directory)
    message = str(caught.value)
    assert str(directory) in message and len(message) < 800 and "\n" not in message, message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_malformed_tokenizers(model_dir, name):
    """law: a sentence, for files that the tokenizer does not need, too."""
    for content in ("", "{", "[]", "null", '{"a"', "[" * 10**5, "\0", '{"a": 1, "a": 2}'):
        (model_dir / name).write_text(content)
        if name != "tokenizer.json" or content != '{"a": 1, "a": 2}':
            tokenizer_fails(model_dir)
    (model_dir / name).write_bytes(b"\xff\xfe{\0}\0")
    tokenizer_fails(model_dir, "utf-8" if name == "tokenizer.json" else "not UTF-8")


@pytest.mark.parametrize(
    "edit",
    [
        {"eos_token": 3},
        {"eos_token": ["a"]},
        {"eos_token": {"content": 7}},
        {"chat_template": 3},
        {"chat_template": {"a": 3}},
        {"tokenizer_class": 3},
        {"tokenizer_class": ["a"]},
        {"added_tokens_decoder": 3},
        {"added_tokens_decoder": {"x": {"content": "a"}}},
        {"added_tokens_decoder": {"-1": {"content": "a"}}},
        {"added_tokens_decoder": {"1": 3}},
        {"auto_map": {"AutoTokenizer": ["x--y.Z", None]}},
        {"extra_special_tokens": 3},
    ],
    ids=str,
)
def test_tokenizer_configs_of_wrong_types(model_dir, edit):
    """law: a sentence, or a tokenizer that works."""
    path = model_dir / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
    try:
        tokenizer = data.load_tokenizer(model_dir)
    except ValueError:
        tokenizer_fails(model_dir)
    else:
        assert tokenizer.decode(tokenizer("1+1")["input_ids"]).replace(" ", "") == "1+1"


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "chat_template.jinja"])
def test_files_of_a_tokenizer_are_regular_and_small(model_dir, name):
    """law: neither a pipe nor a terabyte is opened."""
    path = model_dir / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    tokenizer_fails(model_dir, name, "is not a regular file")
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**40)
    tokenizer_fails(model_dir, name, "has 1099511627776 bytes")


def test_panics_of_tokenizers_are_sentences(model_dir, monkeypatch):
    """by hand: a panic of Rust code is a BaseException, which `except Exception` lets through."""
    import transformers

    class PanicException(BaseException):
        pass

    def panic(*_, **__):
        raise PanicException("index out of bounds\nnote: run with RUST_BACKTRACE=1")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", panic)
    tokenizer_fails(model_dir, "does not load (PanicException: index out of bounds note:")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.load_tokenizer(model_dir)


def test_tokens_beyond_the_vocabulary(model_dir):
    """by hand: 18 entries, one with the id 30: row 30 of 23 would be read as another row."""
    raw = json.loads((model_dir / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    vocabulary[next(name for name, i in vocabulary.items() if i == len(vocabulary) - 1)] = 30
    (model_dir / "tokenizer.json").write_text(json.dumps(raw))
    assert data.needed_rows(data.load_tokenizer(model_dir)) == 31
