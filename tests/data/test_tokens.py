"""By hand: ids of the character tokenizer, through AutoTokenizer; and every error."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from ntkrl.data import join, read_set, save_tokenizer, take, turn_end_id
from ntkrl.data.arithmetic_task import END, PADDING
from ntkrl.data.prompts import PromptSet
from ntkrl.data.tokens import (
    decode_completions,
    encode_completions,
    encode_plain,
    encode_prompts,
    encode_texts,
    load_tokenizer,
)

# Digits are ids 2 to 11, then + 12, - 13, * 14, ( 15, ) 16, = 17; end 0, padding 1.
# The template closes each turn by the end token and a "+" stands for the assistant's start.
TEMPLATE = (
    "{% for m in messages %}{{ '+' if m['role'] == 'assistant' else '-' }}{{ m['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}+{% endif %}"
)


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


def _with_start_token(directory, tmp_path, end=False):
    """A copy whose tokenizer writes token 1 before every text, as Llama's writes its BOS."""
    path = _changed(directory, tmp_path)
    content = json.loads((path / "tokenizer.json").read_text())
    first, last = ({"SpecialToken": {"id": name, "type_id": 0}} for name in (PADDING, END))
    text = {"Sequence": {"id": "A", "type_id": 0}}
    names = {
        name: {"id": name, "ids": [i], "tokens": [name]} for i, name in enumerate((END, PADDING))
    }
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, text, *([last] if end else [])],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": names,
    }
    (path / "tokenizer.json").write_text(json.dumps(content))
    return load_tokenizer(path)


@pytest.mark.parametrize("end", [False, True])
def test_texts_begin_with_the_tokenizers_start_token_once(directory, tmp_path, end):
    tokenizer = _with_start_token(directory, tmp_path, end)
    assert tokenizer("24=")["input_ids"] == [1, 4, 6, 17, *([0] if end else [])]
    # an end token that the tokenizer appends would end the prompt before its completion
    assert encode_prompts(tokenizer, _set("24=", f"{PADDING}1"), 10) == [[1, 4, 6, 17], [1, 3]]
    assert encode_completions(tokenizer, _set("24=", completion=["3"]), 10) == [[5, 0]]
    tokenizer.chat_template = PADDING + TEMPLATE  # writes the start token itself
    assert encode_prompts(tokenizer, _set(_user("24=")), 10) == [[1, 13, 4, 6, 17, 0, 12]]
    rows = _set(_user("24="), completion=[_assistant("3")])
    assert encode_completions(tokenizer, rows, 4) == [[5, 0]]


@pytest.fixture
def sentencepiece(tmp_path):
    """A tokenizer that writes a space before a text and merges it with the next character."""
    vocabulary = {
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        "▁": 3,
        "a": 4,
        "b": 5,
        ":": 6,
        "▁b": 7,
        "<0x0A>": 8,
    }
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "b")], byte_fallback=True, unk_token="<unk>"))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    return load_tokenizer(tmp_path)


def test_completions_are_encoded_after_their_prompts(sentencepiece):
    rows = _set("a:", "a: ", "a:", completion=["b", "b", " b"])
    # TRL trains on "a:" + "▁b" of the second row, and samples from "a:▁": here both see "a:▁"
    prompts = [[1, 3, 4, 6], [1, 3, 4, 6, 3], [1, 3, 4, 6]]
    completions = [[5, 2], [5, 2], [7, 2]]
    assert encode_prompts(sentencepiece, rows, 9) == prompts
    assert encode_completions(sentencepiece, rows, 9) == completions
    texts = [
        sentencepiece.decode(p + c, skip_special_tokens=True)
        for p, c in zip(prompts, completions, strict=True)
    ]
    assert texts == ["a:b", "a: b", "a: b"]
    assert sentencepiece("b", add_special_tokens=False)["input_ids"] == [7]  # encoded apart


def test_completion_that_does_not_join_is_refused(sentencepiece):
    sentencepiece.backend_tokenizer.normalizer = normalizers.Replace("a:b", "b")
    with pytest.raises(ValueError, match=r"(?s)tokens merge across the seam\s*row 0: 'a:' \+ 'b'"):
        encode_completions(sentencepiece, _set("a:", completion=["b"]), 9)


