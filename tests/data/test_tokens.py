"""By hand: ids of the character tokenizer, through AutoTokenizer; and every error."""

import json

import numpy as np
import pytest

from ntkrl.data import save_tokenizer
from ntkrl.data.prompts import PromptSet
from ntkrl.data.tokens import (
    decode_completions,
    encode_completions,
    encode_prompts,
    load_tokenizer,
)

# Digits are ids 2 to 11, then + 12, - 13, * 14, ( 15, ) 16, = 17; end 0, padding 1.
# The template closes each turn by the end token and a "+" stands for the assistant's start.
TEMPLATE = (
    "{% for m in messages %}{{ '+' if m['role'] == 'assistant' else '-' }}{{ m['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}+{% endif %}"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return path


@pytest.fixture
def tokenizer(directory):
    return load_tokenizer(directory)


def _set(*prompts, **columns):
    return PromptSet(prompts=prompts, columns=columns, source="rows.jsonl")


def _user(text):
    return [{"role": "user", "content": text}]


def _assistant(text):
    return [{"role": "assistant", "content": text}]


def _changed(directory, tmp_path, **settings):
    """A copy of the tokenizer with other settings; None removes one."""
    tokenizer_json = json.loads((directory / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json))
    config = json.loads((directory / "tokenizer_config.json").read_text()) | settings
    kept = {key: value for key, value in config.items() if value is not None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(kept))
    return tmp_path


def test_encode_standard_prompts(tokenizer):
    assert encode_prompts(tokenizer, _set("24=", "7+(10)*2-3"), 10) == [
        [4, 6, 17],
        [9, 12, 15, 3, 2, 16, 14, 4, 13, 5],
    ]


def test_no_special_tokens_are_added(directory, tmp_path):
    path = _changed(directory, tmp_path)
    content = json.loads((path / "tokenizer.json").read_text())
    # A post-processor such as Llama's, which writes a first token before every text.
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    (path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(path)
    assert tokenizer("24=")["input_ids"] == [0, 4, 6, 17]
    assert encode_prompts(tokenizer, _set("24="), 10) == [[4, 6, 17]]
    assert encode_completions(tokenizer, _set("24=", completion=["3"]), 10) == [[5, 0]]


def test_encode_conversational_prompts(tokenizer):
    tokenizer.chat_template = TEMPLATE
    assert encode_prompts(tokenizer, _set(_user("24=")), 10) == [[13, 4, 6, 17, 0, 12]]


def test_missing_chat_template(tokenizer):
    with pytest.raises(ValueError, match="no chat template. Put chat_template.jinja into"):
        encode_prompts(tokenizer, _set(_user("24=")), 10)


def test_refusing_chat_template_names_rows(tokenizer):
    tokenizer.chat_template = (
        "{% if messages[0]['content'] == '2' %}{{ raise_exception('no twos') }}{% endif %}1"
    )
    with pytest.raises(ValueError, match="(?s)template rejects 1 rows.*row 1, .*no twos"):
        encode_prompts(tokenizer, _set(_user("1"), _user("2")), 10)


def test_long_prompts_are_listed(tokenizer):
    with pytest.raises(ValueError, match="2 prompts are longer than 3 tokens") as caught:
        encode_prompts(tokenizer, _set("24=", "124=", "1", "10000="), 3)
    message = str(caught.value)
    assert "row 1: 4 tokens" in message and "row 3: 6 tokens" in message
    assert "row 0" not in message
    assert "Raise --config.data.max_prompt_tokens (the longest has 6)" in message


def test_at_most_ten_rows_are_listed(tokenizer):
    with pytest.raises(ValueError, match="and 2 more"):
        encode_prompts(tokenizer, _set(*["24="] * 12), 2)


def test_empty_encodings_are_listed(tokenizer):
    with pytest.raises(ValueError, match="(?s)1 prompts encode to nothing.*row 1: no tokens"):
        encode_prompts(tokenizer, _set("1", ""), 3)


def test_unknown_characters_are_never_dropped(tokenizer):
    with pytest.raises(ValueError, match="cannot encode the prompt of 1 rows") as caught:
        encode_prompts(tokenizer, _set("1", "2 4\n"), 9)
    assert r"row 1, '2 4\n'" in str(caught.value)


def test_completions_end_with_the_end_token(tokenizer):
    rows = _set("24=", "1=", completion=["3*8", ""])
    assert encode_completions(tokenizer, rows, 4) == [[5, 14, 10, 0], [0]]


def test_conversational_completions_are_what_follows_the_generation_prompt(tokenizer):
    tokenizer.chat_template = TEMPLATE
    rows = _set(_user("24="), completion=[_assistant("3*8")])
    # [5, 14, 10, 0, 0] if the template's own end token were not seen.
    assert encode_completions(tokenizer, rows, 4) == [[5, 14, 10, 0]]


def test_an_end_token_within_a_completion_does_not_close_it(tokenizer):
    tokenizer.chat_template = TEMPLATE.replace("{{ eos_token }}", "{{ eos_token }}1")
    rows = _set(_user("24="), completion=[_assistant("3")])
    assert encode_completions(tokenizer, rows, 9) == [[5, 0, 3, 0]]


def test_completion_that_cannot_be_told_from_its_prompt(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}=" + (
        "{% if add_generation_prompt %}+{% endif %}"
    )
    rows = _set(_user("1"), completion=[_assistant("2")])
    with pytest.raises(
        ValueError, match=r"(?s)cannot be separated.*row 0: '1=\+' is not a prefix of"
    ):
        encode_completions(tokenizer, rows, 9)


def test_bad_completions(tokenizer):
    with pytest.raises(ValueError, match="needs a column 'completion'; columns are: target"):
        encode_completions(tokenizer, _set("1=", target=[1]), 4)
    with pytest.raises(ValueError, match="(?s)every 'completion' must be text.*row 1: None"):
        encode_completions(tokenizer, _set("1=", "2=", completion=["1", None]), 4)
    with pytest.raises(ValueError, match="(?s)longer than 3 tokens.*row 0: 4 tokens.*max_completi"):
        encode_completions(tokenizer, _set("24=", completion=["3*8"]), 3)


def test_decode_returns_masked_tokens(tokenizer):
    tokens = np.asarray([[1, 4, 17, 5, 14, 10, 0], [4, 6, 17, 3, 1, 1, 1]])
    mask = np.asarray([[1, 1, 1, 1], [1, 0, 0, 0]], bool)
    texts, ids = decode_completions(tokenizer, tokens, mask, eos_id=0)
    assert texts == ["3*8", "1"]
    assert ids == [[5, 14, 10, 0], [3]]
    # An end token the tokenizer does not call special is left out of the text all the same.
    assert decode_completions(tokenizer, tokens, mask, eos_id=10)[0] == ["3*", "1"]


def test_decode_checks_shapes(tokenizer):
    with pytest.raises(ValueError, match=r"tokens \(1, 2\) and completion_mask \(1, 3\)"):
        decode_completions(tokenizer, np.ones((1, 2), int), np.ones((1, 3), bool), 0)


def test_missing_pad_token_becomes_the_end_token(directory, tmp_path):
    tokenizer = load_tokenizer(_changed(directory, tmp_path, pad_token=None))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0


def test_missing_end_token(directory, tmp_path):
    with pytest.raises(ValueError, match='no end-of-sequence token.*set "eos_token"'):
        load_tokenizer(_changed(directory, tmp_path, eos_token=None))


def test_missing_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="absent is not a directory; give the directory"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(ValueError, match="has no tokenizer; expected tokenizer.json and"):
        load_tokenizer(tmp_path)


def test_corrupt_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="the tokenizer does not load .*must be complete"):
        load_tokenizer(tmp_path)


def test_remote_code_is_never_run(directory, tmp_path):
    path = _changed(
        directory, tmp_path, tokenizer_class="Own", auto_map={"AutoTokenizer": [None, "own.Own"]}
    )
    (path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    try:
        load_tokenizer(path)  # refused, or loaded from tokenizer.json alone
    except ValueError as error:
        assert "does not load" in str(error)
    assert not (tmp_path / "ran").exists()
