"""Conversion of GGUF files: its cache, and files that are damaged or not supported."""

import multiprocessing
import os
import struct

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

import ntkrl
from ntkrl import models
from tests.models.families import torch_model
from tests.models.gguf_models import write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ntkrl" / "gguf"


@pytest.fixture
def path(tmp_path):
    """An intact file."""
    return write_gguf(tmp_path / "model.gguf", torch_model("llama"))


def refusal(path):
    """Return the message of a file's refusal, in a sentence that names it."""
    with pytest.raises(ValueError) as error:
        models.local_directory(path)
    message = str(error.value)
    assert path.name in message and len(message) < 4000
    return message


def test_converts_once(path, tmp_path, cache, capfd):
    """law: the same content is converted once, whatever the file's name."""
    first = models.local_directory(path)
    assert "converting" in (text := capfd.readouterr().err) and str(first) in text
    renamed = path.rename(tmp_path / "no ending")
    assert models.local_directory(renamed) == first and capfd.readouterr().err == ""
    assert [entry.name for entry in cache.iterdir() if entry.is_dir()] == [first.name]
    assert models.check(renamed) == 31
    # another content of the same size and name
    content = bytearray(renamed.read_bytes())
    content[-1] ^= 1
    renamed.write_bytes(content)
    assert models.local_directory(renamed) != first


def _convert(path, queue):
    queue.put(str(models.local_directory(path)))


