"""Run directories and models' directories where the other is meant."""

import json
import re

import pytest

from ntkrl import data, models, report, runtime
from ntkrl.evaluation import commands

RUN = {"name": "rl", "seed": 0, "run_dir": "runs/rl", "stages": []}


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Work beside a directory each: of a model, of a run with an export, of other files."""
    monkeypatch.chdir(tmp_path)
    model, run = tmp_path / "base", tmp_path / "done"
    model.mkdir()
    (run / "export").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    for place in (model, run / "export"):
        (place / "config.json").write_text(json.dumps({"model_type": "gpt_neox"}))
    (run / "config.json").write_text(json.dumps(RUN))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("done", "done is a run directory of `ntkrl train`, not a model; its model is done/export"),
        ("done/checkpoints", "done/checkpoints is in the run directory done .*is done/export"),
        ("bsae", "'bsae' is not a directory; did you mean 'base'\\? Give a Hugging Face model"),
        ("no", "'no' is not a directory; give a Hugging Face"),
        ("rows.jsonl", "'rows.jsonl' is a file; give a Hugging Face model directory"),
    ],
)
def test_what_is_no_model(places, path, message):
    """by hand: a run names its export, a wrong name the nearest model, not architectures."""
    for read in (models.load, models.load_scorer, models.tokenizer_directory):
        with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
            read(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("base", "base is a Hugging Face directory, not a run directory"),
        ("dnoe", "did you mean 'done'"),
        ("rows.jsonl", "rows.jsonl is a file, not a"),
    ],
)
def test_what_is_no_run(places, path, message):
    """by hand: a model's directory is called that, a wrong name gets the nearest run's."""
    for read in (commands.config_of, report.read_run):
        with pytest.raises(ValueError, match=message):
            read(path)


def test_a_run_beside_others_is_named(places):
    """by hand: the parent of run directories names them."""
    with pytest.raises(ValueError, match="no config.json; it holds the runs done"):
        commands.config_of(".")


@pytest.mark.parametrize("values", [{"model_type": "gpt_neox"}, {"theme": "dark"}])
def test_a_run_never_replaces_the_config_of_something_else(places, values):
    """law: config.json and checkpoints of a model or of another program keep their bytes."""
    place = places / "base"
    (place / "config.json").write_text(json.dumps(values))
    (place / "checkpoints").mkdir()
    (place / "checkpoints" / "weights").write_text("x")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    runtime.clear_untrained(place, RUN)  # removed both, as files of a run that trained nothing
    with pytest.raises(ValueError, match=r"a run would replace its config.json; set another"):
        runtime.check_run_dir(place, RUN)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("path", "kind"), [("base", "Hugging Face model"), ("done", "run")], ids=["model", "run"]
)
def test_directories_that_are_no_prompts(places, path, kind):
    """by hand: their JSON files are no splits, as base/config would be."""
    with pytest.raises(ValueError, match=re.compile(f"{path} is a {kind} directory.*not prompts")):
        data.read_set(path)
