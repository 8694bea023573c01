"""Metrics of a rollout, by hand."""

import numpy as np
import pytest

from ntkrl.generate import RewardedRollout
from ntkrl.reward import RewardResult
from ntkrl.training.rollout_source import rollout_metrics
from ntkrl.types import Rollout


def collected(lengths, finished, rewards, **result):
    """Return a rewarded rollout; fields that no metric reads are empty."""
    columns = np.arange(max(lengths))
    empty = np.zeros((len(lengths), 0))
    rollout = Rollout(
        tokens=empty,
        mask=empty,
        completion_mask=columns < np.asarray(lengths)[:, None],
        sampler_log_probs=empty,
        kept_log_mass=empty,
        finished=np.asarray(finished),
    )
    parts = {"per_function": {}, "logged": {}, "extra": {}, "failures": {}} | result
    result = RewardResult(np.asarray(rewards, np.float32), **parts)
    return RewardedRollout(rollout, [], result, np.arange(0))


def test_by_hand():
    """By hand: two prompts, rewards 0 2 | 3 3, lengths 1 4 2 4, the last one cut."""
    result = rollout_metrics(
        collected(
            [1, 4, 2, 4],
            [True, True, True, False],
            [0, 2, 3, 3],
            per_function={
                "a": np.array([0, 1, np.nan, 2], np.float32),
                "once": np.array([np.nan, 5, np.nan, np.nan], np.float32),
                "never": np.full(4, np.nan, np.float32),
            },
            logged={"x": 7.0},
        ),
        group=2,
    )
    assert result == pytest.approx(
        {
            "reward": 2.0,
            "signal/reward_variance": 1.0,  # of 2 and 0
            # deviations −2 0 1 1: 6 / 3 (6 / 4 would be the biased one)
            "reward_std": 2**0.5,
            # (√2 + 0) / 2: that of 0 and 2 is √(2 / 1)
            "reward_group_std": 2**0.5 / 2,
            "frac_reward_zero_std": 0.5,
            "completions/clipped_ratio": 0.25,
            "completions/mean_length": 11 / 4,
            "completions/min_length": 1.0,
            "completions/max_length": 4.0,
            # without the last: 1 4 2
            "completions/mean_terminated_length": 7 / 3,
            "completions/min_terminated_length": 1.0,
            "completions/max_terminated_length": 4.0,
            "rewards/a/mean": 1.0,
            "rewards/a/std": 1.0,  # deviations −1 0 1: 2 / 2
            "rewards/once/mean": 5.0,
            "logged/x": 7.0,
        }
    )


def test_nothing_ended_and_equal_rewards():
    """By hand: no completion ended, so none has a length at its end; six times 0.3 is no spread."""
    result = rollout_metrics(
        collected([3] * 6, [False] * 6, [0.3] * 6, failures={"a": "a timed out"}), group=6
    )
    assert not [name for name in result if "terminated" in name]
    # numpy's float32 standard deviation of six times 0.3 is 3.3e-8
    assert result["frac_reward_zero_std"] == 1.0
    assert result["completions/clipped_ratio"] == 1.0
    assert result["rewards/a/failures"] == 1.0
