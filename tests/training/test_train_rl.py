"""RL runs at the edges: groups of equal rewards, truncation, resampled prompts."""

import dataclasses
import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from ntkrl.main import main
from ntkrl.training import BATCH_SOURCES, RolloutSource
from ntkrl.training import loop as training_loop
from tests.training.test_train import ROOT, UNWATCHED, base, lines, one_device, words

__all__ = ["base", "one_device"]  # fixtures
REWARDS = ROOT / "tests" / "toy_rewards.py"
SHORT = ["--config.stages[0].steps=3", *UNWATCHED]


def run_of(base, place, *more, reward="score"):
    """Train; return the exit status."""
    return main(words(base, place, *SHORT, f"--config.reward.function={REWARDS}:{reward}", *more))


def killed_and_resumed(monkeypatch, at, train_it):
    """Train, interrupt before a rollout step, and train on."""
    original = training_loop.Loop._advance

    def dies(self, rollout_step):
        if rollout_step == at:
            raise KeyboardInterrupt
        return original(self, rollout_step)

    with monkeypatch.context() as patch:
        patch.setattr(training_loop.Loop, "_advance", dies)
        assert train_it() == 130
    assert train_it() == 0


def weights(place):
    """The weights of a directory."""
    return load_file(place / "model.safetensors")


def test_groups_of_equal_rewards_are_skipped_and_counted(base, tmp_path, capsys):
    """story: no signal: no step is taken, every weight is unchanged, and the log reports it."""
    run = tmp_path / "run"
    off = ["--config.objective.preset=dr_grpo"]
    assert run_of(base, run, *off, reward="constant") == 0
    result = lines(run)
    assert [line["skipped_updates"] for line in result[1:]] == [1.0] * 3
    assert {line["step"] for line in result} == {0}
    assert [line["frac_reward_zero_std"] for line in result[1:]] == [1.0] * 3
    before, after = weights(base), weights(run / "export")
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
    stopped = tmp_path / "stopped"
    assert (
        run_of(base, stopped, *off, "--config.schedule.on_no_signal=stop", reward="constant") == 2
    )
    output = capsys.readouterr().err
    assert "rollout step 1 has anything to learn from (100% of the groups got equal" in output
    assert 'schedule.on_no_signal="skip"' in output


def test_skipped_steps_are_written_once(base, tmp_path, monkeypatch):
    """story: a run killed among steps without an update has each line once after it resumes."""
    run = tmp_path / "run"
    more = ["--config.objective.preset=dr_grpo", "--config.stages[0].steps=5"]
    killed_and_resumed(monkeypatch, 4, lambda: run_of(base, run, *more, reward="constant"))
    assert [line["rollout_step"] for line in lines(run)[1:]] == [1, 2, 3, 4, 5]
    times = (run / "timings.jsonl").read_text().splitlines()
    assert [json.loads(line)["rollout_step"] for line in times] == [1, 2, 3, 4, 5]


def test_cut_completions_may_leave_nothing(base, tmp_path):
    """story: cut by a budget of one token, nearly all are masked, and nothing is NaN."""
    run = tmp_path / "run"
    more = ["--config.objective.preset=grpo", "--config.objective.overlong=mask"]
    assert run_of(base, run, *more, "--config.rollout.max_completion_tokens=1") == 0
    result = lines(run)[1:]
    assert all(line["completions/clipped_ratio"] > 0.5 for line in result)
    assert any(line["skipped_updates"] == 1.0 for line in result)
    for array in weights(run / "export").values():
        assert np.isfinite(array).all()