def test_two_processes_convert_once(path, cache, capfd):
    """law: of two that ask at once, one converts and the other waits for it."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_convert, args=(path, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    results = {queue.get(timeout=100) for _ in processes}
    for process in processes:
        process.join()
    assert len(results) == 1 and capfd.readouterr().err.count("converting") == 1


def test_no_partial_directory(path, cache, monkeypatch):
    """law: a conversion that ends early leaves nothing that a later one would take for complete."""
    from ntkrl import gguf

    monkeypatch.setattr(gguf, "read_tensor", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        models.local_directory(path)
    assert not any(entry.is_dir() for entry in cache.iterdir())
    monkeypatch.undo()
    os.environ["XDG_CACHE_HOME"] = str(cache.parent.parent)
    ntkrl.load(path)


def test_missing_package_and_places(path, tmp_path, monkeypatch):
    """law: what a user meets first is said in a sentence with the remedy."""
    assert "does not exist" in refusal(tmp_path / "org" / "absent.gguf")
    with pytest.raises(ValueError, match=r"no config.json.*model.gguf; give the GGUF file itself"):
        ntkrl.load(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    with pytest.raises((ValueError, OSError), match="/proc/nowhere"):
        models.local_directory(path)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'ntkrl\[gguf\]'"):
        models.local_directory(path)


CHANGES = {
    "architecture 'mamba' is unknown; known are gemma2": {"general.architecture": "mamba"},
    "llama.attention.head_count is missing": {"llama.attention.head_count": None},
    "llama.attention.head_count must be int, not 'x'": {"llama.attention.head_count": "x"},
    "llama.attention.clamp_kqv 8.0 is not supported": {"llama.attention.clamp_kqv": 8.0},
    "llama.expert_count 4 is not supported": {"llama.expert_count": 4},
    "holds no language model, but 'adapter'": {"general.type": "adapter"},
    "different numbers by layer": {"llama.attention.head_count_kv": [2, 1]},
    "rotary scaling 'su' is not supported": {"llama.rope.scaling.type": "su"},
    "declares 9999 tensors": {"llama.block_count": 9999},
    "num_hidden_layers must be at most": {"llama.block_count": 2**31},
    "has no tokenizer": {"tokenizer.ggml.tokens": None},
    "the tokenizer 'bert' cannot be converted": {"tokenizer.ggml.model": "bert"},
    "tokenizer.ggml.eos_token_id must be the id of one of its 31": {
        "tokenizer.ggml.eos_token_id": np.uint32(31)
    },
    "tokenizer.ggml.merges must be a list of str": {"tokenizer.ggml.merges": [1, 2]},
    "is one of 3 parts": {"split.count": 3},
    "blk.0.attn_q.weight has shape (24, 24), expected (24, 48)": {
        "llama.embedding_length": 48,
        "llama.attention.head_count": 4,
        "llama.rope.dimension_count": 6,
    },
}


@pytest.mark.parametrize("message", CHANGES)
def test_unsupported_metadata(message, tmp_path):
    """law: what is declared and cannot be computed is refused by name."""
    model = torch_model("llama")
    assert message in refusal(
        write_gguf(tmp_path / "model.gguf", model, changes=CHANGES[message])
    ).replace("\n", " ")


def test_unsupported_tensors(tmp_path):
    """law: types that cannot be dequantised, NaN, tensors of another model."""
    model = torch_model("llama")
    path = write_gguf(tmp_path / "a.gguf", model, kinds={"output_norm": Kind.I32})
    assert "'output_norm.weight' has type number 26, which is not supported" in refusal(path)
    model.model.norm.weight.data[3] = np.nan
    path = write_gguf(tmp_path / "b.gguf", model)
    assert "the tensor output_norm.weight holds NaN or infinity" in refusal(path)
    path = write_gguf(tmp_path / "c.gguf", torch_model("qwen2"), changes={})
    content = path.read_bytes().replace(b"blk.1.attn_q.bias", b"blk.1.attn_Q.bias")
    path.write_bytes(content)
    assert "blk.1.attn_q.bias is missing; blk.1.attn_Q.bias is not part" in refusal(path)


def changed(path, at, content):
    """Write bytes into a copy of a file."""
    whole_file = bytearray(path.read_bytes())
    whole_file[at : at + len(content)] = content
    copy = path.with_name("damaged.gguf")
    copy.write_bytes(whole_file)
    return copy


def test_damaged_headers(path):
    """law: every count is compared with the file's size before anything is allocated."""
    huge = struct.pack("<Q", 2**60)
    assert "not a GGUF file" in refusal(changed(path, 0, b"GGML"))
    assert "big-endian" in refusal(changed(path, 4, b"\0\0\0\3"))
    assert "has GGUF version 1" in refusal(changed(path, 4, b"\1\0\0\0"))
    assert "1152921504606846976 tensors" in refusal(changed(path, 8, huge))
    assert "metadata entries" in refusal(changed(path, 16, huge))
    assert "bytes of its header" in refusal(changed(path, 24, huge))  # length of the first key
    content = path.read_bytes()
    at = content.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    assert "'tokenizer.ggml.tokens'" in refusal(changed(path, at, huge))
    at = content.index(b"output_norm.weight") + len(b"output_norm.weight")
    assert "1000000 dimensions" in refusal(changed(path, at, struct.pack("<I", 10**6)))
    assert "needs bytes" in refusal(changed(path, at + 4, huge))
    assert "is empty" in refusal(changed(path, at + 4, bytes(8)))
    assert "needs bytes" in refusal(changed(path, at + 16, struct.pack("<Q", 2**62)))
    copy = changed(path, 0, b"")
    copy.write_bytes(content.replace(b"output_norm.weight", b"blk.0.attn_norm.we"))
    assert "is missing" in refusal(copy)
    copy.write_bytes(content.replace(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"))
    assert "'blk.0.attn_q.weight' occurs twice" in refusal(copy)
    copy.write_bytes(content.replace(b"llama.context_length", b"llama.embeddi_length"))
    assert "llama.context_length is missing" in refusal(copy)
    for size in (0, 10, 30, 1000, len(content) // 2, len(content) - 1):
        copy.write_bytes(content[:size])
        assert refusal(copy)
    os.unlink(copy)
    os.mkfifo(copy)
    assert "not a regular file" in refusal(copy)


def test_random_damages_are_sentences(path, monkeypatch):
    """law: 150 random changes of a header are accepted or refused in a sentence, in time."""
    from ntkrl.models import gguf_files

    content, rng = path.read_bytes(), np.random.default_rng(0)
    end = content.index(b"blk.1.ffn_down") + 100
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        how, at = rng.integers(4), int(rng.integers(end))
        if how == 0:
            damaged[at] ^= 1 << int(rng.integers(8))
        elif how == 1:
            damaged[at : at + 8] = struct.pack("<Q", int(rng.choice([0, 1, 2**31, 2**62])))
        elif how == 2:
            damaged[at:at] = rng.bytes(int(rng.integers(1, 40)))
        else:
            del damaged[at : at + int(rng.integers(1, 40))]
        copy = path.with_name("damaged.gguf")
        copy.write_bytes(damaged)
        try:
            gguf_files.plan_conversion(copy)
        except ValueError as error:
            assert str(copy) in str(error), error
            refused += 1
    assert refused > 75
