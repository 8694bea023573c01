"""Exports replace nothing but earlier exports: a user's files stay, whatever directory is named."""

import json
import os
import shutil

import jax
import pytest
from safetensors.numpy import load_file, save_file

import ntkrl
from ntkrl import durable_files, models
from ntkrl.models import hf_export
from tests.models.families import CASES


@pytest.fixture(scope="module")
def model():
    """A tiny policy with its params."""
    return ntkrl.build("LlamaForCausalLM", CASES["llama"][2], jax.random.key(0))


def contents(directory):
    """Return every file below a directory with its bytes, links as what they point to."""
    return {
        str(path.relative_to(directory)): os.readlink(path) if path.is_symlink() else content(path)
        for path in sorted(directory.rglob("*"))
    }


def content(path):
    """Return a file's bytes; None for a directory."""
    return path.read_bytes() if path.is_file() else None


def refuses(place, out, model, *parts):
    """An export raises one ValueError with the parts, and changes nothing in `place`."""
    before = contents(place)
    with pytest.raises(ValueError) as caught:
        ntkrl.export(out, *model)
    for part in ("export: ", str(out), *parts):
        assert part in str(caught.value), str(caught.value)
    assert contents(place) == before


def test_new_empty_and_earlier_directories(tmp_path, model):
    """law: written, and written again with other params, in one exchange; no other name appears."""
    (tmp_path / "b").mkdir()
    for name in ("a/new", "b", "b", "a/new"):
        ntkrl.export(tmp_path / name, *model)
        assert set(load_file(tmp_path / name / "model.safetensors")) > {"lm_head.weight"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    policy, params = ntkrl.load(tmp_path / "b")
    ntkrl.export(tmp_path / "a" / "new", policy, params)  # of another source, in place


def test_neighbours_are_not_touched(tmp_path, model):
    """by hand: OUT.old and OUT.partial, which an export used to remove."""
    for name in ("out.old", "out.partial", ".out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("years")
    before = contents(tmp_path)
    for _ in range(2):
        ntkrl.export(tmp_path / "out", *model)
    after = contents(tmp_path)
    assert {name: value for name, value in after.items() if not name.startswith("out/")} == {
        **before,
        "out": None,
    }


def user_file(out, model):
    (out / "notes").mkdir()
    (out / "notes" / "thesis.tex").write_text("years")
    return "notes/thesis.tex"


def edited_card(out, model):
    (out / "README.md").write_text("my own card")
    return "README.md"


def edited_config(out, model):
    path = out / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mine": 1}))
    return "config.json"


def link(out, model):
    shutil.copy(out / "config.json", out.parent / "elsewhere")
    (out / "config.json").unlink()
    (out / "config.json").symlink_to(out.parent / "elsewhere")
    return "config.json"


def trained_further(out, model):
    tensors = load_file(out / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return "model.safetensors"


def without_manifest(out, model):
    (out / hf_export.MANIFEST).unlink()
    return "model.safetensors"


def damaged_manifest(out, model):
    (out / hf_export.MANIFEST).write_text("[]")
    return f"{hf_export.MANIFEST}, README.md, config.json, model.safetensors"


def broken(out, model):
    (out / "model.safetensors").write_bytes(b"x")
    return "model.safetensors"


def empty_folder(out, model):
    (out / "figures").mkdir()
    return "figures"


@pytest.mark.parametrize(
    "change",
    [
        *(user_file, edited_card, edited_config, link),
        *(trained_further, without_manifest, damaged_manifest, broken, empty_folder),
    ],
)
def test_files_that_no_export_wrote(tmp_path, model, change):
    """law: an earlier export with one more file, or one that was changed, is left as it is."""
    out = tmp_path / "out"
    ntkrl.export(out, *model)
    refuses(tmp_path, out, model, change(out, model))


def test_directories_of_others(tmp_path, model):
    """by hand: a run directory, the home of many files, a file, a link, a model of transformers."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    refuses(tmp_path, run, model, "config.json")
    for number in range(30):
        (tmp_path / "many" / str(number)).mkdir(parents=True)
    refuses(tmp_path, tmp_path / "many", model, ", …")
    refuses(tmp_path, run / "config.json", model, "is not a directory")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    refuses(tmp_path, tmp_path / "link", model, "is a symbolic link")
    (tmp_path / "empty").mkdir()
    refuses(tmp_path, tmp_path / "link", model, "is a symbolic link")


def test_inside_the_base(tmp_path, model):
    """law: a new directory inside the base changes nothing else there."""
    ntkrl.export(tmp_path / "base", *model)
    before = contents(tmp_path)
    ntkrl.export(tmp_path / "base" / "runs" / "export", *ntkrl.load(tmp_path / "base"))
    after = contents(tmp_path)
    assert before.items() <= after.items() and len(after) > len(before)


@pytest.mark.parametrize("place", [".", "..", "../base"])
def test_the_base_itself(tmp_path, model, place):
    """law: an export to or around the directory that it was read from."""
    ntkrl.export(tmp_path / "x" / "base", *model)
    base = ntkrl.load(tmp_path / "x" / "base")
    out = tmp_path / "x" / "base" / place
    refuses(tmp_path, out, base, "which the model was read from")


def test_failed_exports_leave_the_former(tmp_path, model, monkeypatch):
    """law: an error while writing leaves the earlier export and no other file."""
    ntkrl.export(tmp_path / "out", *model)
    before = contents(tmp_path)
    monkeypatch.setattr(hf_export, "save_file", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        ntkrl.export(tmp_path / "out", *model)
    assert contents(tmp_path) == before


def test_exports_are_on_the_disk_before_they_are_named(tmp_path, model, monkeypatch):
    """law: files and directory are synced, then exchanged, then the parent is synced."""
    events = []
    monkeypatch.setattr(
        durable_files, "sync_tree", lambda path: events.append(("sync", sorted(contents(path))))
    )
    monkeypatch.setattr(
        durable_files, "sync_directory", lambda path: events.append(("name", path.name))
    )
    ntkrl.export(tmp_path / "out", *model)
    assert events[-2:] == [
        ("sync", [hf_export.MANIFEST, "README.md", "config.json", "model.safetensors"]),
        ("name", tmp_path.name),
    ]


def test_all_files_are_listed(tmp_path, model):
    """by hand: all files of an export in shards are listed; the index is checked, too."""
    policy, params = model
    tensors = models.stored_tensors(policy, params)
    options = ({"a": 1}, tensors, hf_export.Companions(card="x"), 4000)
    hf_export.write_model(tmp_path / "out", *options)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    names = {path.name for path in (tmp_path / "out").iterdir()}
    manifest = json.loads((tmp_path / "out" / hf_export.MANIFEST).read_text())
    assert {*manifest, hf_export.MANIFEST} == names
    hf_export.write_model(tmp_path / "out", *options)
    (tmp_path / "out" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="model.safetensors.index.json; move them"):
        hf_export.write_model(tmp_path / "out", *options)


def test_adapters_and_reward_models(tmp_path, model):
    """law: every writer of a model directory is guarded."""
    ntkrl.export(tmp_path / "base", *model)
    options = models.ModelOptions(lora=models.Lora(rank=2))
    policy, params = ntkrl.load(tmp_path / "base", options=options)
    out = tmp_path / "out"
    for _ in range(2):
        models.export_adapter(out, policy, params)
    (out / "mine").write_text("x")
    with pytest.raises(ValueError, match="holds files that no export wrote.*: mine;"):
        models.export_adapter(out, policy, params)
    head = models.NewHead(pad_id=0)
    scorer, params = models.load_scorer(tmp_path / "base", new=head)
    with pytest.raises(ValueError, match="holds files that no export wrote.*: mine;"):
        models.export_scorer(out, scorer, params, None)
    raw = {**CASES["llama"][2], "architectures": ["LlamaForSequenceClassification"]}
    raw |= {"num_labels": 1, "pad_token_id": 0}
    with pytest.raises(ValueError, match="holds files that no export wrote.*: mine;"):
        models.write_new_scorer(out, raw, jax.random.key(0), tmp_path / "base")


def test_pipes_beside_a_base_are_not_copied(tmp_path, model):
    """by hand: a pipe named LICENSE stopped the export at its end."""
    ntkrl.export(tmp_path / "base", *model)
    os.mkfifo(tmp_path / "base" / "LICENSE")
    (tmp_path / "base" / "NOTICE").mkdir()
    (tmp_path / "base" / "README.md").unlink()
    os.mkfifo(tmp_path / "base" / "README.md")
    ntkrl.export(tmp_path / "out", *ntkrl.load(tmp_path / "base"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", hf_export.MANIFEST}
