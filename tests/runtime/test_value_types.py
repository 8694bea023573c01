"""By hand: values of settings that are not of their type, and what is said of them."""

import dataclasses
import math

import pytest

from ntkrl import runtime
from ntkrl.runtime.value_types import flag_problem
from ntkrl.settings import read_settings


@dataclasses.dataclass(frozen=True)
class Section:
    """Fields of every type that settings have."""

    steps: int = 1
    rate: float | None = None
    name: str = "x"
    packing: bool = False
    weights: tuple[float, ...] | None = None
    rows: tuple[tuple[str, float | None], ...] = ()
    options: dict[str, int] = dataclasses.field(default_factory=dict)


WRONG = {
    "text for a number": ({"steps": "2"}, "must be a whole number, not '2' (text: leave out the"),
    "a fraction": ({"steps": 2.0}, "s.steps must be a whole number, not 2.0"),
    "a bool": ({"steps": True}, "s.steps must be a whole number, not True"),
    "no value": ({"steps": None}, "s.steps must not be None"),
    "no number": ({"rate": math.nan}, "s.rate must be a number or None, not nan"),
    "a number": ({"name": 3}, "s.name must be text, not 3"),
    "a word": ({"packing": "yes"}, "s.packing must be True or False, not 'yes'"),
    "one for many": (
        {"weights": 1.0},
        "s.weights must be a tuple of numbers or None, not 1.0",
    ),
    "a rate of text": (
        {"rows": ((".*", "1e-6"),)},
        "s.rows[0][1] must be a number or None, not '1e-6' (text: leave out the quotes)",
    ),
    "a row without its comma": (
        {"rows": (".*", 1e-6)},
        "s.rows must be a tuple of tuples (text, a number or None), not ('.*', 1e-06); one row is "
        "written (('.*', 1e-06),)",
    ),
    "a list for a mapping": ({"options": [1]}, "s.options must be a mapping, not [1]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_values_of_another_type(case):
    """by hand: the innermost value that does not fit, and the type that does."""
    values, message = WRONG[case]
    with pytest.raises(ValueError) as error:
        runtime.parse_section(Section, values, "s")
    assert message in str(error.value)


def test_values_of_the_right_type():
    """by hand: whole numbers for numbers, lists for tuples, None where it is a choice."""
    values = {"steps": 3, "rate": 1, "weights": [1, 2.5], "rows": [["a", None], ("b", 1e-3)]}
    assert runtime.parse_section(Section, values, "s").weights == [1, 2.5]


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("abc", int, "a whole number, such as 512"),
        ("1.5", int, "a whole number"),
        ("hot", float, "a number"),
        ("yes", bool, "True or False"),
        ("(1,2", tuple, "a tuple in Python's syntax and in quotes"),
        ("0x10", int, None),
        ("1e-6", float, None),
        ("T", bool, None),
        ("(1,2)", tuple, None),
        ("word", tuple, None),
        ("anything", str, None),
    ],
)
def test_texts_of_flags(text, kind, expected):
    """by hand: the flag as it was written and the type that it needs."""
    problem = flag_problem("--config.x", text, kind, 512)
    if expected is None:
        assert problem is None
    else:
        assert problem is not None and problem.startswith(f"--config.x={text}: expected {expected}")


def test_all_wrong_flags_are_listed():
    """by hand: of a command line with two wrong values both are named."""
    words = ["--config=rl", "--config.rollout.max_completion_tokens=abc", "--config.seed=x"]
    with pytest.raises(ValueError) as error:
        runtime.read_config(words)
    assert "max_completion_tokens=abc: expected" in str(error.value)
    assert "--config.seed=x: expected a whole number" in str(error.value)


def test_a_negative_seed():
    """by hand: refused before anything is loaded."""
    words = ["--config=rl", "--config.model.path=x", "--config.reward.function=expressions"]
    with pytest.raises(ValueError, match=r"seed must be ≥ 0 and below .*, not -1"):
        read_settings(runtime.read_config([*words, "--config.seed=-1"]))


def test_configs_that_cannot_be_meant(tmp_path):
    """by hand: two configs, and one that does not start from the defaults."""
    with pytest.raises(ValueError, match="--config is there 2 times: rl, cfrl; give one"):
        runtime.read_config(["--config=rl", "--config=cfrl"])
    (tmp_path / "mine.py").write_text("def get_config():\n    return {'seed': 1}\n")
    with pytest.raises(ValueError, match=r"mine.py has no run_dir; start from the defaults"):
        runtime.read_config([f"--config={tmp_path}/mine.py"])
