"""Metric names: the glossary, and other libraries' names for the same metrics."""

import re

import pytest

from ntkrl.report import format_glossary
from ntkrl.report.metric_names import (
    ALIASES,
    FALSE_FRIENDS,
    GLOSSARY,
    PATTERNS,
    TIMINGS,
    aliased,
    is_known,
)


def test_aliases_by_hand():
    """By hand: TRL's names start with train/; metrics defined by users keep their names."""
    values = {
        "step": 3,
        "reward": 0.5,
        "policy_loss": -0.25,
        "rewards/my/len/std": 2.0,
        "rewards/len/failures": 1.0,
        r"logged/\1": 4.0,
        "probe/entropy": 1.5,
        "step_time": 9.0,
        "timings/sample_seconds": 7.0,
    }
    assert aliased("trl", values) == {
        "train/global_step": 3,
        "train/reward": 0.5,
        "train/loss": -0.25,
        "train/rewards/my/len/std": 2.0,
        r"train/\1": 4.0,
        "train/step_time": 9.0,
    }
    assert aliased("verl", values) == {"critic/score/mean": 0.5, "timing_s/gen": 7.0}


def test_known_names_by_hand():
    """By hand: names of a family need their word; timings and aliases are no metrics."""
    for name in ("reward", "eval/pass@k", "rewards/a/b/std", "logged/x"):
        assert is_known(name), name
    for name in (
        "rewards//mean",
        "logged/",
        "xlogged/a",
        "step_time",
        "train/reward",
        "evalxreward",
    ):
        assert not is_known(name), name


@pytest.mark.parametrize("style", ALIASES)
def test_aliases_are_of_known_names(style):
    """Law: every alias is of a name we write, and no name is both the same and another thing."""
    assert set(ALIASES[style]) <= {*GLOSSARY, *PATTERNS, *TIMINGS}
    assert set(FALSE_FRIENDS) <= set(ALIASES)
    different = FALSE_FRIENDS[style] if style in FALSE_FRIENDS else {}
    assert not set(ALIASES[style].values()) & set(different)


def test_glossary_is_markdown():
    """Law: every name has one line; bars inside cells are escaped, so columns stay columns."""
    same, _, different = format_glossary().partition("\n\n")
    lines = same.splitlines()
    assert len(lines) == 2 + len(GLOSSARY) + len(PATTERNS) + len(TIMINGS)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {5}
    expected = "| `reward` | reward | mean reward of the step's completions, before any KL term | "
    expected += "trl `train/reward`, trl012 `train/objective/scores`, verl `critic/score/mean` |"
    assert expected in lines
    assert "| trl012 | `train/objective/kl` | Σ_t (log π − log π_ref)" in different
