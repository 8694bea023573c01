"""By hand: every built-in reward function, at its defaults and at its edges."""

import ast
import importlib.util
import math
import operator
import random
import time

import numpy as np
import pytest

from ntkrl.reward import (
    RewardSet,
    built_in,
    evaluate,
    expression_score,
    fit_budget,
    open_function,
)


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
    assert built_in.final_answer(text) == answer


def test_exact_match_in_both_forms():
    texts = ["#### 7", r"\boxed{8}", "nine"]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    for completions in (texts, messages):
        assert built_in.exact_match(completions, ["7", 7, "Nine"]) == [1.0, 0.0, 0.0]


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
    assert built_in.think_format([text]) == [reward]


def test_soft_overlong():
    # budget 10, soft from 6 on: 6 is free, 8 costs half, 10 and more cost 1
    ids = [[0] * n for n in (1, 6, 8, 10, 12)]
    assert built_in.soft_overlong(ids, 10, 4) == [0.0, 0.0, -0.5, -1.0, -1.0]


def test_cosine_length():
    result = built_in.CosineLength()(["7", "7" + " " * 999, "8", "8" * 1000], ["7", "7", "7", "7"])
    assert result == pytest.approx(
        [0.5 + 0.25 * (1 + math.cos(math.pi / 1000)), 0.5, -1.0, -0.5], abs=1e-5
    )
    # half way, half way between
    assert built_in.CosineLength(max_len=10)(["7" * 5], ["7" * 5]) == pytest.approx([0.75])


def test_repetition():
    texts = ["a b c d", "a b c a b c", "a b", "A a a a"]
    # trigrams: 2 of 2; abc bca cab abc: 3 of 4; none; aaa aaa: 1 of 2
    assert built_in.repetition(texts) == pytest.approx([0.0, -0.25, 0.0, -0.5])
    assert built_in.repetition(texts, 1, -2.0)[1] == pytest.approx(-1.0)


def test_options_of_a_config():
    """law: options replace defaults; unknown ones, and ones nobody takes, are refused."""
    function = open_function("repetition", 1.0, {"ngram_size": 1, "max_penalty": -2.0})
    result = RewardSet((function,))(["p"], ["a a"], [[1, 1]], {})
    assert result.rewards[0] == -1.0
    with pytest.raises(ValueError, match=r"reward.options.repetition has no n"):
        open_function("repetition", 1.0, {"n": 1})
    with pytest.raises(ValueError, match="reward.options: 'x.py:y' takes none"):
        open_function("x.py:y", 1.0, {"n": 1})


def math_rewards(texts, solutions, **options):
    """Reward completions by math_verify."""
    pytest.importorskip("math_verify")
    function = open_function("math_verify", 60.0, options)
    count = len(texts)
    result = RewardSet((function,))(["p"] * count, texts, [[1]] * count, {"solution": solutions})
    function.call.close()
    return result


def test_math_verify_in_a_process():
    """oracle: known equalities; without the extra, the message names it."""
    texts = [r"so \boxed{\frac{2}{4}}", r"\boxed{3}", r"\boxed{x}"]
    solutions = ["$0.5$", "$4$", "$x$"]
    if importlib.util.find_spec("math_verify") is None:
        with pytest.raises(ValueError, match="needs the extra `math`"):
            open_function("math_verify", 60.0, {})
        return
    result = math_rewards(texts, solutions)
    np.testing.assert_array_equal(result.rewards, [1, 0, 1])
    assert result.logged == {"math_verify/slow_rows": 0, "math_verify/failed_rows": 0}


def test_slow_rows_of_math_verify():
    """law: rows that take forever get the default and are counted; the others their reward."""
    tower = r"9^{9^{9^{9}}}"
    texts = [rf"\boxed{{{tower}}}", r"\boxed{1}", rf"\boxed{{{tower}}}", r"\boxed{2}"]
    result = math_rewards(texts, ["$1$"] * 4, row_seconds=1.0, default=-0.5)
    np.testing.assert_array_equal(result.rewards, [-0.5, 1, -0.5, 0])
    assert result.logged == {"math_verify/slow_rows": 2, "math_verify/failed_rows": 0}


