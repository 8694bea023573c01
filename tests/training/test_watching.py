"""Probes and ledgers of complete runs: their files, and errors."""

import json

import numpy as np
import pytest

from ntkrl.main import main
from ntkrl.probe import FAMILIES
from ntkrl.report import is_known
from ntkrl.types import UpdateBatch
from ntkrl.update import kl_shares
from tests.training.test_train import STAGES, base, lines, one_device, words  # noqa: F401

LEDGER = ["--config.probe.ledger_every_steps=2", "--config.eval.every_steps=4"]


def accounts(run):
    """Arrays and texts of every ledger of a run."""
    result = {}
    for path in sorted((run / "ledger").glob("*.npz")):
        with np.load(path) as file:
            arrays = {name: file[name].astype(float) for name in file.files}
        result[path.stem] = arrays, json.loads(path.with_suffix(".json").read_text())
    return result


def column_sum(arrays, measure):
    """Sum all columns and the curvature of a measure."""
    columns = [v for name, v in arrays.items() if name.startswith(measure) and "actual" not in name]
    return sum(v.sum(axis=1) if v.ndim == 2 else v for v in columns)


def test_a_ledger_of_every_stage(base, tmp_path, capsys):  # noqa: F811
    """story: columns sum to the measured change, and belong to the texts stored beside them."""
    run = tmp_path / "run"
    more = ["--config.probe.families=('own', 'other', 'shuffled')", *LEDGER, *STAGES]
    assert main(words(base, run, *more, config="cfrl")) == 0
    probe_set = json.loads((run / "probes" / "set.json").read_text())
    assert [entry["family"] for entry in probe_set["completions"]] == sum(
        ([family] * 4 for family in FAMILIES[:3]), []
    )
    own_texts, other, shuffled = (probe_set["completions"][i : i + 4] for i in (0, 4, 8))
    assert [entry["text"] for entry in other] == [own_texts[i]["text"] for i in (2, 3, 0, 1)]
    assert all(
        sorted(a["tokens"]) == sorted(b["tokens"]) and a["tokens"][-1] == b["tokens"][-1]
        for a, b in zip(own_texts, shuffled, strict=True)
    )
    tokens = sum(len(entry["tokens"]) for entry in probe_set["completions"])
    result = accounts(run)
    assert list(result) == [
        "step_000002",
        "step_000004",
        "step_000006",
        "step_000008",
        "step_000010",
    ]
    for name, (arrays, beside) in result.items():
        stage = "classifier" if int(name[5:]) <= 4 else "all"
        assert beside["stage"] == stage and beside["digest"] == probe_set["digest"]
        assert len(beside["samples"]) == 8 and all(entry["prompt"] for entry in beside["samples"])
        assert arrays["log_prob/policy/head"].shape == (tokens, 8)
        for measure in ("log_prob", "entropy"):
            actual = arrays[f"{measure}/actual"]
            assert np.abs(actual).max() > 1e-6
            np.testing.assert_allclose(column_sum(arrays, measure), actual, atol=1e-6)
        moved = np.abs(arrays["log_prob/policy/body"]).max()
        assert moved == 0 if stage == "classifier" else moved > 1e-7
        with np.load(run / "probes" / f"{name}.npz") as file:
            np.testing.assert_allclose(file["actual"], arrays["log_prob/actual"], atol=1e-6)
            assert file["cosines"].shape == (12, 12)
    names = {name for line in lines(run) for name in line}
    assert {"ledger/policy_share", "ledger/positive_share", "probe/other/log_prob"} <= names
    assert {"probe/squeeze_greedy", "signal/entropy_share", "weights/unchanged"} <= names
    assert {"probe/ches", "probe/head_sum_wrong", "signal/noise", "ledger/kl_share"} <= names
    assert {"probe/linearity", "weights/linearity", "weights/direction_cosine"} <= names
    assert all(map(is_known, names))
    place = run / "probes" / "set.npz"  # resumed runs read it (tests/training/test_resume.py)
    place.write_bytes(place.read_bytes()[:100])
    (run / "finished").unlink()
    assert main(words(base, run, *more, config="cfrl")) == 2
    assert "set.npz is damaged" in capsys.readouterr().err


def test_other_forms_of_a_ledger(base, tmp_path):  # noqa: F811
    """story: by group with a KL and an entropy bonus in the loss; supervised; on eight devices."""
    more = ["--config.objective.preset=grpo", "--config.objective.kl_coefficient=0.1"]
    more += ["--config.objective.entropy_coefficient=0.01", "--config.probe.ledger_by=group"]
    groups = "(('layers/[0-9]+/mlp/.*', 'mlp'), ('.*', 'rest'))"
    more += ["--config.probe.kernel_every_steps=2", "--config.probe.kernel_layers=True"]
    more += [f"--config.probe.ledger_groups={groups}", "--config.stages[0].steps=2", *LEDGER]
    run = tmp_path / "group"
    assert main(words(base, run, *more)) == 0
    arrays, _ = accounts(run)["step_000002"]
    parts = {name.split("/", 1)[1] for name in arrays if name.startswith("log_prob")}
    terms = ("policy", "kl", "bonus", "momentum", "decay", "optimizer")
    roles = ("head", "mlp", "rest")
    assert parts == {f"{t}/{r}" for t in terms for r in roles} | {"actual", "curvature"}
    np.testing.assert_allclose(column_sum(arrays, "log_prob"), arrays["log_prob/actual"], atol=1e-6)
    first, last = lines(run)[0], lines(run)[-1]
    assert first["probe/laziness_head"] == 0 < last["probe/laziness_head"] < 1
    assert 0 <= last["probe/advantage_alignment"] <= 1
    assert first["probe/cka_body"] == pytest.approx(1) and last["probe/body_to_head"] > 0
    layers = [value for name, value in last.items() if name.startswith("probe/layer_share/")]
    assert len(layers) > 2 and sum(layers) == pytest.approx(1)


def test_shares_of_the_kl_by_hand():
    """by hand: 1 of 4, 0 of nothing, nothing counted; None where a token differs or others pull."""
    mask = np.array([[True, True], [True, False], [False, False]])
    advantages = np.array([[4.0, 4.0], [0.0, 7.0], [3.0, 5.0]])
    part = np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 0.0]])
    arrays = dict.fromkeys(("tokens", "mask", "old_log_probs", "ref_log_probs"), mask)
    batch = UpdateBatch(completion_mask=mask, advantages=advantages, kl_advantages=part, **arrays)
    assert kl_shares(batch).tolist() == [0.25, 0.0, 0.0]
    advantages[0, 1] = 3.0
    assert kl_shares(batch) is None
    advantages[0, 1] = 4.0
    assert kl_shares(batch.replace(penalties=part)) is None
    assert kl_shares(batch.replace(kl_advantages=None)) is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("probe.families=('own', 'mine')", "families must be different ones of own, other"),
        ("probe.families=('rejected',)", "has no column rejected; add it"),
        ("probe.ledger_by=token", "ledger_by must be one of group, sample, not 'token'"),
        ("probe.ledger_groups=(('layers', 'x'),)", "matches no parameter"),
    ],
)
def test_mistakes(base, tmp_path, capsys, setting, message):  # noqa: F811
    """law: errors come before anything is trained."""
    assert main(words(base, tmp_path / "run", f"--config.{setting}", *LEDGER)) == 2
    assert message in capsys.readouterr().err
