"""Configs of run directories: how they differ, and with which differences a run goes on."""

import json
import os
import re

import pytest

from ntkrl import run_lock, runtime
from ntkrl.runtime.config import differences


def config(*lengths, schedule="constant", **more):
    """Return a config of stages of some lengths, as JSON values."""
    stages = [
        {"name": f"s{i}", "steps": steps, "epochs": None, "schedule": schedule}
        for i, steps in enumerate(lengths)
    ]
    return {"seed": 0, "stages": stages, **more}


def test_differences_name_the_field():
    """by hand: an entry of a row of a list, not the list; the number of rows where it differs."""
    old = {"stages": [{"steps": 40, "parameters": [[".*", 1e-6]]}], "stop": ["a"]}
    new = {"stages": [{"steps": 60, "parameters": [[".*", 1e-5]]}], "stop": ["a", "b"]}
    assert differences(old, new) == [
        "stages[0].parameters[0][1]: 1e-06 -> 1e-05",
        "stages[0].steps: 40 -> 60",
        "stop: ['a'] -> ['a', 'b']",
    ]
    longer = {**old, "stages": [*old["stages"], {"steps": 5}]}
    assert differences(old, longer) == ["stages: 1 -> 2 entries"]


def test_a_run_may_become_longer():
    """by hand: more steps are allowed, with what they mean for the schedule."""
    assert runtime.config_changes(config(40, 60), config(40, 80), "run") == [
        "stages[1].steps: 60 -> 80 (the run goes on)"
    ]
    (change,) = runtime.config_changes(
        config(40, schedule="cosine"), config(50, schedule="cosine"), "run"
    )
    assert "its cosine schedule over the new length" in change


@pytest.mark.parametrize(
    ("changed", "ended", "message"),
    [
        (config(40, 50), 0, r"stages\[1\].steps: 60 -> 50 .*never for fewer"),
        (config(45, 60), 1, r"stages\[0\].steps: 40 -> 45 .*has ended; lengthen the last stage"),
        (config(40, None), 0, r"stages\[1\].steps: 60 -> None"),
    ],
)
def test_lengths_that_are_refused(changed, ended, message):
    """by hand: fewer steps, more of a stage that has ended, none instead of a number."""
    _, refused = runtime.stage_lengths(config(40, 60), changed, ended)
    assert len(refused) == 1
    assert re.match(message, refused[0])


@pytest.fixture
def begun(tmp_path):
    """Return a directory in which a run has measured its start, and trained nothing."""
    (tmp_path / "config.json").write_text(json.dumps(config(40)))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/reward": 1.0}\n')
    (tmp_path / "starts.jsonl").write_text("{}\n")
    (tmp_path / "probes").mkdir()
    (tmp_path / "probes" / "set.npz").write_bytes(b"of another model")
    (tmp_path / "notes.txt").write_text("a user's")
    return tmp_path


def test_a_run_that_trained_nothing_claims_nothing(begun, capsys):
    """by hand: files of a start go, a user's stay; the same config and a longer one keep them."""
    for same in (config(40), config(50)):
        runtime.clear_untrained(begun, same)
        assert (begun / "probes" / "set.npz").exists()
    runtime.clear_untrained(begun, config(40, seed=1))
    assert [path.name for path in begun.iterdir()] == ["notes.txt"]
    assert "nothing was trained: beginning anew" in capsys.readouterr().out
    assert runtime.check_run_dir(begun, config(40, seed=1)) is None


@pytest.mark.parametrize("what", ["step", "checkpoint", "export", "torn"])
def test_a_run_that_trained_claims_its_directory(begun, what):
    """by hand: a step's metrics, a checkpoint or an export are kept; another config is refused."""
    if what == "step":
        with (begun / "metrics.jsonl").open("a") as file:
            file.write('{"step": 1}\n')
    elif what == "torn":
        (begun / "metrics.jsonl").write_text('{"step": 0}\n{"st')
    else:
        (begun / {"checkpoint": "checkpoints/20", "export": "export"}[what]).mkdir(parents=True)
    runtime.clear_untrained(begun, config(40, seed=1))
    with pytest.raises(ValueError, match="begun with another config: seed: 0 -> 1"):
        runtime.check_run_dir(begun, config(40, seed=1))


def test_a_tokenizer_of_a_run_that_did_not_begin_is_removed(tmp_path):
    """by hand: what was written before config.json goes if the block fails; the rest stays."""
    (tmp_path / "kept").mkdir()
    with pytest.raises(KeyError), runtime.unclaimed(tmp_path):
        (tmp_path / "tokenizer").mkdir()
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(KeyError), runtime.unclaimed(tmp_path):
        raise KeyError
    assert (tmp_path / "tokenizer").exists()


def test_places_that_cannot_be_a_directory(tmp_path):
    """by hand: a file, a path below a file, a file system that takes none; each by its name."""
    file = tmp_path / "notes.txt"
    file.write_text("x")
    for place in (file, file / "runs" / "rl"):
        with pytest.raises(ValueError, match=r"since .*notes.txt is a file; give a directory"):
            run_lock.DirectoryLock(place, "train").__enter__()
    if os.path.isdir("/proc"):
        with pytest.raises(ValueError, match=r"/proc/runs/rl cannot be written \(.*run_dir"):
            run_lock.DirectoryLock("/proc/runs/rl", "train").__enter__()
    assert file.read_text() == "x"
