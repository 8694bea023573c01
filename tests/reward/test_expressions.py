"""Oracle and by hand: the parser against Python's own, and what is no expression."""

import ast
import operator
import random

import pytest

from ntkrl.reward import evaluate, expression_score

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
    given = {"prompts": ["", ""], "completion_ids": [[], []], "extra": [1, 2]}
    assert expression_score(completions=completions, target=[24, None], **given) == [1.0, None]


def test_score_refuses_targets_that_are_no_integers():
    with pytest.raises(ValueError, match="holds integers .* but row 1: '24'; row 2: 24.0"):
        expression_score([""] * 3, ["3*8"] * 3, [[]] * 3, target=[24, "24", 24.0])