def test_a_turn_that_ends_with_a_token_of_its_own(directory, tmp_path):
    # as Gemma's <end_of_turn>: the tokenizer's end token is another
    tokenizer = load_tokenizer(_changed(directory, tmp_path))
    tokenizer.chat_template = TEMPLATE.replace("eos_token", repr(PADDING))
    assert turn_end_id(tokenizer) == 1
    rows = _set(_user("24="), completion=[_assistant("3")])
    assert encode_completions(tokenizer, rows, 4) == [[5, 1]]
    tokenizer.chat_template = TEMPLATE.replace("{{ eos_token }}", "=")
    assert turn_end_id(tokenizer) is None
    assert encode_completions(tokenizer, rows, 4) == [[5, 17, 0]]


def test_a_last_turn_of_the_assistant_is_continued(tokenizer):
    tokenizer.chat_template = TEMPLATE
    assert encode_prompts(tokenizer, _set([*_user("24="), *_assistant("3")]), 10) == [
        [13, 4, 6, 17, 0, 12, 5]
    ]


def test_templates_read_the_columns_of_the_row(tokenizer):
    tokenizer.chat_template = TEMPLATE.replace(
        "{% if add",
        "{% if tools %}({{ tools[0]['number'] }}){% endif %}{% if end %}={% endif %}{% if add",
    )
    tools = [[{"number": 7}], '[{"number": 8}]', [], None]
    variables = [None, {"end": True}, {"end": False}, {}]
    rows = _set(*[_user("1")] * 4, tools=tools, chat_template_kwargs=variables)
    start = [13, 3, 0]
    assert encode_prompts(tokenizer, rows, 10) == [
        [*start, 15, 9, 16, 12],
        [*start, 15, 10, 16, 17, 12],
        [*start, 12],
        [*start, 12],
    ]
    wrong = _set(
        *[_user("1")] * 4,
        tools=["[", 3, "[" * 5000, None],
        chat_template_kwargs=[{}, {}, {}, {"tokenize": 1}],
    )
    with pytest.raises(
        ValueError,
        match="(?s)rejects 4 rows.*'tools' is not JSON.*'tools' is int.*'tools' is not JSON: "
        "nested deeper.*row 3.*'chat_template_kwargs' sets tokenize; expected variables",
    ):
        encode_prompts(tokenizer, wrong, 10)


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
    texts, ids = decode_completions(tokenizer, tokens, mask, end_ids=[0])
    assert texts == ["3*8", "1"]
    assert ids == [[5, 14, 10, 0], [3]]
    # An end token the tokenizer does not call special is left out of the text all the same.
    assert decode_completions(tokenizer, tokens, mask, end_ids=[10])[0] == ["3*", "1"]


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


def test_texts_that_a_tokenizer_cannot_encode_are_named(tmp_path):
    """law: WordLevel raises a bare Exception for an unknown character; Rust code may panic."""
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="(?s)x.jsonl: .* cannot encode the text of 1 rows.*row 1"):
        encode_plain(tokenizer, ["1+2", "é"], "x.jsonl")

    class PanicException(BaseException):
        pass

    def panic(*_, **__):
        raise PanicException("out of bounds")

    with pytest.raises(ValueError, match="(?s)of 2 rows.*PanicException: out of bounds"):
        encode_texts(panic, ["1", "2"], "x.jsonl")


def test_errors_name_lines_of_the_file(tokenizer, tmp_path):
    """by hand: rows keep the line of their file when others were held out or taken before them."""
    lines = ['{"prompt": "1+1="}', "", '{"prompt": "1"}', '{"prompt": "1+2+3+4="}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    rows = take(read_set(tmp_path / "rows.jsonl"), np.array([1, 2]))
    assert join([rows, rows]).place(3) == f"{tmp_path}/rows.jsonl:4"
    with pytest.raises(ValueError, match=r"\n  \S+/rows.jsonl:4: 8 tokens\n"), rows.named_rows():
        encode_prompts(tokenizer, rows, 4)
