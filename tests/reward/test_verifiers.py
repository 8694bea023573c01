"""By hand: every built-in reward function, at its defaults and at its edges."""

import importlib.util
import math

import numpy as np
import pytest

from ntkrl.reward import RewardSet, open_function, verifiers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so it is 5.\n#### 42", "42"),
        ("first #### 1 then #### 2", "2"),
        (r"thus \boxed{\frac{1}{2}} holds", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2}", "2"),
        ("  the   cat. ", "the cat"),
        (r"unclosed \boxed{3", r"unclosed \boxed{3"),
    ],
)
def test_final_answer(text, answer):
    assert verifiers.final_answer(text) == answer


def test_exact_match_in_both_forms():
    texts = ["#### 7", r"\boxed{8}", "nine"]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    for completions in (texts, messages):
        assert verifiers.exact_match(completions, ["7", 7, "Nine"]) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>a\nb</think>c", 1.0),
        ("<think></think>", 1.0),
        ("a<think>b</think>", 0.0),
        ("<think>a<think>b</think>", 0.0),
        ("<think>a", 0.0),
    ],
)
def test_think_format(text, reward):
    assert verifiers.think_format([text]) == [reward]


def test_soft_overlong():
    # budget 10, soft from 6 on: 6 is free, 8 costs half, 10 and more cost 1
    ids = [[0] * n for n in (1, 6, 8, 10, 12)]
    assert verifiers.soft_overlong(ids, 10, 4) == [0.0, 0.0, -0.5, -1.0, -1.0]


def test_cosine_length():
    found = verifiers.CosineLength()(["7", "7" + " " * 999, "8", "8" * 1000], ["7", "7", "7", "7"])
    assert found == pytest.approx(
        [0.5 + 0.25 * (1 + math.cos(math.pi / 1000)), 0.5, -1.0, -0.5], abs=1e-5
    )
    # half way, half way between
    assert verifiers.CosineLength(max_len=10)(["7" * 5], ["7" * 5]) == pytest.approx([0.75])


def test_repetition():
    texts = ["a b c d", "a b c a b c", "a b", "A a a a"]
    # trigrams: 2 of 2; abc bca cab abc: 3 of 4; none; aaa aaa: 1 of 2
    assert verifiers.repetition(texts) == pytest.approx([0.0, -0.25, 0.0, -0.5])
    assert verifiers.repetition(texts, 1, -2.0)[1] == pytest.approx(-1.0)


def test_options_of_a_config():
    """law: options replace defaults; unknown ones, and ones nobody takes, are refused."""
    function = open_function("repetition", 1.0, {"ngram_size": 1, "max_penalty": -2.0})
    result = RewardSet((function,))(["p"], ["a a"], [[1, 1]], {})
    assert result.rewards[0] == -1.0
    with pytest.raises(ValueError, match=r"reward.options.repetition has no n"):
        open_function("repetition", 1.0, {"n": 1})
    with pytest.raises(ValueError, match="reward.options: 'x.py:y' takes none"):
        open_function("x.py:y", 1.0, {"n": 1})


def test_math_verify_in_a_process():
    """oracle: known equalities; without the extra, the message says what to install."""
    function = open_function("math_verify", 60.0, {})
    made = RewardSet((function,))
    texts = [r"so \boxed{\frac{2}{4}}", r"\boxed{3}", r"\boxed{x}"]
    columns = {"solution": ["$0.5$", "$4$", "$x$"]}
    if importlib.util.find_spec("math_verify") is None:
        with pytest.raises(ValueError, match="needs the extra `math`"):
            made(["p"] * 3, texts, [[1]] * 3, columns)
        return
    np.testing.assert_array_equal(made(["p"] * 3, texts, [[1]] * 3, columns).rewards, [1, 0, 1])
