"""Stages as data: lengths, options, order; an error message for every mistake."""

import jax
import jax.numpy as jnp
import pytest

from ntkrl import trees, update
from tests.toys import toy_params, toy_policy

ROW = {"name": "x", "steps": 5, "parameters": ((".*", 1e-2),)}


def test_lengths_in_steps():
    """by hand: 100 steps an epoch; parts of a step round up, the shorter length counts."""
    for steps, epochs, expected in (
        (None, 0.07, 7),  # 0.07 · 100 is 7.000000000000001 in floating point
        (None, 0.071, 8),
        (150, 2.0, 150),
        (300, 2.0, 200),
        (7, None, 7),
    ):
        stage = update.Stage(**ROW | {"steps": steps, "epochs": epochs}).in_steps(100)
        assert (stage.steps, stage.epochs) == (expected, None)


def test_mistakes_of_a_row_come_at_once():
    """law: ranges, unknown names, and options the optimizer does not have, in one message."""
    with pytest.raises(ValueError) as caught:
        update.Stage(
            name="x",
            steps=None,
            parameters=((".*", 0.0),),
            optimizer="sgd",
            optimizer_state="kept",
            b1=0.5,
            weight_decay=0.1,
            momentum=1.5,
            schedule="step",
            warmup_steps=-1,
            final_fraction=2.0,
            plateau_tolerance=0.1,
            kl_budget=0.0,
        )
    text = str(caught.value)
    for part in (
        "stage 'x': give steps or epochs",
        "learning rate of '.*' must be > 0, or None to freeze, not 0.0",
        "momentum must be in [0, 1), not 1.5",
        "optimizer_state 'kept' is not among reset, keep",
        "optimizer 'sgd' has no b1, weight_decay (it has momentum)",
        "schedule 'step' is not among constant, linear, cosine",
        "warmup_steps must be ≥ 0, not -1",
        "final_fraction must be in [0, 1], not 2.0",
        "plateau_tolerance needs a plateau_window",
        "kl_budget must be > 0 or None, not 0.0",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adam", "momentum": 0.5}, "'adam' has no momentum"),
        ({"optimizer": "adam", "decay": ((".*", 0.1),)}, "'adam' has no decay"),
        ({"optimizer": "adafactor", "epsilon": 1e-3}, "'adafactor' has no epsilon"),
        ({"optimizer": "adamw", "decay": ((".*", -1.0),)}, "decay of '.*' must be ≥ 0, not -1.0"),
        (
            {"optimizer": "adamw", "weight_decay": 0.1, "decay": ((".*", 0.1),)},
            "give weight_decay or decay, not both",
        ),
        ({"final_fraction": 0.1}, "a constant schedule has no final_fraction"),
        ({"steps": 0}, "steps must be ≥ 1"),
        ({"epochs": 0.0}, "epochs must be > 0"),
        ({"plateau_window": 0}, "plateau_window must be ≥ 1"),
        ({"epsilon": 0.0}, "epsilon must be > 0"),
    ],
)
def test_mistakes_of_a_row(changes, message):
    """law: one option too many, or out of range."""
    with pytest.raises(ValueError, match=message):
        update.Stage(**ROW | changes)


def test_every_optimizer_takes_its_options():
    """law: the options that the message lists for an optimizer are accepted."""
    for name, options in {
        "adam": {"b1": 0.5, "b2": 0.6, "epsilon": 1e-3},
        "adamw": {"b1": 0.5, "decay": ((".*", 0.1),)},
        "sgd": {"momentum": 0.5},
        "adafactor": {"weight_decay": 0.1},
        "muon": {"momentum": 0.5, "b1": 0.5, "weight_decay": 0.1},
    }.items():
        assert update.Stage(**ROW | {"optimizer": name, **options}).optimizer == name


