"""GGUF files: the model that they hold, their tokenizer, their conversion and its cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file

import ntkrl
from ntkrl import data, main, models
from tests.models.families import LLAMA3, tokens_and_mask, torch_logits, torch_model
from tests.models.gguf_models import byte_level, metadata_json, sentencepiece, write_gguf

GEMMA = {"query_pre_attn_scalar": 10}
# case of tests/models/families.py, and what a GGUF file does not hold
CASES = {
    "llama odd": {},
    "llama 3": {},
    "llama yarn": {},
    "llama linear": {},
    "mistral full, tied": {},
    "qwen2": {},
    "qwen3 tied, biased": {},
    "qwen3 moe": {},
    "gemma 2 hard caps": GEMMA,
    "gemma 3 scaled": GEMMA,
    "gpt2": {},
    "gpt-neox": {},
    "olmo 2 tied, biased": {},
    "smollm3 local, untied": {
        "use_sliding_window": False,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    },
    "phi 3": {},
    "phi 4 mini": {},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ntkrl" / "gguf"


def logits_of(path, tokens, mask):
    policy, params = ntkrl.load(path)
    with jax.default_matmul_precision("highest"):
        phi = policy.features(params, jnp.asarray(tokens), jnp.asarray(mask))
        return np.asarray(policy.head(params, phi))


def seldom(cases, often):
    """Return the cases, of which those that differ little from others are slow tests."""
    return [case if case in often else pytest.param(case, marks=pytest.mark.slow) for case in cases]


OFTEN = {"llama odd", "llama 3", "qwen3 moe", "gemma 2 hard caps", "gemma 3 scaled", "gpt2"}
OFTEN |= {"gpt-neox", "olmo 2 tied, biased", "smollm3 local, untied", "phi 4 mini"}


@pytest.mark.parametrize("case", seldom(CASES, OFTEN))
def test_logits_equal_the_original(case, tmp_path):
    """oracle: a file of float32 tensors computes what the model does that it was written from."""
    model = torch_model(case, **CASES[case])
    path = write_gguf(tmp_path / "model.gguf", model)
    tokens, mask = tokens_and_mask(model.config.vocab_size)
    expected, _ = torch_logits(model, tokens, mask)
    np.testing.assert_allclose(logits_of(path, tokens, mask)[mask], expected[mask], atol=1e-4)


# one type for each kind of tensor; rows of 256 for the types with blocks of 256
KINDS = {
    **{"token_embd": Kind.Q8_0, "attn_q.": Kind.Q4_0, "attn_k.": Kind.Q4_1, "attn_v": Kind.Q5_0},
    **{"attn_output": Kind.Q5_1, "ffn_gate": Kind.Q6_K, "ffn_up": Kind.Q4_K},
    **{"ffn_down": Kind.F16, "output.weight": Kind.BF16},
}
WIDE = {"hidden_size": 256, "head_dim": 64, "initializer_range": 0.05}
THEIRS = {
    "llama": WIDE,
    "qwen2 tied, local": {**WIDE, "use_sliding_window": False},
    "gemma 2": {**WIDE, "head_dim": 256, "query_pre_attn_scalar": 256},
    "gpt2": {"n_embd": 256, "n_positions": 1024, "initializer_range": 0.05},
}


@pytest.mark.parametrize("case", seldom(THEIRS, {"llama", "gpt2"}))
def test_equals_transformers_own_reading(case, tmp_path):
    """oracle: tensors of every type, and logits, as `from_pretrained(gguf_file=…)` reads them."""
    path = write_gguf(tmp_path / "model.gguf", torch_model(case, **THEIRS[case]), KINDS)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, attn_implementation="eager", dtype=torch.float32
    ).eval()
    directory = models.local_directory(path)
    ours = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, tensor in ours.state_dict().items():
        np.testing.assert_allclose(tensor, expected[name], atol=1e-6, err_msg=name)
    tokens, mask = tokens_and_mask(theirs.config.vocab_size)
    logits, _ = torch_logits(theirs, tokens, mask)
    np.testing.assert_allclose(logits_of(path, tokens, mask)[mask], logits[mask], atol=1e-4)


def test_llama_3_scaling_is_recognised(tmp_path):
    """law: the divisors of Llama 3's frequencies become its settings; others stay divisors."""
    rope = {**LLAMA3, "rope_theta": 5e5, "factor": 32.0, "original_max_position_embeddings": 8192}
    model = torch_model("llama 3", rope_parameters=rope, head_dim=64)
    config = metadata_json(models.local_directory(write_gguf(tmp_path / "a.gguf", model)))
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    other = write_gguf(tmp_path / "b.gguf", torch_model("llama 3"))
    assert metadata_json(models.local_directory(other))["rope_scaling"]["rope_type"] == "longrope"