def test_dapo_draws_other_prompts(base, tmp_path, monkeypatch):
    """story: groups of equal rewards make place for others; a resumed run draws the same ones."""
    more = [
        "--config.objective.preset=dapo",
        "--config.objective.overlong=keep",
        "--config.stages[0].steps=4",
        "--config.stages[0].parameters=(('.*', 1e-2),)",
    ]
    uninterrupted, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_of(base, uninterrupted, *more, reward="sometimes") == 0
    result = lines(uninterrupted)[1:]
    assert max(line["resampling_rounds"] for line in result) >= 1
    assert np.mean([line["frac_reward_zero_std"] for line in result]) < 0.4  # about 0.5 undrawn
    killed_and_resumed(monkeypatch, 4, lambda: run_of(base, broken, *more, reward="sometimes"))
    assert (uninterrupted / "metrics.jsonl").read_bytes() == (broken / "metrics.jsonl").read_bytes()


def test_truncated_sampling_with_correction(base, tmp_path):
    """story: top-k draws are weighed by the kept mass; ratios before the update stay 1."""
    run = tmp_path / "run"
    more = [
        "--config.rollout.top_k=5",
        "--config.stages[0].parameters=(('.*', 1e-2),)",
        "--config.objective.preset=grpo",
        "--config.objective.correction=truncate",
        "--config.objective.kl_estimator=full",
        "--config.objective.covariance=kl",
        "--config.objective.entropy_coefficient=0.01",
        "--config.schedule.microbatches=2",
    ]
    assert run_of(base, run, *more) == 0
    for line in lines(run)[1:]:
        assert line["sampling/sampling_logp_difference/max"] < 2e-5
        assert 0 < line["sampling/importance_sampling_ratio/mean"] < 1
    assert lines(run)[1]["kl"] == pytest.approx(0.0, abs=1e-6) and lines(run)[3]["kl"] > 1e-4


def test_stage_one_from_stored_features(base, tmp_path, monkeypatch):
    """law: stage 1 from the sampler's features equals stage 1 that runs the body again."""
    stored, again = tmp_path / "stored", tmp_path / "again"
    head = ["--config.stages[0].parameters=(('head/.*', 1e-2), ('.*', None))"]
    assert run_of(base, stored, *head) == 0

    class Blind(RolloutSource):
        def _collect(self, context):
            rewarded, metrics = super()._collect(context)
            assert rewarded.rollout.features is not None
            drawn = rewarded.rollout.replace(features=None)
            return dataclasses.replace(rewarded, rollout=drawn), metrics

    monkeypatch.setitem(BATCH_SOURCES, "rl", Blind)
    assert run_of(base, again, *head) == 0
    first, second = weights(stored / "export"), weights(again / "export")
    start = weights(base)
    for name in first:
        if name == "embed_out.weight":
            assert np.abs(first[name] - start[name]).max() > 1e-3
            # Adam turns rounding of tiny gradients into parts of a step: 1 % of one
            np.testing.assert_allclose(first[name], second[name], atol=1e-4)
        else:
            np.testing.assert_array_equal(first[name], start[name])


@pytest.mark.parametrize(
    "word, message",
    [
        ("rollout.temperature=0.0", "rollout.temperature must be > 0, not 0.0: a greedy sampler"),
        ("rollout.max_completion_tokens=600", "exceed the model's context of 64; lower"),
        ("objective.ratio_level=none", "ratio_level none has no ratio to clip"),
        ("schedule.microbatches=3", "schedule.microbatches = 3 must divide the 8 rows"),
        ("rollout.top_p=1.5", r"top_p must be in \(0, 1\]"),
        ("rollout.engine=x.py:make", "set objective.correction to truncate or mask"),
    ],
)
def test_mistakes_are_messages(base, tmp_path, capsys, word, message):
    """law: status 2 and one message, before anything is written."""
    assert run_of(base, tmp_path / "run", f"--config.{word}") == 2
    assert re.search(message, capsys.readouterr().err)


def test_greedy_evaluation(base, tmp_path):
    """law: temperature 0 in evaluation gives each prompt one completion, repeated."""
    run = tmp_path / "run"
    arguments = ["evaluate", *words(base, run, "--config.eval.temperature=0.0")[1:]]
    assert main(arguments) == 0
    rows = [json.loads(line) for line in next(run.glob("evaluations/*.jsonl")).open()]
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["completion"] == second["completion"]
