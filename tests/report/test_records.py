"""Tests of reading step ledgers and probe sets, and of runs that were probed differently."""

import json
import shutil

import numpy as np
import pytest

from ntkrl.report import FIGURES, read_run
from ntkrl.report.ledger_figures import influence_map, part_means
from ntkrl.report.runs import comparable
from tests.report.conftest import SAMPLES, SIZE, ledger_arrays, write_ledger, write_probe_set

(entropy_waterfall,) = [spec for spec in FIGURES if spec.stem == "ledger_entropy"]


def test_ledger_by_hand(run_paths):
    """By hand: parts are the files' columns by role, summed over samples, and add up."""
    run = read_run(run_paths[0])
    assert sorted(run.ledgers) == [5, 10] and run.notes == ()
    ledger, arrays = run.ledgers[10], ledger_arrays(10)
    names = ["policy R", "policy G", "kl R", "kl G", "momentum", "decay", "optimizer", "curvature"]
    assert list(ledger.parts["entropy"]) == names
    for measure in ("log_prob", "entropy"):
        parts = ledger.parts[measure]
        body = arrays[f"{measure}/policy/body"].sum(axis=1)
        np.testing.assert_allclose(parts["policy G"], body, rtol=1e-5, atol=1e-9)
        both = arrays[f"{measure}/momentum/head"] + arrays[f"{measure}/momentum/body"]
        np.testing.assert_allclose(parts["momentum"], both, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(sum(parts.values()), ledger.actual[measure], atol=1e-6)
    terms = sum(arrays[f"log_prob/{t}/{g}"] for t in ("policy", "kl") for g in ("head", "body"))
    np.testing.assert_allclose(ledger.influence, terms, atol=1e-7)
    assert ledger.influence.shape == (SIZE, SAMPLES)
    assert [sample.advantage for sample in ledger.samples] == [-1.5, -0.5, 0.5, 1.5]


def test_texts_by_hand(run_paths):
    """By hand: sums over the tokens of a completion, for vectors and matrices."""
    texts = read_run(run_paths[0]).texts
    assert (texts.size, texts.completions[3].prompt) == (SIZE, "say <hi>")
    assert texts.completions[4].family == "shuffled"
    values = np.arange(float(SIZE))
    np.testing.assert_allclose(texts.sums(values), [45, 145, 245, 345, 445])
    np.testing.assert_allclose(texts.sums(values[:, None] * [1, 2])[1], [145, 290])


def test_group_ledgers_have_no_influence(run_paths):
    """By hand: without samples apart there are parts and no influence."""
    write_ledger(run_paths[0], 15, 0, by="group")
    run = read_run(run_paths[0])
    assert run.ledgers[15].influence is None and run.notes == ()
    assert "policy G" in run.ledgers[15].parts["log_prob"]


def test_bad_ledgers_are_named(run_paths):
    """By hand: every defect of a ledger is reported, and the others are read."""
    path = run_paths[0]
    write_ledger(path, 21, 0).with_suffix(".json").unlink()
    write_ledger(path, 22, 0).unlink()
    cut = write_ledger(path, 23, 0)
    cut.write_bytes(cut.read_bytes()[:200])
    write_ledger(path, 24, 0, digest="other")
    write_ledger(path, 25, 0, format=2)
    write_ledger(path, 26, 0, samples=[{}])
    write_ledger(path, 27, 0, by="group").with_suffix(".json").write_text('{"form')
    write_ledger(path, 28, 0, samples=[])
    arrays = ledger_arrays(0)
    np.savez(write_ledger(path, 29, 0), **arrays | {"log_prob/decay/head": np.ones(SIZE)})
    del arrays["entropy/actual"]
    np.savez(write_ledger(path, 30, 0), **arrays)
    run = read_run(path)
    assert sorted(run.ledgers) == [5, 10]
    assert run.notes == (
        "ledger/step_000021.npz has no .json beside it and was left out",
        "ledger/step_000023.npz cannot be read and was left out",
        "ledger/step_000024.npz is of probe set other, the run has d1ge57; refused",
        "ledger/step_000025.json has format 2, not 1, and was left out",
        "ledger/step_000026.json lacks what a ledger has and was left out",
        "ledger/step_000027.json cannot be read and was left out",
        "ledger/step_000028.npz has log_prob/policy/head of shape (50, 4), for 50 tokens and 0 "
        "samples and was left out",
        "ledger/step_000029.npz has log_prob parts that do not add up to the change; left out",
        "ledger/step_000030.npz has no entropy/actual and was left out",
        "ledger/step_000022.json has no .npz beside it and was left out",
    )


def test_bad_sets_are_named(run_paths):
    """By hand: a bad set is reported; its ledgers are refused, since nothing names their tokens."""
    path = run_paths[0] / "probes" / "set.json"
    stored = json.loads(path.read_text())
    words = {
        '{"format": 1': "cannot be read and was left out",
        "[]": "has format None, not 1, and was left out",
        json.dumps(stored | {"format": 3}): "has format 3, not 1, and was left out",
        json.dumps(stored | {"prompts": []}): "lacks what a probe set has and was left out",
    }
    for text, note in words.items():
        path.write_text(text)
        run = read_run(run_paths[0])
        assert run.texts is None and run.ledgers == {} and sorted(run.probes) == [5, 10]
        assert run.notes[0] == f"probes/set.json {note}"
        assert run.notes[1].endswith("is of probe set d1ge57, the run has None; refused")
    del stored["completions"][0]
    path.write_text(json.dumps(stored))
    note = "probes/step_000005.npz has 50 probe tokens where set.json names 40 and was left out"
    assert read_run(run_paths[0]).notes[0] == note


def test_evaluations(run_paths):
    """By hand: metrics are read, rewards are none, and a cut file is named."""
    directory = run_paths[0] / "evaluations"
    (directory / "best.rewards.json").write_text("{}")
    (directory / "cut.json").write_text('{"eval/rew')
    (directory / "odd.json").write_text('{"eval/reward": null}')
    run = read_run(run_paths[0])
    assert run.evaluations["best"] == {"eval/reward": 0.5, "diversity/pass@2": 1.0}
    assert sorted(run.evaluations) == ["best", "odd"]
    assert run.notes == ("evaluations/cut.json cannot be read and was left out",)


def test_different_probe_sets_are_refused(run_paths):
    """By hand: runs of two sets keep their rewards and lose metrics of the sets, by name."""
    runs = [read_run(path) for path in run_paths]
    assert comparable(runs) == (tuple(runs), "")
    write_probe_set(run_paths[0], "an0ther")
    runs = [read_run(path) for path in run_paths]
    result, refusal = comparable(runs)
    assert "cfrl-0, cfrl-1, rl-1: set d1ge57; rl-0: set an0ther" in refusal
    for run in result:
        assert not run.probes and not run.ledgers
        names = {name for line in run.metrics for name in line}
        assert "eval/reward" in names and "entropy" in names
        assert not any(name.startswith(("probe/", "predict/", "ledger/")) for name in names)
    assert runs[1].probes and "probe/entropy" in runs[1].metrics[0]


def test_waterfall_by_hand(run_paths):
    """By hand: bars are means over tokens and seeds, end to end, and reach the actual change."""
    runs = [read_run(path) for path in run_paths[:2]]
    values = part_means([run.ledgers[10] for run in runs], "entropy")
    arrays = [ledger_arrays(10), ledger_arrays(11)]
    curvature = np.mean([ledger["entropy/curvature"] for ledger in arrays])
    assert values["curvature"] == pytest.approx(curvature, rel=1e-4)
    (axis,) = entropy_waterfall.draw(runs).axes
    assert axis.get_title(loc="left") == "rl, step 10, mean of 2 runs"
    bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axis.patches]
    for (_, end), (start, _) in zip(bars[:-1], bars[1:-1], strict=False):
        assert start == pytest.approx(end)
    assert bars[-1] == pytest.approx(
        (0.0, np.mean([ledger["entropy/actual"] for ledger in arrays]))
    )
    assert bars[-2][1] == pytest.approx(bars[-1][1], abs=1e-6)


def test_influence_map_by_hand(run_paths):
    """By hand: rows fall by advantage, the least influential is left out, tokens are summed."""
    run = read_run(run_paths[0])
    ledger = run.ledgers[10]
    ledger.influence[:, 2] = 0.0
    ledger.influence[:, 1] = 0.25
    rows, values = influence_map(ledger, 3)
    assert rows == [3, 1, 0]
    np.testing.assert_allclose(values[1], [2.5] * 5)
    np.testing.assert_allclose(values[0][1], ledger.influence[10:20, 3].sum())


def test_older_runs_have_none_of_it(run_paths):
    """By hand: a run without set, ledgers, evaluations and cosines is complete all the same."""
    path = run_paths[0]
    (path / "probes" / "set.json").unlink()
    for name in ("ledger", "evaluations"):
        shutil.rmtree(path / name)
    run = read_run(path)
    assert run.notes == () and run.texts is None and sorted(run.probes) == [5, 10]
    assert run.ledgers == {} and run.evaluations == {}
    assert entropy_waterfall.draw([run]) is None
