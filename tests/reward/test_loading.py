"""Story: a user's file is loaded and called, with every kind of defect."""

import textwrap

import numpy as np
import pytest

from ntkrl.reward import RewardSet, load_function


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write_file(content, name="my_rewards.py"):
        (tmp_path / name).write_text(textwrap.dedent(content))

    return write_file


def test_built_in():
    function = load_function("expressions", weight=2.0)
    assert (function.name, function.weight) == ("expressions", 2.0)
    rewards = RewardSet((function,))
    result = rewards(["24=", "24="], ["3*8", "24"], [[], []], {"target": [24, 24]})
    np.testing.assert_array_equal(result.rewards, [2.0, 0.0])
    with pytest.raises(ValueError, match="expressions requires 'target', which is not a column"):
        rewards.check_columns(())


def test_functions_of_one_file_share_one_module(write):
    write(
        """
        from __future__ import annotations
        import dataclasses

        @dataclasses.dataclass
        class Counter:
            calls: int = 0

        COUNTER = Counter()

        def score(completions, **kwargs):
            COUNTER.calls += 1
            return [COUNTER.calls for _ in completions]

        def other(completions):
            COUNTER.calls += 1
            return [COUNTER.calls for _ in completions]
        """
    )
    functions = (load_function("my_rewards.py:score"), load_function("./my_rewards.py:other", 10.0))
    assert [f.name for f in functions] == ["score", "other"]
    # 1 + 10 * 2; were the file run twice, 1 + 10 * 1.
    np.testing.assert_array_equal(RewardSet(functions)(["p"], ["a"], [[]], {}).rewards, [21])


def test_raising_function_names_its_line(write):
    write(
        """\
        import json

        def score(completions):
            return [json.loads(text) for text in completions]
        """
    )
    rewards = RewardSet((load_function("./my_rewards.py:score"),))
    message = r"./my_rewards.py:score raised JSONDecodeError: .* at ./my_rewards.py:4\."
    with pytest.raises(ValueError, match=message):  # not the line inside json
        rewards(["p"], ["{"], [[]], {})


def test_bad_results_name_the_file(write):
    write("def score(completions): return [float('nan')]\n")
    rewards = RewardSet((load_function("my_rewards.py:score"),))
    with pytest.raises(ValueError, match="(?s)reward function my_rewards.py:score returned.*row 0"):
        rewards(["p"], ["a"], [[]], {})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("expresions", "'expresions' is not a reward function; did you mean 'expressions'"),
        ("my_rewards.py", "is not a reward function. Allowed is expressions, exact_match"),
        ("my_rewards:score", "is not a reward function"),
        ("my_rewards.py:", "is not a reward function"),
        ("my_reward.py:score", r"my_reward.py does not exist; did you mean 'my_rewards.py'\?"),
        ("gone/x.py:score", "gone/x.py does not exist. Paths are relative to the working dir"),
        ("my_rewards.py:scor", r"has no 'scor'; did you mean 'score'\? It has: score, other"),
        ("my_rewards.py:LIMIT", "my_rewards.py:LIMIT is int, not a function"),
        ("my_rewards.py:other", "takes x by position only"),
        ("nothing.py:score", "has no 'score'. It has: no functions"),
        ("wrong.py:score", r"wrong.py does not run: SyntaxError: .* at wrong.py:2\."),
        ("lacking.py:score", r"ModuleNotFoundError: .* at lacking.py:2\. Install it, or add"),
        ("failing.py:score", r"failing.py does not run: ZeroDivisionError: .* at failing.py:1\."),
    ],
)
def test_what_cannot_be_loaded(write, spec, message):
    write("LIMIT = 3\ndef score(completions): return []\ndef other(x, /): return []\n")
    write("", "nothing.py")
    write("def score(completions):\n    return [\n", "wrong.py")
    write("\nimport a_module_nobody_has\n", "lacking.py")
    write("1 / 0\n", "failing.py")
    with pytest.raises(ValueError, match=message):
        load_function(spec)


def test_a_file_that_failed_is_read_again(write):
    write("1 / 0\n")
    with pytest.raises(ValueError, match="does not run"):
        load_function("my_rewards.py:score")
    write("def score(completions): return [1.0]\n")
    assert load_function("my_rewards.py:score").name == "score"