def test_copy_of_the_embedding_is_a_tied_head(tmp_path):
    """law: old files of GPT-2 store the embedding twice; another output is a head of its own."""
    model = torch_model("gpt2", tie_word_embeddings=True)
    for name, change in (("same", 0.0), ("other", 0.1)):
        untied = torch_model("gpt2", tie_word_embeddings=False)
        untied.load_state_dict(model.state_dict())
        with torch.no_grad():
            untied.lm_head.weight.add_(change)
        path = write_gguf(tmp_path / f"{name}.gguf", untied)
        assert ntkrl.load(path)[0].tied == (name == "same")


TOKENIZERS = {"bytes": lambda: byte_level(31), "pieces": sentencepiece}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizer_equals_transformers(kind, tmp_path):
    """oracle: ids, special tokens and chat template as transformers reads them from the file."""
    metadata = TOKENIZERS[kind]()
    size = len(metadata["tokenizer.ggml.tokens"])
    path = write_gguf(
        tmp_path / "model.gguf", torch_model("llama", vocab_size=size), tokens=metadata
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours = data.load_tokenizer(models.tokenizer_directory(path))
    texts = ["banana", "a ban an", "<|end|>an<|user|>", "</s>b", "ban\n é", ""]
    assert ours(texts)["input_ids"] == theirs(texts)["input_ids"]
    assert len(ours) == size and ours.get_vocab() == {
        token: number for token, number in theirs.get_vocab().items() if number < size
    }
    assert ours.chat_template == theirs.chat_template
    for name in ("bos_token", "eos_token"):
        if metadata.get(f"tokenizer.ggml.{name}_id") is not None:
            assert getattr(ours, name) == getattr(theirs, name)


def test_export_is_a_hugging_face_directory(tmp_path):
    """law: what was read from a file is exported whole, and transformers computes the same."""
    model = torch_model("llama odd")
    ends = {"tokenizer.ggml.eot_token_id": np.uint32(1)}
    path = write_gguf(tmp_path / "model.gguf", model, changes=ends)
    policy, params = ntkrl.load(str(path))
    ntkrl.export(tmp_path / "export", policy, params)
    assert main.main(["export", str(path), str(tmp_path / "again")]) == 0
    for file in (tmp_path / "export").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    assert main.main(["export", str(path), str(tmp_path / "again"), "--step=best"]) == 2
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"- Base model: `{path}`" in card and "Converted by ntkrl from `model.gguf`" in card
    assert "license: mit" in card
    assert models.generation_end_ids(tmp_path / "export") == (0, 1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert tokenizer.chat_template == data.load_tokenizer(policy.source).chat_template
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    tokens, mask = tokens_and_mask(model.config.vocab_size)
    expected, _ = torch_logits(model, tokens, mask)
    logits, _ = torch_logits(exported, tokens, mask)
    np.testing.assert_allclose(logits[mask], expected[mask], atol=1e-5)


def test_shards_are_written_one_at_a_time(tmp_path, monkeypatch):
    """law: a large model is written in shards with an index, with the same tensors."""
    from ntkrl.models import gguf_files

    path = write_gguf(tmp_path / "model.gguf", torch_model("llama"))
    single = load_file(models.local_directory(path) / "model.safetensors")
    monkeypatch.setattr(gguf_files, "SHARD_BYTES", 10_000)
    monkeypatch.setattr(gguf_files, "FORMAT", 99)
    directory = models.local_directory(path)
    files = sorted(directory.glob("model-*.safetensors"))
    assert len(files) > 2 and (directory / "model.safetensors.index.json").is_file()
    shards = {name: array for file in files for name, array in load_file(file).items()}
    assert shards.keys() == single.keys()
    for name, array in shards.items():
        np.testing.assert_array_equal(array, single[name])
