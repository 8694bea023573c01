"""Law and golden: completions equal their targets, splits are disjoint, text survives tokens."""

import ast
import collections
import json
import operator

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from ntkrl.data.arithmetic_task import (
    characters,
    expression_prompts,
    save_tokenizer,
    solutions,
    supervised_set,
    targets,
)

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
NAMES = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}


def _value(node):
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    assert type(node.value) is int and 0 <= node.value <= 999
    return node.value


def _form(node):
    if isinstance(node, ast.Constant):
        return "n"
    return f"({_form(node.left)}{NAMES[type(node.op)]}{_form(node.right)})"


def test_splits_are_disjoint_and_cover():
    train, test = targets("train"), targets("test")
    assert (len(train), len(test)) == (30, 10)
    assert sorted(train + test) == list(range(10, 50))
    assert list(test) == sorted(test)


def test_held_out_targets_stay():
    # A changed list makes old and new runs incomparable: change it only with the task's name.
    assert targets("test") == (11, 13, 16, 17, 28, 36, 38, 40, 44, 49)


def test_unknown_split():
    with pytest.raises(ValueError, match="split is 'valid'; allowed are 'train', 'test'"):
        targets("valid")


def test_prompts():
    rows = expression_prompts("test")
    assert rows.prompts[:2] == ("11=", "13=")
    assert rows.columns == {"target": list(targets("test"))}
    assert not rows.conversational


def test_supervised_completions():
    """Eight in ten are right expressions, of every form, many for each target; the rest lazy."""
    rows = supervised_set(4000, seed=0)
    right = collections.defaultdict(set)
    forms = collections.Counter()
    for prompt, target, completion in zip(
        rows.prompts, rows.columns["target"], rows.columns["completion"], strict=True
    ):
        tree = ast.parse(completion, mode="eval").body
        assert prompt == f"{target}="
        assert _value(tree) == target, completion
        assert set(completion) <= set(characters()) - {"="}
        forms[_form(tree)] += 1
        if completion != str(target):
            right[target].add(completion)
    # 4000 draws: four standard errors are 0.026
    assert abs(forms.pop("n") / 4000 - 0.2) < 0.026
    assert set(right) == set(range(10, 50))  # both splits: RL alone holds targets out
    assert min(len(completions) for completions in right.values()) >= 5  # 49 has nine in all
    sums = {"((n+n)+n)", "(((n+n)+n)+n)", "((((n+n)+n)+n)+n)", "(((n+n)+n)-n)"}
    assert set(forms) == sums | {"(n*n)", "((n*n)+n)"}
    assert min(forms.values()) >= 100


def test_solutions():
    """By hand: 49 is 7*7, and 9*5+4 but not a sum of three digits."""
    forms = solutions(49)
    assert ("7*7",) in forms
    products = next(form for form in forms if "9*5+4" in form)
    assert set(products) == {"5*8+9", "8*5+9", "5*9+4", "9*5+4", "6*7+7", "7*6+7", "6*8+1", "8*6+1"}
    assert not any("-" not in text and text.count("+") == 2 for form in forms for text in form)


def test_supervised_rows_are_a_function_of_the_seed():
    assert supervised_set(20, seed=4) == supervised_set(20, seed=4)
    assert supervised_set(20, seed=4) != supervised_set(20, seed=5)


def test_supervised_arguments():
    with pytest.raises(ValueError, match="size is 0 and seed is 0; size must be ≥ 1"):
        supervised_set(0, 0)


@pytest.mark.parametrize("model_type", [None, "gpt_neox"])
def test_tokenizer_round_trip(tmp_path, model_type):
    save_tokenizer(tmp_path / "new")
    if model_type is not None:  # as beside an exported model, whose family has its own class
        (tmp_path / "new" / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new", trust_remote_code=False)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 0)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|padding|>", 1)
    assert len(tokenizer) == 2 + len(characters()) == 18
    assert tokenizer("".join(characters()))["input_ids"] == list(range(2, 18))
    # The file alone knows the special tokens too, for readers without transformers.
    alone = Tokenizer.from_file(str(tmp_path / "new" / "tokenizer.json"))
    assert alone.encode("1<|endoftext|>").ids == [3, 0]
    assert alone.decode([1, 3, 0]) == "1"
    rows = supervised_set(200, seed=1)
    for prompt, completion in zip(rows.prompts, rows.columns["completion"], strict=True):
        ids = tokenizer(prompt + completion)["input_ids"]
        assert len(ids) == len(prompt + completion)
        assert tokenizer.decode(ids) == prompt + completion
        assert tokenizer.decode([1, *ids, 0, 1], skip_special_tokens=True) == prompt + completion
