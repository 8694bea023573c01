"""The log of completions that a run keeps."""

import gzip
import json
import re

import numpy as np
import pytest

from ntkrl import runtime, training
from ntkrl.main import main
from ntkrl.setup import Inputs
from tests.training.test_train import base, lines, one_device, words

__all__ = ["base", "one_device"]  # fixtures

FEW = ["--config.eval.every_steps=None", "--config.probe.every_steps=None"]


def steps_of(run):
    """Return the steps of a run's log, as standard tools read them."""
    files = sorted((run / "rollouts").glob("*.jsonl.gz"))
    return [json.loads(line) for file in files for line in gzip.open(file)]


def test_every_completion_is_kept(base, tmp_path, capsys):
    """story: two functions, a correction, minibatches: what is kept is what metrics summarise."""
    run = tmp_path / "run"
    rewards = tmp_path / "rewards.py"
    rewards.write_text(
        "def length(completions, **kwargs):\n    return [float(len(c)) for c in completions]\n"
        "def even(prompts, **kwargs):\n"
        "    return [None if len(p) % 2 else 1.0 for p in prompts]\n"
    )
    more = [f"--config.reward.function={rewards}:length,{rewards}:even", *FEW]
    more += ["--config.stages[0].steps=3", "--config.schedule.minibatches=2"]
    more += ["--config.objective.preset=grpo", "--config.objective.correction=truncate"]
    more += ["--config.objective.correction_level=token", "--config.objective.correction_cap=2."]
    assert main(words(base, run, *more)) == 0, capsys.readouterr().err
    steps, metrics = steps_of(run), lines(run)[1:]
    assert [step["rollout_step"] for step in steps] == [1, 2, 3]
    for step, line in zip(steps, metrics, strict=True):
        assert step["step"] == line["step"] and step["stage"] == line["stage"] == "all"
        assert len(step["texts"]) == 8 and len(step["prompts"]) == 4 == len(set(step["rows"]))
        assert np.mean(step["reward"]) == pytest.approx(line["reward"], rel=1e-5)
        assert step["rewards"]["length"] == [len(text) for text in step["texts"]]
        applies = [v for v in step["rewards"]["even"] if v is not None]
        assert applies == [1.0] * len(applies) and len(applies) % 2 == 0
        assert np.mean(step["lengths"]) == pytest.approx(line["completions/mean_length"])
        assert len(step["tokens"]) == sum(step["lengths"])
        shown = [step["vocabulary"][str(token)] for token in step["tokens"]]
        ends = np.cumsum(step["lengths"])
        for end, length, text in zip(ends, step["lengths"], step["texts"], strict=True):
            joined = "".join(shown[end - length : end])
            assert re.sub(r"<\|\w+\|>", "", joined) == text
        log_probs = step["sampler_log_probs"]
        assert log_probs["unit"] == 1e-3 and max(log_probs["values"]) <= 0
        entropy = step["entropy"]
        assert entropy["unit"] == 1e-3 and min(entropy["values"]) >= 0 < max(entropy["values"])
        assert len(entropy["values"]) == len(step["tokens"])
        gaps = np.abs(step["log_ratio"]["values"]) * step["log_ratio"]["unit"]
        assert gaps.max() < 1e-4  # nats: sampler and trainer agree
        groups = np.reshape(step["advantages"], (4, 2))
        np.testing.assert_allclose(groups.sum(axis=1), 0, atol=1e-4)
    assert min(line["log_seconds"] for line in timings(run)) > 0


def timings(run):
    """The lines of timings of a run."""
    return [json.loads(line) for line in (run / "timings.jsonl").read_text().splitlines()]


def test_a_resumed_run_has_the_same_files(base, tmp_path, capsys):
    """story: stopped after a step, later steps and half of one on the disk: equal in the end."""
    more = [*FEW, "--config.stages[0].steps=6"]
    assert main(words(base, tmp_path / "a", *more)) == 0, capsys.readouterr().err
    run = tmp_path / "b"
    config = runtime.read_config(words(base, run, *more)[1:])
    with pytest.raises(runtime.PreemptedError):
        training.train(config, Inputs(on_step=lambda step, _: "stop" if step == 3 else None))
    done = int(lines(run)[-1]["rollout_step"])
    assert done < 6 and [step["rollout_step"] for step in steps_of(run)] == [*range(1, done + 1)]
    (path,) = (run / "rollouts").iterdir()
    later = gzip.decompress(path.read_bytes()).splitlines(keepends=True)[-1]
    step = later.replace(b'"rollout_step":%d' % done, b'"rollout_step":%d' % (done + 1))
    path.write_bytes(path.read_bytes() + gzip.compress(step) + gzip.compress(step)[:30])
    assert main(words(base, run, *more)) == 0, capsys.readouterr().err
    assert path.read_bytes() == (tmp_path / "a" / "rollouts" / path.name).read_bytes()
    assert [step["rollout_step"] for step in steps_of(run)] == [1, 2, 3, 4, 5, 6]


def test_no_log(base, tmp_path, capsys):
    """story: None keeps nothing, and the metrics are the same bits; 0 is refused."""
    more = [*FEW, "--config.stages[0].steps=2"]
    runs = [tmp_path / name for name in ("with", "without")]
    assert main(words(base, runs[0], *more)) == 0, capsys.readouterr().err
    assert main(words(base, runs[1], *more, "--config.logging.rollouts_mib=None")) == 0
    assert not (runs[1] / "rollouts").exists()
    first, second = ((run / "metrics.jsonl").read_bytes() for run in runs)
    assert first == second
    assert main(words(base, tmp_path / "x", *more, "--config.logging.rollouts_mib=0")) == 2
    assert "logging.rollouts_mib must be > 0 MiB, or None for no log, not 0" in "".join(
        capsys.readouterr()
    )
