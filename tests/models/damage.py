"""Damaged copies of model directories: of every family, in shards, of adapters and reward models.

A damage is a function of a random generator and a directory, which it changes; its name says what
it did. Every file that a model, a tokenizer or an adapter consists of is damaged in every way.
"""

import json
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

import ntkrl
from ntkrl import data, models
from ntkrl.reward.reward_models import RewardTexts
from ntkrl.setup.starting_model import check_vocabulary
from tests.models.families import EACH, torch_model
from tests.models.test_scorers import torch_scorer

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
DEEP = "[" * 5000 + "]" * 5000
# JSON texts, some of which are not JSON
VALUES = (
    *("null", "true", "0", "1", "-1", "2.5", "1000000000", "2147483648", "9223372036854775808"),
    *("1e300", "1e999", "-1e-300", "NaN", "Infinity", "-Infinity", "1" + 400 * "0", 5000 * "9"),
    *('""', '"x"', '"\\ud800"', '"\\u0000"', '"../../etc/passwd"', '"/dev/zero"', '"LlamaConfig"'),
    *("[]", "{}", "[[]]", '[1, "a", null]', '{"a": {"a": 1}}', '["full_attention"]', "[null]"),
    *('{"rope_type": "yarn", "factor": -1}', "[" + "0," * 100_000 + "0]", DEEP),
    '"' + "y" * 1_000_000 + '"',
)
SIZES = ("1000000000", "2147483647", "1000000", "10000", "0", "-3", "1e9", "33")
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "", "X", "C64")


@dataclass(frozen=True)
class Base:
    """An intact directory. kind: "model", "adapter" or "reward"."""

    name: str
    kind: str
    path: Path


def write_bases(place, cases=EACH):
    """Write intact directories of every kind."""
    bases = []
    for case in cases:
        bases.append(Base(case, "model", place / case.replace(" ", "-")))
        torch_model(case, bases[-1].path)
    shards = torch_model(cases[0]), place / "shards"
    shards[0].save_pretrained(shards[1], max_shard_size="10KB")
    bases.append(Base("shards", "model", shards[1]))
    for case in cases[:2]:
        bases.append(Base(f"{case} reward", "reward", place / f"{case.replace(' ', '-')}-reward"))
        torch_scorer(case, bases[-1].path)
    options = models.ModelOptions(lora=models.Lora(rank=2))
    policy, params = ntkrl.load(bases[0].path, options=options)
    bases.append(Base("adapter", "adapter", place / "adapter"))
    models.export_adapter(bases[-1].path, policy, params)
    for base in bases:
        data.save_tokenizer(base.path)
        (base.path / "chat_template.jinja").write_text(TEMPLATE)
        if base.kind == "model":
            (base.path / "generation_config.json").write_text('{"eos_token_id": [0, 3]}')
    return bases


def copy_of(base, place):
    """Copy a directory; files are links to the originals, since a damage replaces them."""
    return shutil.copytree(base.path, place, copy_function=os.link)


def read(directory):
    """Load everything of a model directory as a run does; return what loads the rest."""
    kind = "reward" if "Classification" in _text(directory / "config.json") else "model"
    if kind == "reward":
        models.check_scorer(directory)
        scorer, params = models.load_scorer(directory)
        tokenizer = data.load_tokenizer(directory)
        RewardTexts(scorer, tokenizer)
        return lambda: scorer.score(params, *_row(tokenizer), jnp.zeros(1, int))
    rows = models.check(directory)
    source = models.tokenizer_directory(directory)
    tokenizer = data.load_tokenizer(source)
    check_vocabulary(tokenizer, rows, source)
    policy, params = ntkrl.load(directory)
    data.end_ids(tokenizer, models.generation_end_ids(policy.source), ())
    return lambda: policy.head(params, policy.features(params, *_row(tokenizer)))


def _row(tokenizer):
    ids = jnp.asarray(data.encode_texts(tokenizer, ["1+2="], tokenizer.name_or_path))
    return ids, jnp.ones(ids.shape, bool)


def _text(path):
    return path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else ""


def damages():
    """Return the kinds of damage, by name."""
    return {
        "JSON value": json_value,
        "JSON size": json_size,
        "JSON field": json_field,
        "JSON text": json_text,
        "bytes": change_bytes,
        "file": change_file,
        "header": change_header,
        "tensors": change_tensors,
        "index": change_index,
        "template": change_template,
    }