ODD_TEXTS = {
    "empty": "",
    "null bytes": "\x00" * 50,
    "lone surrogates": "\ud800\udfff",
    "right-to-left marks": "\u202e#### 1\u202c",
    "huge exponent": r"\boxed{10^{10^{10^{10}}}}",
    "huge factorial": r"\boxed{(10^{9})!}",
    "digits": "9" * 100_000,
    "nested braces": r"\boxed" + "{" * 5_000 + "1" + "}" * 5_000,
    "nested fractions": r"\boxed{" + r"\frac{1}{" * 500 + "2" + "}" * 501,
    "nested parentheses": r"$" + "(" * 3_000 + "1" + ")" * 3_000 + "$",
    "open": r"\boxed{" * 2_000,
    "thoughts": "<think>" * 100_000,
    "megabyte": "a b " * 250_000,
    "megabyte of a word": "x" * 1_000_000,
    "new lines": "\n" * 1_000_000,
}


@pytest.mark.parametrize(
    "name", ["exact_match", "think_format", "cosine_length", "repetition", "expressions"]
)
def test_odd_texts(name):
    """law: every text gets a finite number, in time that grows as its length."""
    texts = list(ODD_TEXTS.values())
    columns = {"answer": ["1"] * len(texts), "target": [1] * len(texts)}
    made = RewardSet((open_function(name, 60.0, {}),))
    began = time.monotonic()
    result = made(["p"] * len(texts), texts, [[1]] * len(texts), columns)
    assert np.isfinite(result.rewards).all() and time.monotonic() - began < 10


def test_odd_texts_of_math_verify():
    """law: every text gets 0, and a row after them its reward."""
    texts = [*ODD_TEXTS.values(), r"\boxed{3}"]
    result = math_rewards(texts, ["$3$"] * len(texts), row_seconds=1.0)
    np.testing.assert_array_equal(result.rewards, [0.0] * len(ODD_TEXTS) + [1.0])


@pytest.mark.parametrize("budget", [1, 8, 256, 512, 2048])
def test_lengths_follow_the_budget(budget):
    """by hand: the penalty is 0 before its slope and −1 at the budget; the cosine ends there."""
    options = fit_budget(
        {"soft_overlong": {"max_completion_len": None, "soft_punish_cache": None}},
        ["soft_overlong", "cosine_length"],
        budget,
    )
    slope = min(128, max(budget // 2, 1))
    assert options["soft_overlong"] == {"max_completion_len": budget, "soft_punish_cache": slope}
    overlong = open_function("soft_overlong", 1.0, options["soft_overlong"]).call
    assert overlong(completion_ids=[[0] * (budget - slope), [0] * budget]) == [0.0, -1.0]
    cosine = open_function("cosine_length", 1.0, options["cosine_length"]).call
    rewards = cosine(["7", "8"], ["7", "7"], [[0] * budget, [0] * budget])
    assert rewards == pytest.approx([0.5, -0.5])
    assert cosine(["7"], ["7"], [[]]) == pytest.approx([1.0])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("soft_overlong", {"max_completion_len": 513}, "must be 1 to rollout.max_completion_tok"),
        ("soft_overlong", {"max_completion_len": 0}, "must be 1 to .* = 512, not 0"),
        ("soft_overlong", {"soft_punish_cache": 513}, "must be 1 to max_completion_len = 512"),
        ("soft_overlong", {"soft_punish_cache": 0}, "not 0; None is 128, or half of a shorter"),
        ("cosine_length", {"max_tokens": 513}, "max_tokens must be 1 to .* not 513"),
        ("cosine_length", {"max_tokens": 5, "max_len": 5}, "or max_tokens, not both"),
        ("cosine_length", {"max_len": 0}, "max_len must be ≥ 1, not 0"),
    ],
)
def test_lengths_that_contradict_the_budget(name, options, message):
    """law: they are refused if the function is in use; lengths within the budget stay."""
    with pytest.raises(ValueError, match=message):
        fit_budget({name: options}, [name], 512)
    assert fit_budget({name: options}, ["repetition"], 512) == {name: options}
    kept = fit_budget({"soft_overlong": {"max_completion_len": 100}}, ["soft_overlong"], 512)
    assert kept["soft_overlong"] == {"max_completion_len": 100, "soft_punish_cache": 50}


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def _oracle(node):
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](_oracle(node.left), _oracle(node.right))
    return node.value


