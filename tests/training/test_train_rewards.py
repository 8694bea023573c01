"""Runs whose columns, rewards, lengths and dtypes are those of real files and settings."""

import datetime
import decimal
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from ntkrl import data, update
from ntkrl.configs import rl
from ntkrl.main import main
from ntkrl.settings import read_settings
from tests.toys import torch_neox
from tests.training.test_train import UNWATCHED, base, lines, one_device, words

__all__ = ["base", "one_device"]  # fixtures
ONE_STEP = ["--config.stages[0].steps=1", *UNWATCHED]
REWARDS = """
import datetime, decimal, math

def named(completion_ids, when, price):
    assert when[0] == datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc)
    assert all(type(value) is decimal.Decimal for value in price)
    return [float(p) for p in price]

def every(completions, answer, **columns):
    assert type(columns["raw"][0]) is bytes and type(columns["day"][0]) is datetime.date
    assert math.isnan(columns["score"][0])
    return [float(len(text)) for text in completions]

def tenth(completions):
    return [0.1] * len(completions)
"""


@pytest.fixture
def rewards(tmp_path):
    """A file of reward functions."""
    path = tmp_path / "my_rewards.py"
    path.write_text(REWARDS)
    return path


def settings(**sections):
    """The settings of configs/rl.py with some fields changed."""
    config = rl.get_config()
    config.model.path, config.data.path, config.reward.function = "x", "x.jsonl", "x.py:y"
    for name, fields in sections.items():
        config[name].update(fields)
    return read_settings(config)


def test_columns_that_json_cannot_hold(base, rewards, tmp_path):
    """story: a run and its evaluations on a Parquet file of dates, bytes, decimals and NaN."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = 10
    table = arrow.table(
        {
            "prompt": [f"{n}=" for n in range(10, 10 + rows)],
            "answer": ["1"] * rows,
            "when": [datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)] * rows,
            "day": [datetime.date(2024, 1, 1)] * rows,
            "raw": [b"\xff\x00"] * rows,
            "price": [decimal.Decimal("1.50")] * rows,
            "score": [float("nan")] * rows,
        }
    )
    parquet.write_table(table, tmp_path / "rows.parquet")
    more = [
        f"--config.data.path={tmp_path / 'rows.parquet'}",
        f"--config.reward.function={rewards}:named,{rewards}:every",
        "--config.stages[0].steps=1",
        "--config.data.held_out=0.4",
    ]
    run = tmp_path / "run"
    assert main(words(base, run, *more)) == 0
    step = lines(run)[-1]
    assert step["rewards/named/mean"] == 1.5 and step["rewards/every/mean"] > 0


def test_equal_rewards_of_any_value_are_no_signal(base, rewards, tmp_path):
    """law: eight times 0.1 is skipped by every estimator, as eight times 0.5 is."""
    for preset in ("rloo", "grpo"):
        run = tmp_path / preset
        more = [
            f"--config.reward.function={rewards}:tenth",
            f"--config.objective.preset={preset}",
            "--config.objective.kl_place=off",
            "--config.objective.kl_coefficient=0.0",
            "--config.rollout.completions_per_prompt=8",
        ]
        assert main(words(base, run, *ONE_STEP, *more)) == 0
        step = lines(run)[-1]
        assert (step["frac_reward_zero_std"], step["skipped_updates"]) == (1.0, 1.0)
        before, after = (load_file(place / "model.safetensors") for place in (base, run / "export"))
        for name in before:
            np.testing.assert_array_equal(before[name], after[name])


@pytest.mark.parametrize("setting", ["model.compute_dtype", "rollout.cache_dtype"])
def test_bfloat16_runs_at_defaults(tmp_path, setting):
    """story: the tolerance follows the dtypes; that of float32 would refuse this model."""
    torch_neox(tmp_path, vocab_size=18, hidden_size=64, num_hidden_layers=4)
    data.save_tokenizer(tmp_path)
    more = ["--config.rollout.max_completion_tokens=24", f"--config.{setting}=bfloat16"]
    assert main(words(tmp_path, tmp_path / "run", *ONE_STEP, *more)) == 0
    difference = lines(tmp_path / "run")[-1]["sampling/sampling_logp_difference/max"]
    tolerances = update.LOG_RATIO_TOLERANCES
    assert tolerances["float32"] < difference < tolerances["bfloat16"]


def test_tolerance_by_dtype():
    """by hand: the larger one of network and cache; a user's value wins."""
    f32, f16, bf16 = 1e-3, 0.25, 2.0
    cases = [
        ({}, {}, f32),
        ({"compute_dtype": "bfloat16"}, {}, bf16),
        ({"dtype": "bfloat16"}, {}, bf16),
        ({"dtype": "bfloat16", "compute_dtype": "float32"}, {}, f32),
        ({}, {"cache_dtype": "bfloat16"}, bf16),
        ({"compute_dtype": "bfloat16"}, {"cache_dtype": "float32"}, bf16),
        ({"compute_dtype": "float16"}, {}, f16),
    ]
    for model, rollout, tolerance in cases:
        assert settings(model=model, rollout=rollout).log_ratio_tolerance == tolerance
    chosen = settings(model={"compute_dtype": "bfloat16"}, schedule={"log_ratio_tolerance": 0.5})
    assert chosen.log_ratio_tolerance == 0.5
    with pytest.raises(ValueError, match="log_ratio_tolerance must be > 0 or None, not 0.0"):
        settings(schedule={"log_ratio_tolerance": 0.0})


def test_the_advice_for_a_difference_can_be_followed(base, tmp_path, capsys):
    """story: refused with the dtypes and the setting; the same command with it runs."""
    run = tmp_path / "run"
    command = words(base, run, *ONE_STEP, "--config.rollout.cache_dtype=bfloat16")
    assert main([*command, "--config.schedule.log_ratio_tolerance=1e-9"]) == 2
    text = capsys.readouterr().err
    assert "schedule.log_ratio_tolerance = 1e-09 (the network computes in float32, its" in text
    assert "cache is bfloat16" in text and "same command with schedule.log_ratio_tol" in text
    assert main([*command, "--config.schedule.log_ratio_tolerance=0.5"]) == 0
    saved = json.loads((run / "config.json").read_text())
    assert saved["schedule"]["log_ratio_tolerance"] == 0.5


def test_lengths_follow_the_budget():
    """by hand: soft_overlong at its defaults, set apart, and beyond the budget."""
    overlong = {"function": "soft_overlong"}
    for budget, slope in ((512, 128), (2048, 128), (100, 50)):
        options = settings(rollout={"max_completion_tokens": budget}, reward=overlong)
        lengths = {"max_completion_len": budget, "soft_punish_cache": slope}
        assert options.reward.options["soft_overlong"] == lengths
    config = rl.get_config()
    config.model.path, config.data.path, config.reward.function = "x", "x.jsonl", "soft_overlong"
    config.reward.options.soft_overlong.max_completion_len = 1024
    with pytest.raises(ValueError, match="= 512, not 1024: completions are cut before they reach"):
        read_settings(config)
    config.rollout.max_completion_tokens = 1024
    lengths = {"max_completion_len": 1024, "soft_punish_cache": 128}
    assert read_settings(config).reward.options["soft_overlong"] == lengths