def damage(rng, base, directory, kind):
    """Damage a copy; return what was done."""
    return f"{base.name}: {kind}: {damages()[kind](rng, directory)}"[:300]


def _pick(rng, items):
    items = list(items)
    return items[int(rng.integers(len(items)))]


def _replace(path, content):
    path.unlink()  # a link to the original
    path.write_bytes(content)


def _json_files(directory):
    names = sorted(path for path in directory.glob("*.json"))
    # the model's and the adapter's config more often than others
    return names + 3 * [
        path for path in names if path.name in ("config.json", "adapter_config.json")
    ]


def _places(value, path=()):
    """Yield the paths of all values in a JSON value."""
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else ()
    entries = enumerate(value) if isinstance(value, list) else entries
    for key, entry in list(entries)[:40]:
        yield from _places(entry, (*path, key))


def _write_json(path, root, place, text):
    """Write a JSON value with the value at a place replaced by a text."""
    mark = "!a value to replace!"
    parent = root
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = mark
    _replace(path, json.dumps(root).replace(json.dumps(mark), text).encode())
    return f"{path.name} {'.'.join(map(str, place))} = {text[:60]}"


def json_value(rng, directory):
    """Replace a value by one of another type or size."""
    path = _pick(rng, _json_files(directory))
    root = json.loads(path.read_text())
    return _write_json(path, root, _pick(rng, _places(root)), _pick(rng, VALUES))


def json_size(rng, directory):
    """Change an integer."""
    path = _pick(rng, _json_files(directory))
    root = json.loads(path.read_text())
    places = [place for place in _places(root) if type(_at(root, place)) is int]
    if not places:
        return json_value(rng, directory)
    return _write_json(path, root, _pick(rng, places), _pick(rng, SIZES))


def _at(root, place):
    for key in place:
        root = root[key]
    return root


def json_field(rng, directory):
    """Remove a field, or rename, repeat or add one."""
    path = _pick(rng, _json_files(directory))
    root = json.loads(path.read_text())
    name, how = _pick(rng, root or ["a"]), _pick(rng, ("remove", "rename", "twice", "add"))
    if how == "twice":
        text = json.dumps(root)
        _replace(path, (text[:-1] + f', "{name}": {_pick(rng, VALUES)}' + "}").encode())
        return f"{path.name}: {name} twice"
    value = root.pop(name, None) if how in ("remove", "rename") else 1
    if how != "remove":
        root["z" * int(rng.choice([1, 100_000]))] = value
    _replace(path, json.dumps(root).encode())
    return f"{path.name}: {how} {name}"


def json_text(rng, directory):
    """Write a JSON file in another encoding, cut, empty, or of another value."""
    path = _pick(rng, _json_files(directory))
    text = path.read_text()
    contents = {
        "BOM": b"\xef\xbb\xbf" + text.encode(),
        "UTF-16": text.encode("utf-16"),
        "latin": b"\xff" + text.encode(),
        "cut": text[: int(rng.integers(len(text)))].encode(),
        "empty": b"",
        "twice": (text + text).encode(),
        "zeros": b"\0" * 100,
        "large": text.encode() + b" " * 20 * 2**20,
        **{value[:20]: value.encode() for value in VALUES},
    }
    how = _pick(rng, contents)
    _replace(path, contents[how])
    return f"{path.name}: {how}"


def change_bytes(rng, directory):
    """Flip, cut, zero or insert bytes of any file."""
    path = _pick(rng, (p for p in sorted(directory.iterdir()) if p.stat().st_size))
    content = bytearray(path.read_bytes())
    how = _pick(rng, ("flip", "cut", "zero", "insert", "start"))
    at, length = int(rng.integers(len(content))), int(rng.integers(1, 200))
    if how == "flip":
        for place in rng.integers(0, len(content), 5):
            content[place] ^= 1 << int(rng.integers(8))
    elif how == "cut":
        del content[at:]
    elif how == "zero":
        content[at : at + length] = bytes(len(content[at : at + length]))
    elif how == "insert":
        content[at:at] = rng.bytes(length)
    else:
        content[: min(8, len(content))] = rng.bytes(min(8, len(content)))
    _replace(path, bytes(content))
    return f"{path.name}: {how} at {at}"