def test_order_of_stages():
    """law: keeping needs a stage before, with the same optimizer and a parameter in common."""
    keep = ROW | {"name": "y", "optimizer_state": "keep"}
    with pytest.raises(ValueError, match="'y' is the first and has no optimizer_state to keep"):
        update.check_stages([update.Stage(**keep)])
    other = ROW | {"optimizer": "sgd"}
    with pytest.raises(ValueError, match="of stage 'x': its optimizer is 'adam', the other's 'sgd"):
        update.check_stages([update.Stage(**other), update.Stage(**keep)])
    plain, moving = (ROW | {"optimizer": "sgd"}, keep | {"optimizer": "sgd", "momentum": 0.9})
    with pytest.raises(ValueError, match="its momentum is 0.9, the other's None"):
        update.check_stages([update.Stage(**plain), update.Stage(**moving)])
    update.check_stages([update.Stage(**ROW), update.Stage(**keep)])
    policy = toy_policy()
    params = toy_params(policy)
    apart = [
        update.Stage(**ROW | {"parameters": (("head", 1e-2), (".*", None))}),
        update.Stage(**keep | {"parameters": (("head", None), (".*", 1e-2))}),
    ]
    with pytest.raises(ValueError, match="'y' keeps .* of stage 'x', which trains none of its"):
        update.bind_stages(apart, policy, params, 1)
    wrong = [
        update.Stage(**ROW | {"warmup_steps": 11}),
        update.Stage(**ROW | {"name": "z", "parameters": (("haed", 1e-2), (".*", None))}),
    ]
    with pytest.raises(ValueError) as caught:
        update.bind_stages(wrong, policy, params, 2)
    text = str(caught.value)
    assert "lasts 10 optimizer steps, fewer than its warmup_steps = 11" in text
    assert "stage 'z': 'haed' matches no parameter" in text


LEAF = jax.ShapeDtypeStruct((1, 2, 2), jnp.float32)
ADAPTED = {
    "head": {"weight": LEAF},
    "layers": {"mlp": {"kernel": LEAF, "lora_a": LEAF, "lora_b": LEAF}, "norm": {"scale": LEAF}},
}


@pytest.mark.parametrize(
    ("rows", "trained"),
    [
        (((".*", 1e-2),), ["layers/mlp/lora_a", "layers/mlp/lora_b"]),
        ((("head/.*", 1e-2), (".*", None)), ["head/weight"]),
        ((("layers/.*", 1e-2), (".*", 1e-3)), ["layers/mlp/lora_a", "layers/mlp/lora_b"]),
        ((("head/.*", 1e-2), (".*", 1e-3)), ["head/weight", "layers/mlp/lora_a"]),
        (((".*/lora_a", 1e-2), ("(?!.*lora_).*", 1e-3), (".*", None)), ["head/weight"]),
    ],
)
def test_of_a_model_with_adapters_a_stage_trains_these_alone(rows, trained):
    """by hand: a pattern that matches adapters is no pattern of the base; another is."""
    stage = update.Stage(**ROW | {"parameters": rows})
    bound = update.bind_stage(stage, toy_policy(), ADAPTED)
    names = [n for n, moves in zip(trees.names(ADAPTED), bound.trained, strict=True) if moves]
    assert names[: len(trained)] == trained
    assert ("layers/mlp/kernel" in names) == ("(?!.*lora_).*" in dict(rows))


def test_high_rates_are_warned_of():
    """by hand: 1e6 of adam and 200 of sgd; 1e-2, a frozen row and 1.0 of sgd are usual."""
    stages = [
        update.Stage(**ROW | {"parameters": (("a", 1e6), ("b", 1e-2), (".*", None))}),
        update.Stage(**ROW | {"optimizer": "sgd", "parameters": (("a", 200.0), (".*", 1.0))}),
    ]
    first, second = update.rate_warnings(stages)
    assert "the learning rate of 'a' is 1e+06; adam usually has less than 0.1" in first
    assert "is 200; sgd usually has less than 100" in second


def test_rows_that_are_no_stages():
    """by hand: the row is quoted, with the way to set a field on the command line."""
    with pytest.raises(ValueError, match=r"stages\[0\] is \('all', 10\); rows are those of base"):
        update.read_stages((("all", 10),))
