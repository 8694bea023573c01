"""Paths that a user gives: files that this program has not written are refused, not replaced."""

import json
import types

import numpy as np
import pytest

from ntkrl.data import save_tokenizer
from ntkrl.main import main
from ntkrl.runtime.rundir import TRAINING_FILES
from ntkrl.setup.starting_model import load_tokenizer
from ntkrl.study.jobs import Job, run_jobs
from tests.report.conftest import write_run
from tests.training.test_train import ROOT

SFT = ["--config=configs/sft.py"]
EVALUATE = ["evaluate", "--config=configs/rl.py", "--config.eval.name=mine"]
EVALUATE += ["--config.model.path=none", "--config.reward.function=exact_match"]
PREPARE = ["prepare", "--config=configs/paper/miniature.py:data"]
PLAN = ["plan", *SFT, "--topology=cpu:8"]
METRICS = json.dumps({"accuracy": 0.5})
"""A user's own numbers."""

# file or directory that exists, its content, and the command; {} is the directory of the file
CASES = {
    **{f"train, {name}": (name, "x", ["train", *SFT]) for name in TRAINING_FILES},
    "train, a tokenizer": ("tokenizer/tokenizer.json", "mine", ["train", *SFT]),
    "train, a folder": ("checkpoints/3/mine.txt", "x", ["train", *SFT]),
    "prepare, rows": ("test.jsonl", '{"mine": 1}\n', PREPARE),
    "prepare, scores": ("scores/preferences.jsonl", "x", PREPARE),
    "evaluate, metrics": ("evaluations/mine.json", METRICS, EVALUATE),
    "evaluate, a list": ("evaluations/mine.json", "[1, 2]", EVALUATE),
    "evaluate, samples": ("evaluations/mine.jsonl", METRICS + "\n", EVALUATE),
    "evaluate, rewards": ("evaluations/mine.rewards.json", METRICS, EVALUATE),
    "evaluate, a folder": ("evaluations/mine.json/x", "x", EVALUATE),
    "kernel, arrays": ("kernel.npz", "x", ["kernel", "none", "--prompts=none", "--out={}"]),
    "kernel, a figure": ("kernel.png", "x", ["kernel", "none", "--prompts=none", "--out={}"]),
    "plan, notes": ("rows.json", "notes", [*PLAN, "--json={}/rows.json"]),
    "plan, JSON": ("rows.json", METRICS, [*PLAN, "--json={}/rows.json"]),
    "plan, a table": ("plan.md", "# My plan\n", ["plan", *SFT, "--table={}/plan.md"]),
    "report, a page": ("index.html", "<html>mine</html>", ["report", "{run}", "--out={}"]),
    "report, a figure": ("reward.png", "mine", ["report", "{run}", "--out={}"]),
}


def contents(directory):
    """Return the content of every file below a directory."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_users_file_is_not_replaced(case, tmp_path, monkeypatch, capsys):
    """law: status 2, a sentence that names it, and every file as it was."""
    monkeypatch.chdir(ROOT)
    name, content, command = case
    place, run = tmp_path / "place", tmp_path / "run"
    write_run(run, "rl", 0)
    path = place / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    before = contents(tmp_path)
    arguments = [word.replace("{}", str(place)).replace("{run}", str(run)) for word in command]
    if command[0] in ("train", "prepare", "evaluate"):
        arguments.append(f"--config.run_dir={place}")
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert str(place) in message and name.partition("/")[0] in message, message
    assert "not replaced; move it" in message or "would be replaced; move them" in message
    assert contents(tmp_path) == before


def test_a_run_keeps_its_tokenizer(tmp_path):
    """law: another template, which the comparison of configs refuses later, changes no file."""
    save_tokenizer(tmp_path / "model")
    model = types.SimpleNamespace(path=str(tmp_path / "model"), template="pythia")
    settings = types.SimpleNamespace(model=model)
    run = tmp_path / "run"
    load_tokenizer(settings, run)
    (run / "config.json").write_text("{}")
    (tmp_path / "other.jinja").write_text("{{ messages[0].content }}")
    before = contents(run)
    model.template = str(tmp_path / "other.jinja")
    load_tokenizer(settings, run)
    assert contents(run) == before
    (run / "config.json").unlink()
    with pytest.raises(ValueError, match="would be replaced; move them"):
        load_tokenizer(settings, run)
    assert contents(run).items() <= before.items()


def test_an_earlier_kernel_and_plan_may_be_replaced(tmp_path, monkeypatch, capsys):
    """law: results of an earlier command pass the check: what stops these is the missing model."""
    monkeypatch.chdir(ROOT)
    np.savez(tmp_path / "kernel.npz", tokens=0, rows=0, positions=0)
    (tmp_path / "kernel.png").touch()
    assert main(["kernel", "none", "--prompts=none", f"--out={tmp_path}"]) == 2
    (tmp_path / "rows.json").write_text('[{"topology": "cpu:8", "programs": []}]')
    words = ["--config=configs/rl.py", "--config.model.path=none", "--topology=cpu:8"]
    assert main(["plan", *words, f"--json={tmp_path / 'rows.json'}"]) == 2
    assert "not replaced" not in capsys.readouterr().err


def test_logs_of_others_are_not_replaced(tmp_path):
    """law: a directory with logs in which no study has run is not a study's."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="mine.txt exists, but no study has run in"):
        run_jobs("runs", [Job("mine", ("help",), tmp_path / "never")], 1, tmp_path)
    assert (tmp_path / "logs" / "mine.txt").read_text() == "x"