def change_file(rng, directory):
    """Remove a file, or put a directory, a pipe, a broken link or another file in its place."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    path, how = _pick(rng, files), _pick(rng, ("remove", "folder", "pipe", "link", "loop", "swap"))
    other = _pick(rng, files)
    content = other.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how in ("link", "loop"):
        path.symlink_to("/dev/zero" if how == "link" else path.name)
    elif how == "swap":
        path.write_bytes(content)
    return f"{path.name}: {how} {other.name if how == 'swap' else ''}"


def _tensor_file(rng, directory):
    return _pick(rng, sorted(directory.glob("*.safetensors")))


def change_header(rng, directory):
    """Change the header of a safetensors file: its length, a name, a shape, offsets, a dtype."""
    path = _tensor_file(rng, directory)
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, tail = json.loads(content[8 : 8 + size]), content[8 + size :]
    how = _pick(rng, ("length", "shape", "zero", "offsets", "dtype", "name", "value", "many"))
    name = _pick(rng, [key for key in header if key != "__metadata__"])
    if how == "length":
        length = int(_pick(rng, (0, 1, size - 1, size + 8, 2**31, 2**62, 2**64 - 1)))
        _replace(path, struct.pack("<Q", length) + content[8:])
        return f"{path.name}: header of {length} bytes"
    if how == "shape":
        header[name]["shape"] = _pick(rng, ([], [2**40], [2**31, 2**31], [1, -1], ["a"], [0], None))
    elif how == "zero":
        header[name] |= {"shape": [2**60, 0], "data_offsets": [0, 0]}
    elif how == "offsets":
        header[name]["data_offsets"] = _pick(rng, ([0, 2**62], [8, 0], [-1, 4], [0], "a", [0, 0]))
    elif how == "dtype":
        header[name]["dtype"] = _pick(rng, DTYPES)
    elif how == "name":
        header[_pick(rng, ("", "a" * 100_000, "\0", "model.layers.99999999999.x"))] = header.pop(
            name
        )
    elif how == "value":
        header[name] = json.loads(_pick(rng, ("null", "[]", "{}", "3", '"x"', '{"dtype": "F32"}')))
    else:
        start = header[name]["data_offsets"][0]
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [start, start]}
        header = {**{f"extra.{i}": empty for i in range(20_000)}, **header}
    text = json.dumps(header).encode()
    _replace(path, struct.pack("<Q", len(text)) + text + tail)
    return f"{path.name}: {how} of {name}"


def change_tensors(rng, directory):
    """Write other tensors: not finite, missing, misshapen, renamed, of another dtype."""
    path = _tensor_file(rng, directory)
    tensors = load_file(path)
    name = _pick(rng, tensors)
    how = _pick(rng, ("NaN", "Infinity", "missing", "shape", "rename", "int", "extra", "empty"))
    array = tensors[name].copy()
    if how in ("NaN", "Infinity"):
        array.reshape(-1)[int(rng.integers(array.size))] = float(how)
    changed = {
        "shape": array.reshape(-1)[:-1],
        "int": array.astype(np.int32),
        "extra": array,
        "empty": array[:0],
    }
    tensors[name] = changed.get(how, array)
    if how in ("missing", "rename"):
        del tensors[name]
    if how in ("rename", "extra"):
        tensors[name.replace("0", "7") + "x"] = array
    path.unlink()
    save_file(tensors, path, {"format": "pt"})
    return f"{path.name}: {how} in {name}"


def change_index(rng, directory):
    """Write an index with wrong places, beside a single file or over shards."""
    path = directory / "model.safetensors.index.json"
    if not path.exists():
        return change_header(rng, directory)
    root = json.loads(path.read_text())
    wrong = ("../shards/model.safetensors", "/etc/passwd", "..", ".", "", "a" * 5000, "\0", 3, None)
    value = _pick(rng, (*wrong, ["a"], {"a": 1}, "config.json", "no.safetensors"))
    names = list(root["weight_map"])
    for name in names if rng.integers(2) else names[:1]:
        root["weight_map"][name] = value
    _replace(path, json.dumps(root).encode())
    return f"index: {str(value)[:40]}"


def change_template(rng, directory):
    """Write another chat template."""
    texts = ("{% for", "{{ 1/0 }}", "{{ a.b.c }}", "{{ messages }}", "{% include 'x' %}", "\0", "")
    texts += ("{% for i in range(10**9) %}x{% endfor %}", "{{ 'x' * 10**10 }}")
    text = _pick(rng, texts)
    _replace(directory / "chat_template.jinja", text.encode())
    return f"template {text!r}"