def _random_expression(generator, depth):
    if depth == 0 or generator.random() < 0.2:
        return str(generator.randint(0, 999))
    left, right = (_random_expression(generator, depth - 1) for _ in range(2))
    text = f"{left}{generator.choice('+-*')}{right}"
    return f"({text})" if generator.random() < 0.4 else text


def test_values_agree_with_python():
    generator = random.Random(0)
    texts = [_random_expression(generator, generator.randint(0, 4)) for _ in range(3000)]
    short = [text for text in texts if len(text) <= 64]
    assert len(short) > 2500 and sum("(" in text for text in short) > 500
    for text in short:
        assert evaluate(text) == _oracle(ast.parse(text, mode="eval").body), text


@pytest.mark.filterwarnings("ignore::SyntaxWarning")  # Python's, about 1(9)
def test_random_strings_agree_with_python_on_what_is_an_expression():
    generator = random.Random(1)
    values = []
    for _ in range(20_000):
        text = "".join(generator.choices("19+-*()= ", k=generator.randint(1, 6)))
        try:
            tree = ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError):
            tree = None
        nodes = [] if tree is None else list(ast.walk(tree))
        allowed = (ast.BinOp, ast.Constant, ast.Add, ast.Sub, ast.Mult)
        # Python reads signs, powers, calls and spaces too; the grammar does not.
        valid = tree is not None and " " not in text and all(isinstance(n, allowed) for n in nodes)
        assert evaluate(text) == (_oracle(tree) if valid else None), text
        values.append(valid)
    assert 500 < sum(values) < len(values)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "()",
        "3**2",
        "3//1",
        "3/1",
        "-3",
        "+3",
        "3-",
        "3+-1",
        "3 + 1",
        "3+1\n",
        "24=24",
        "(3+1",
        "3+1)",
        "(3)(4)",
        "2(3)",
        "1_0",
        "0x10",
        "1e3",
        "1.0",
        "²",
        "\u0663",  # an Arabic three, which int() would read
        "__import__('os')",
        "9" * 100,
        "1234567",
        "(" * 1000 + "1" + ")" * 1000,
        "(" * 17 + "1" + ")" * 17,
        "1+" * 32 + "1",
    ],
)
def test_not_an_expression(text):
    assert evaluate(text) is None


def test_caps_are_met_exactly():
    assert evaluate("(" * 16 + "1" + ")" * 16) == 1
    assert evaluate("(1)+" * 15 + "1+11") == 27  # 64 characters; nesting counts depth, not pairs
    assert evaluate("999999") == 999_999
    assert evaluate("007") == 7


def test_precedence_by_hand():
    assert evaluate("40-16-4") == 20  # 28 if minus took its right side first
    assert evaluate("7+2*9") == 25
    assert evaluate("(2+6)*4") == 32
    assert evaluate("2-3") == -1


def test_score_needs_the_target_and_an_operator():
    completions = ["3*8", "24", "(24)", "24+0", "3*9", "oops", "0-24", ""]
    rewards = expression_score(
        prompts=["24="] * 8, completions=completions, completion_ids=[[]] * 8, target=[24] * 8
    )
    assert rewards == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_score_reads_messages_and_passes_over_absent_targets():
    completions = [[{"role": "assistant", "content": "3*8"}]] * 2
    columns = {"prompts": ["", ""], "completion_ids": [[], []], "extra": [1, 2]}
    assert expression_score(completions=completions, target=[24, None], **columns) == [1.0, None]


def test_score_refuses_targets_that_are_no_integers():
    with pytest.raises(ValueError, match=r"must be integers .*\n  row 1: '24'\n  row 2: 24\.0"):
        expression_score([""] * 3, ["3*8"] * 3, [[]] * 3, target=[24, "24", 24.0])
