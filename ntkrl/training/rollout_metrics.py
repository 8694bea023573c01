"""What is logged of a rollout before any update on it, under TRL's names where TRL has one."""

from __future__ import annotations

import numpy as np

from ntkrl import probe, runtime
from ntkrl.generate import Collected


def rollout_metrics(found: Collected, group: int) -> dict[str, float]:
    """Return the metrics of a rollout; failed calls of reward functions are told too.

    Args:
      found: B completions, the `group` of a prompt in consecutive rows.
      group: completions per prompt, ≥ 2.

    Returns:
      Numbers by the glossary's names. A name is left out where nothing can be said: no completion
      ended, a reward function applied to none, a standard deviation of one number.

    Source: TRL 1.16's RLOOTrainer, but for `reward_group_std`, TRL's `reward_std` until 0.26.
    """
    rewards_PN = found.result.rewards.astype(np.float64).reshape(-1, group)
    variances_P, signal = probe.reward_signal(rewards_PN)
    lengths_B = np.asarray(found.rollout.completion_mask).sum(axis=1)
    ended_B = np.asarray(found.rollout.finished)
    metrics = {
        "reward": float(rewards_PN.mean()),
        "reward_std": float(rewards_PN.std(ddof=1)),
        "reward_group_std": float(np.sqrt(variances_P).mean()),
        "frac_reward_zero_std": signal["frac_reward_zero_std"],
        "signal/reward_variance": signal["reward_variance"],
        "completions/clipped_ratio": float(1 - np.mean(ended_B)),
    }
    for suffix, lengths in (("length", lengths_B), ("terminated_length", lengths_B[ended_B])):
        if lengths.size:
            for name, statistic in (("mean", np.mean), ("min", np.min), ("max", np.max)):
                metrics[f"completions/{name}_{suffix}"] = float(statistic(lengths))
    for name, why in found.result.failures.items():
        runtime.log(f"counted as reward.on_failure: {why}")
        metrics[f"rewards/{name}/failures"] = 1.0
    for name, values in found.result.per_function.items():
        applicable = values[~np.isnan(values)].astype(np.float64)
        if applicable.size:
            metrics[f"rewards/{name}/mean"] = float(applicable.mean())
        if applicable.size > 1:
            metrics[f"rewards/{name}/std"] = float(applicable.std(ddof=1))
    return metrics | {f"logged/{name}": value for name, value in found.result.logged.items()}
