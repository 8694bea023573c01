"""Completions of made-up tokens, as a run keeps them."""

from pathlib import Path

import numpy as np

from ntkrl.report import RolloutsWriter, StepRollouts, encode_rollouts

WORDS = [f" w{number}" for number in range(300)]


def rollouts(rollout_step, count=2, group=2, length=3, **changes):
    """Completions of `count` prompts, the last of which is empty; `changes` replace fields."""
    rng = np.random.default_rng(rollout_step)
    completions = count * group
    lengths = np.full(completions, length)
    lengths[-1] = 0
    tokens = rng.integers(0, len(WORDS), lengths.sum())
    ends = np.cumsum(lengths)
    texts = [
        "".join(WORDS[token] for token in tokens[end - size : end])
        for end, size in zip(ends, lengths, strict=True)
    ]
    fields = {
        "rollout_step": rollout_step,
        "step": rollout_step,
        "stage": "all",
        "prompts": [f"prompt {number} of {rollout_step} </script>" for number in range(count)],
        "rows": rollout_step % 50 * count + np.arange(count),
        "texts": texts,
        "reward": rng.normal(size=completions).round(2),
        "rewards": {"score": np.where(lengths > 0, 1.0, np.nan), "length": lengths * 1.0},
        "finished": lengths < length,
        "lengths": lengths,
        "tokens": tokens,
        "vocabulary": {token: WORDS[token] for token in set(tokens.tolist())},
        "sampler_log_probs": -rng.exponential(size=len(tokens)),
        "advantages": np.repeat(rng.normal(size=completions), lengths),
        "entropy": rng.exponential(size=len(tokens)),
        "log_ratio": 1e-6 * rng.normal(size=len(tokens)),
    }
    return StepRollouts(**(fields | changes))


def write_rollouts(run: Path, steps, limit_mib=256.0, **sizes) -> None:
    """Write the steps of a run; `sizes` as for `rollouts`."""
    writer = RolloutsWriter(run, limit_mib, 0, None, print)
    for step in steps:
        writer.write(step, encode_rollouts(rollouts(step, **sizes)))
    writer.close()
