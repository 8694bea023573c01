"""Law and golden: completions equal their targets, splits are disjoint, text survives tokens."""

import ast
import collections
import json
import operator

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from ntkrl.data.expressions import (
    characters,
    prompt_set,
    save_tokenizer,
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
    assert (len(train), len(test)) == (150, 40)
    assert sorted(train + test) == list(range(10, 200))
    assert list(test) == sorted(test)


def test_held_out_targets_stay():
    # A changed list makes old and new runs incomparable: change it only with the task's name.
    assert targets("test")[:12] == (20, 22, 23, 31, 40, 46, 48, 49, 80, 82, 83, 86)
    assert sum(targets("test")) == 4528


def test_unknown_split():
    with pytest.raises(ValueError, match="split is 'valid'; allowed are 'train', 'test'"):
        targets("valid")


def test_prompts():
    rows = prompt_set("test")
    assert rows.prompts[:2] == ("20=", "22=")
    assert rows.columns == {"target": list(targets("test"))}
    assert not rows.conversational


def test_supervised_completions_equal_their_targets():
    rows = supervised_set(4000, seed=0)
    seen = collections.defaultdict(set)
    forms = collections.Counter()
    for prompt, target, completion in zip(
        rows.prompts, rows.columns["target"], rows.columns["completion"], strict=True
    ):
        tree = ast.parse(completion, mode="eval").body
        assert prompt == f"{target}="
        assert _value(tree) == target, completion
        assert set(completion) <= set(characters()) - {"="}
        seen[target].add(completion)
        forms[_form(tree)] += 1
    assert set(seen) == set(targets("train"))
    # 4000 rows on 150 targets are 26 each; primes keep five of the seven forms.
    assert sum(len(completions) >= 5 for completions in seen.values()) >= 145
    expected = {"(n+n)", "(n-n)", "(n*n)", "((n+n)+n)", "((n*n)+n)", "((n*n)-n)", "((n+n)*n)"}
    assert set(forms) == expected
    assert min(forms.values()) >= 300


def test_supervised_rows_are_a_function_of_the_seed():
    assert supervised_set(20, seed=4) == supervised_set(20, seed=4)
    assert supervised_set(20, seed=4) != supervised_set(20, seed=5)


def test_supervised_arguments():
    with pytest.raises(ValueError, match="size is 0 and seed is 0; size is 1 or more"):
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
