"""Runs with an entropy budget."""

import pytest

from ntkrl.main import main
from tests.training.test_train import base, lines, one_device, words
from tests.training.test_train_rl import SHORT, run_of, weights

__all__ = ["base", "one_device"]  # fixtures
NAMES = {"entropy_budget/change", "entropy_budget/mean_weight", "entropy_budget/weight_spread"}


def test_a_budget_that_is_never_reached(base, tmp_path):
    """law: weights are one, and metrics and weights of the model the same bits as without."""
    assert run_of(base, tmp_path / "without") == 0
    assert run_of(base, tmp_path / "with", "--config.objective.entropy_budget=9.0") == 0
    without, budgeted = lines(tmp_path / "without"), lines(tmp_path / "with")
    for plain, line in zip(without[1:], budgeted[1:], strict=True):
        assert NAMES <= set(line) and line["entropy_budget/mean_weight"] == 1.0
        assert {k: v for k, v in line.items() if k not in NAMES} == plain
    first, second = (weights(tmp_path / name / "export") for name in ("without", "with"))
    assert all((first[name] == second[name]).all() for name in first)


@pytest.mark.parametrize("preset", ["rloo", "grpo"])
def test_a_budget_of_zero(base, tmp_path, preset, capsys):
    """story: entropy falls where no weights prevent it, with a note; minibatches have weights."""
    more = [f"--config.objective.preset={preset}", "--config.schedule.minibatches=2"]
    more += ["--config.schedule.inner_epochs=2", "--config.objective.entropy_budget=0.0"]
    more += ["--config.stages[0].parameters=((r'.*',3e-3),)"]
    assert run_of(base, tmp_path / "run", *more) == 0
    steps = lines(tmp_path / "run")[1:]
    unmet = "no weights in [0, 2] meet objective.entropy_budget=0" in "".join(capsys.readouterr())
    assert unmet or all(line["entropy_budget/change"] > -1e-6 for line in steps)
    assert all(0 <= line["entropy_budget/mean_weight"] <= 2 for line in steps)
    assert max(line["entropy_budget/weight_spread"] for line in steps) > 0.01


@pytest.mark.parametrize(
    "more",
    [
        ["--config.schedule.offload_optimizer=True"],
        ["--config.schedule.microbatches=4"],
        ["--config.stages[0].parameters=(('head/.*',3e-3),('.*',None))"],
    ],
    ids=["offloaded moments", "microbatches", "classifier"],
)
def test_other_steps(base, tmp_path, more):
    """story: moments in host memory, accumulated gradients, a stage with recorded features."""
    assert run_of(base, tmp_path / "run", "--config.objective.entropy_budget=1e-3", *more) == 0
    steps = lines(tmp_path / "run")[1:]
    assert all(NAMES <= set(line) for line in steps)


MISTAKES = {
    ("rl", "--config.objective.entropy_budget=-1."): "needs entropy_budget finite and ≥ 0, not -1.",
    ("rl", "--config.objective.entropy_budget=1.", "--config.objective.covariance=kl"): (
        "covariance kl adds a term that it does not weigh"
    ),
    ("sft", "--config.objective.entropy_budget=1."): "leave it out of method sft",
}


@pytest.mark.parametrize("case", MISTAKES, ids=" ".join)
def test_mistakes(base, tmp_path, capsys, case):
    """by hand: refused before anything runs."""
    config, *more = case
    assert main(words(base, tmp_path / "x", *SHORT, *more, config=config)) == 2
    assert MISTAKES[case] in capsys.readouterr().err
