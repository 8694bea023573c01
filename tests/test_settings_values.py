"""Values of settings that cannot be meant: refused with the value and what is allowed."""

import math

import pytest

from ntkrl import runtime
from ntkrl.settings import read_settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2**32}, r"seed must be ≥ 0 and below 2\^32 = 4294967296, not 4294967296"),
        (
            {"method": "grpo"},
            "is not among rl, sft, reward; grpo is an objective: set objective.pr",
        ),
        ({"objective.preset": "GRPO"}, "preset 'GRPO' is not among .*; did you mean 'grpo'"),
        ({"model.dtype": "bflaot16"}, "is not among float32, bfloat16.*did you mean 'bfloat16'"),
        ({"stages[0].optimizer": "Adam"}, "did you mean 'adam'"),
        ({"rollout.temperature": math.inf}, "temperature must be finite and ≥ 0, not inf"),
        ({"eval.temperature": math.inf}, "eval.temperature must be finite, ≥ 0 or None, not inf"),
        ({"objective.kl_coefficient": math.inf}, "a finite kl_coefficient, not inf"),
        ({"reward.weights": (math.inf,)}, "reward.weights of f.py:f must be finite, not inf"),
        ({"reward.timeout": 0.0}, "reward.timeout must be above 0 seconds, not 0.0"),
        (
            {"reward.timeout": 1e7},
            "reward.timeout must be above 0 seconds, not 10000000.0",
        ),
        ({"reward.batch_size": 0}, "reward.batch_size must be ≥ 1, not 0"),
        ({"data.prompts_per_step": 0}, "data.prompts_per_step must be ≥ 1, not 0"),
    ],
    ids=str,
)
def test_values_that_cannot_be_meant(change, message):
    """by hand: the message has the value, what is allowed, and the nearest word."""
    config = runtime.read_config(
        ["--config=rl", "--config.model.path=x", "--config.reward.function=f.py:f"]
    )
    ((name, value),) = change.items()
    section = config
    for part in name.replace("[0]", "").split(".")[:-1]:
        section = section[part][0] if part == "stages" else section[part]
    with section.ignore_type():
        section[name.rpartition(".")[2]] = value
    with pytest.raises(ValueError, match=message):
        read_settings(config)
