"""Shorthands of settings: where each goes, and messages for values that do not fit."""

from pathlib import Path

import pytest

from ntkrl import runtime
from ntkrl.configs import base, cfrl
from ntkrl.shorthands import SHORTHANDS, apply_shorthands


def config_of(*stages):
    """Return the default config with other stages."""
    config = base.get_config()
    config.stages = stages
    return config


def test_each_goes_to_its_setting():
    """by hand: text of a command line and values of Python arrive alike."""
    for values in (
        {"model": "M", "data": "a,b", "reward": "r.py:f", "seed": "7", "run_dir": "runs/x"},
        {"model": Path("M"), "data": "a,b", "reward": "r.py:f", "seed": 7, "run_dir": "runs/x"},
    ):
        config = base.get_config()
        apply_shorthands(config, values)
        assert (config.model.path, config.data.path) == ("M", "a,b")
        assert (config.reward.function, config.seed, config.run_dir) == ("r.py:f", 7, "runs/x")


def test_learning_rates_keep_their_ratio():
    """by hand: the last stage gets the rate, the head's rate stays ten times as large."""
    config = cfrl.get_config()
    assert [row.parameters for row in config.stages] == [
        (("head/.*", 1e-5), (".*", None)),
        ((".*", 1e-6),),
    ]
    apply_shorthands(config, {"learning_rate": "3e-5"})
    # exactly: 3e-5 · 1e-5 / 1e-6 in floating point is 3.0000000000000003e-04
    assert [row.parameters for row in config.stages] == [
        (("head/.*", 3e-4), (".*", None)),
        ((".*", 3e-5),),
    ]


def test_the_rate_of_the_last_trained_pattern():
    """by hand: of several patterns in the last stage, the last that trains gets the rate."""
    rows = ((".*/bias", 4e-4), ("body/.*", 2e-4), (".*", None))
    config = config_of(base.stage("all", 3, rows))
    apply_shorthands(config, {"learning_rate": 1e-5})
    assert config.stages[0].parameters == ((".*/bias", 2e-5), ("body/.*", 1e-5), (".*", None))


@pytest.mark.parametrize(
    ("lengths", "total", "shares"),
    [
        ((100,), 7, [7]),
        ((40, 160), 10, [2, 8]),
        ((40, 160), 2, [1, 1]),  # 0.4 and 1.6
        ((1, 1, 1), 8, [3, 3, 2]),
        ((1, 1, 98), 5, [1, 1, 3]),
        ((1, 98, 1), 1000, [10, 980, 10]),
    ],
)
def test_steps_keep_their_proportions(lengths, total, shares):
    """by hand: largest remainders, each stage at least a step, together the total."""
    config = config_of(*(base.stage("s", steps, ((".*", 1e-6),)) for steps in lengths))
    apply_shorthands(config, {"steps": total})
    assert [row.steps for row in config.stages] == shares


def test_steps_in_place_of_epochs():
    """by hand: stages of 1 and 3 epochs get a quarter and the rest, and no epochs."""
    rows = (".*", 1e-6), {"epochs": 1.0}, {"epochs": 3.0}
    config = config_of(*(base.stage("s", None, (rows[0],), **change) for change in rows[1:]))
    apply_shorthands(config, {"steps": 20})
    assert [(row.steps, row.epochs) for row in config.stages] == [(5, None), (15, None)]
    mixed = config_of(base.stage("a", 3, (rows[0],)), base.stage("b", None, (rows[0],), epochs=1.0))
    with pytest.raises(ValueError, match=r"steps=20: not every stage has a length in steps"):
        apply_shorthands(mixed, {"steps": 20})


@pytest.mark.parametrize(
    ("values", "messages"),
    [
        ({"steps": "ten"}, ["steps='ten': expected a whole number of at least 1"]),
        ({"steps": 2.5}, ["steps=2.5: expected a whole number"]),
        ({"steps": 0}, ["of at least 1"]),
        ({"steps": True}, ["steps=True: expected"]),
        ({"seed": "-1"}, ["seed='-1': expected a whole number of at least 0"]),
        ({"learning_rate": "fast"}, ["learning_rate='fast': expected a number above 0"]),
        ({"learning_rate": "nan"}, ["expected a number above 0"]),
        ({"learning_rate": 0}, ["expected a number above 0"]),
        ({"model": ""}, ["model='': expected text, for model.path"]),
        ({"data": 3, "seed": "x"}, ["data=3: expected text", "seed='x'"]),
        ({"learning_rat": 1}, ["learning_rat is not a shorthand; did you mean 'learning_rate'?"]),
    ],
)
def test_mistakes(values, messages):
    """law: the message names the shorthand, its value and what is allowed; all at once."""
    with pytest.raises(ValueError) as caught:
        apply_shorthands(base.get_config(), values)
    assert [text for text in messages if text not in str(caught.value)] == []


def test_more_stages_than_steps():
    """by hand: two stages cannot share a single step."""
    with pytest.raises(ValueError, match="steps=1: 2 stages need at least a step each"):
        apply_shorthands(cfrl.get_config(), {"steps": 1})


def test_a_saved_config_takes_them_too():
    """law: stages read from JSON, which are plain dictionaries, are changed in the same way."""
    config, saved = cfrl.get_config(), runtime.from_json(runtime.to_json(cfrl.get_config()))
    for each in (config, saved):
        apply_shorthands(each, {"steps": 50, "learning_rate": 1e-4, "seed": 3})
    assert runtime.to_json(config) == runtime.to_json(saved)
    assert config.stages[0].steps == 10


def test_overrides_win():
    """law: `--config.…` words are applied after shorthands."""
    values = {name: "1" for name in SHORTHANDS if name in ("seed", "steps", "learning_rate")}
    words = ["--config=rl", "--config.seed=5", "--config.stages[0].steps=9"]
    config = runtime.read_config(words, shorthands=values)
    assert (config.seed, config.stages[0].steps) == (5, 9)
    assert config.stages[0].parameters == ((".*", 1.0),)
