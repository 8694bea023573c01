"""Tests of reading run directories."""

import json

import numpy as np
import pytest

from ntkrl.report import read_run
from ntkrl.report.runs import ordered, read_runs, series, stage_ends


def _bare(path, metrics=b"", config=None):
    path.mkdir()
    config = {"name": "rl", "seed": 0} if config is None else config
    (path / "config.json").write_text(json.dumps(config))
    (path / "metrics.jsonl").write_bytes(metrics)
    return path


def test_complete_run(run_paths):
    """Golden: a complete run has no notes and all its arrays."""
    run = read_run(run_paths[3])
    assert (run.name, run.seed, run.finished, run.notes) == ("cfrl", 1, True, ())
    assert sorted(run.probes) == [5, 10]
    assert run.probes[5]["actual"].shape == (50,)
    assert len(run.metrics) == 21 and len(run.timings) == 20


def test_series_by_hand(tmp_path):
    """By hand: steps rise, absent steps stay absent, null is NaN, the last writing counts."""
    lines = b'{"step":4,"kl":4}\n{"step":0,"kl":0}\n{"step":1}\n{"step":2,"kl":null}\n'
    run = read_run(_bare(tmp_path / "run", lines + b'{"step":4,"kl":5}\n'))
    steps, values = series(run, "kl")
    np.testing.assert_array_equal(steps, [0, 2, 4])
    np.testing.assert_array_equal(values, [0.0, np.nan, 5.0])
    assert series(run, "reward")[0].size == 0
    for name in ("rewrad", "stage"):
        with pytest.raises(ValueError, match=name):
            series(run, name)


def test_cut_line_is_noted(run_paths):
    """By hand: a cut last line is left out and named; a broken line inside has its number."""
    path = run_paths[0] / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "rubbish", *lines[1:], '{"step": 21, "rew']))
    (run_paths[0] / "finished").unlink()
    run = read_run(run_paths[0])
    assert len(run.metrics) == 21
    assert run.notes == (
        "not finished: still running or stopped; last step seen is 20",
        "line 2 of metrics.jsonl cannot be read and was left out",
        "the last line of metrics.jsonl is cut short and was left out",
    )


def test_missing_parts_are_noted(tmp_path):
    """By hand: a run that has just begun is read, and all that it lacks is named."""
    path = _bare(tmp_path / "run")
    (path / "metrics.jsonl").unlink()
    assert read_run(path).notes == (
        "not finished: still running or stopped; last step seen is 0",
        "no metrics.jsonl",
        "no held-out evaluation (eval/reward)",
        "no predicted changes (predict/…)",
        "no timings.jsonl",
        "no probe files (probes/step_*.npz)",
    )


def test_not_finite_is_noted(tmp_path):
    """By hand: null and a bare NaN are both counted."""
    run = read_run(_bare(tmp_path / "run", b'{"step":1,"kl":null}\n{"step":2,"kl":NaN}\n'))
    assert "kl is not finite at 2 steps" in run.notes


def test_bad_probe_files_are_noted(run_paths):
    """By hand: cut, incomplete and pickled probe files are left out by name, the rest is read."""
    probes = run_paths[0] / "probes"
    (probes / "step_000006.npz").write_bytes((probes / "step_000005.npz").read_bytes()[:100])
    np.savez(probes / "step_000007.npz", actual=np.zeros(2), predicted_head=np.zeros(2))
    three = {"actual": np.zeros(2), "predicted_head": np.zeros(2)}
    np.savez(probes / "step_000008.npz", predicted_body=np.zeros(3), **three)
    pickled = np.array([print, None], dtype=object)
    np.savez(probes / "step_000009.npz", predicted_body=pickled, **three)
    run = read_run(run_paths[0])
    assert sorted(run.probes) == [5, 10]
    assert run.notes == (
        "probes/step_000006.npz cannot be read and was left out",
        "probes/step_000007.npz has no predicted_body and was left out",
        "probes/step_000008.npz has arrays of shapes [(2,), (3,)] and was left out",
        "probes/step_000009.npz cannot be read and was left out",
    )


def test_no_run_directory(tmp_path):
    """Law: a path that is not a run directory is refused, with the expected files."""
    (tmp_path / "empty").mkdir()
    for name, text in (("absent", "is not a directory"), ("empty", "no config.json")):
        with pytest.raises(ValueError, match=f"{text}.*expected a directory with config.json"):
            read_run(tmp_path / name)
    with pytest.raises(ValueError, match="has no seed; expected"):
        read_run(_bare(tmp_path / "noseed", config={"name": "rl"}))
    (tmp_path / "noseed" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_run(tmp_path / "noseed")


def test_read_runs(run_paths):
    """Law: order does not depend on the arguments; none and twice the same are refused."""
    # A directory that sorts before the others, so that seeds and not paths decide.
    moved = run_paths[1].rename(run_paths[1].with_name("a"))
    run_paths = [run_paths[0], moved, *run_paths[2:]]
    runs = read_runs(run_paths[::-1])
    assert [(run.name, run.seed) for run in runs] == [
        ("cfrl", 0),
        ("cfrl", 1),
        ("rl", 0),
        ("rl", 1),
    ]
    assert ordered(runs[::-1]) == runs
    with pytest.raises(ValueError, match="at least one"):
        read_runs([])
    with pytest.raises(ValueError, match="more than once"):
        read_runs([run_paths[0], str(run_paths[0]) + "/."])


def test_stage_ends(tmp_path, run_paths):
    """By hand: ends come from the metrics, else from the config; the last stage has none."""
    assert stage_ends(read_run(run_paths[0])) == ()
    assert stage_ends(read_run(run_paths[2])) == (("classifier", 8),)
    stages = [{"name": "a", "steps": 3}, {"name": "b", "steps": 4}, {"name": "c", "steps": 5}]
    config = {"name": "x", "seed": 0, "stages": stages}
    run = read_run(_bare(tmp_path / "run", b'{"step":1}\n', config))
    assert stage_ends(run) == (("a", 3), ("b", 7))
    stages[1]["steps"] = None  # set in epochs
    run = read_run(_bare(tmp_path / "epochs", b'{"step":1}\n', config))
    assert stage_ends(run) == (("a", 3),)
