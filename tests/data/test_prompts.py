"""By hand: files with one mistake each, and its error message."""

import json

import pytest

from ntkrl.data.prompts import PromptSet, join, read_prompts, read_set

USER = [{"role": "user", "content": "hello"}]


def _write(tmp_path, *lines):
    path = tmp_path / "rows.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_standard_rows_keep_order_and_columns(tmp_path):
    path = _write(tmp_path, {"prompt": "a", "x": 0}, "", {"prompt": "b", "y": None}, "  ")
    rows = read_set(path)
    assert rows.prompts == ("a", "b")
    # 0 is a value and None is absence; a key missing in a row is None there.
    assert rows.columns == {"x": [0, None], "y": [None, None]}
    assert rows.source == str(path)
    assert not rows.conversational


def test_conversational_rows(tmp_path):
    rows = read_set(_write(tmp_path, {"prompt": USER, "answer": "4"}))
    assert rows.prompts == (USER,)
    assert rows.conversational
    assert rows.columns == {"answer": ["4"]}


def test_completions_of_both_forms(tmp_path):
    expected = ("prompt", "completion")
    rows = read_set(_write(tmp_path, {"prompt": "a", "completion": "b"}), expected)
    assert rows.columns["completion"] == ["b"]
    answer = [{"role": "assistant", "content": "hi"}]
    rows = read_set(_write(tmp_path, {"prompt": USER, "completion": answer}), expected)
    assert rows.columns["completion"] == [answer]


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n')
    assert read_set(path).prompts == ("a", "b")


def test_missing_file_directory_and_empty_file(tmp_path):
    with pytest.raises(ValueError, match=r"absent.jsonl: no such file. Allowed are JSON Lines"):
        read_set(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="is a directory without a data file"):
        read_set(tmp_path)
    with pytest.raises(ValueError, match=r"rows.jsonl: the file is empty. Expected"):
        read_set(_write(tmp_path, "", "  "))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a"', "malformed JSON: Expecting"),
        ("[" * 100_000, "malformed JSON: nested deeper than 64"),
        ('["a"]', "expected a JSON object, found list"),
        ({"text": "a"}, r"no 'prompt' \(missing or null\); the row has text"),
        ({"prompt": None}, r"no 'prompt' \(missing or null\)"),
        ({"prompt": 3}, "'prompt' is int; expected text or a list of messages"),
        ({"prompt": " "}, "empty prompt"),
        ({"prompt": "\ud800"}, "'prompt' has half of a surrogate pair"),
        (
            {"prompt": USER},
            "mixed forms: this prompt is a list of messages, that of line 1 is text",
        ),
    ],
)
def test_bad_row_is_named_by_line(tmp_path, row, message):
    path = _write(tmp_path, {"prompt": "good"}, "", row)
    with pytest.raises(ValueError, match=f"(?s)problems: 1\n.*rows.jsonl:3: {message}.*Expected"):
        read_set(path)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], r"empty prompt \(a list without messages\)"),
        ([{"role": "user", "content": " "}], r"empty prompt \(no message has content\)"),
        (["hi"], "message 0 of 'prompt' is str; expected an object with 'role' and 'content'"),
        ([*USER, {"role": "usr", "content": "a"}], "message 1 of 'prompt': role is 'usr'; .*user"),
        ([{"content": "a"}], "message 0 of 'prompt': role is missing"),
        ([{"role": "user"}], "message 0 of 'prompt': content is missing; expected text"),
        (
            [{"role": "user", "content": ["a"]}],
            "message 0 of 'prompt': content is list; expected text",
        ),
        ("text", "mixed forms: this prompt is text, that of line 1 is a list of messages"),
    ],
)
def test_bad_messages_are_named_by_line(tmp_path, prompt, message):
    with pytest.raises(ValueError, match=f"rows.jsonl:2: {message}"):
        read_set(_write(tmp_path, {"prompt": USER}, {"prompt": prompt}))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, r"no 'completion' \(missing or null\)"),
        ({"prompt": "a", "completion": 1}, "'completion' is int; expected text"),
        ({"prompt": USER, "completion": "b"}, "'completion' is str; expected a list of messages"),
        ({"prompt": USER, "completion": []}, "empty completion"),
    ],
)
def test_bad_completions_are_named_only_where_required(tmp_path, row, message):
    path = _write(tmp_path, row)
    with pytest.raises(ValueError, match=f"rows.jsonl:1: {message}"):
        read_set(path, required=("prompt", "completion"))
    read_set(path)


def test_required_column_absent_in_a_row(tmp_path):
    path = _write(tmp_path, {"prompt": "a", "target": 0}, {"prompt": "b"})
    with pytest.raises(ValueError, match="rows.jsonl:2: no 'target'") as caught:
        read_set(path, required=("target",))
    assert ":1:" not in str(caught.value)  # a target of 0 is there


def test_not_utf8_is_named_by_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xe9"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:2: not UTF-8 \(byte 12\); save"):
        read_set(path)


def test_all_problems_in_line_order_ten_shown(tmp_path):
    rows = [{"prompt": ""} if i % 2 else "nonsense" for i in range(13)]
    with pytest.raises(ValueError, match="problems: 13") as caught:
        read_set(_write(tmp_path, *rows))
    lines = [line for line in str(caught.value).splitlines() if "rows.jsonl:" in line][1:]
    assert [line.split("rows.jsonl:")[1].split(":")[0] for line in lines] == [
        str(i) for i in range(1, 11)
    ]
    assert "and 3 more" in str(caught.value)


def test_text_files_hold_one_prompt_per_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbf a \r\n\r\n  \nb\xe2\x80\xa8c\n")
    rows = read_prompts(path)
    # white space of a line is kept; a Unicode line separator is no end of line
    assert rows.prompts == (" a ", "b\u2028c")
    assert rows.columns == {} and rows.source == str(path) and not rows.conversational
    assert read_prompts(_write(tmp_path, {"prompt": USER})).prompts == (USER,)


def test_text_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "prompts.txt"
    with pytest.raises(ValueError, match="no such file. Expected a text file with one prompt"):
        read_prompts(path)
    path.write_bytes(b"a\n\xff\n")
    with pytest.raises(ValueError, match=r"prompts.txt: not UTF-8 \(byte 2\); save the file"):
        read_prompts(path)
    path.write_text(" \n\n")
    with pytest.raises(ValueError, match="the file is empty. Expected one prompt per line"):
        read_prompts(path)


def test_joined_sets_keep_order_and_fill_columns():
    """by hand: a column that one set lacks is None there, not left out."""
    first = PromptSet(("a", "b"), {"x": [1, 2]}, "a.jsonl")
    second = PromptSet(("c",), {"y": [0], "x": [3]}, "b.jsonl")
    both = join([first, second])
    assert both == PromptSet(
        ("a", "b", "c"), {"x": [1, 2, 3], "y": [None, None, 0]}, "a.jsonl, b.jsonl"
    )
    assert join([first]) == first


def test_sets_of_two_forms_are_not_joined():
    """by hand: both files are named."""
    sets = [PromptSet((prompt,), {}, name) for prompt, name in ((USER, "a"), ("text", "b"))]
    with pytest.raises(ValueError, match="text in b and lists of messages in a; use one"):
        join(sets)


def test_a_table_in_another_format(tmp_path):
    """by hand: one sentence with the way to convert it, not a fault for every line."""
    (tmp_path / "rows.csv").write_text("prompt,answer\n1,2\n")
    with pytest.raises(ValueError, match=r"rows.csv is a table in a format .* convert it to JSON"):
        read_set(tmp_path / "rows.csv")


def test_a_problem_of_every_row_is_one_line(tmp_path):
    """by hand: with the number of rows, the first and the column to rename; others by their row."""
    rows = [{"question": "a"} for _ in range(12)]
    with pytest.raises(ValueError, match=r"problems: 12\n.*each of 12 rows.*rename 'question' to"):
        read_set(_write(tmp_path, *rows))  # listed ten of them
    with pytest.raises(ValueError, match="problems: 13") as caught:
        read_set(_write(tmp_path, *rows, "nonsense"))
    assert "each of" not in str(caught.value)
    with pytest.raises(ValueError, match="problems: 4") as caught:
        read_set(
            _write(tmp_path, *[{"prompt": "a"}] * 2), required=("prompt", "chosen", "rejected")
        )
    assert str(caught.value).count("each of 2 rows, the first at") == 2
    assert "here with 'chosen', 'rejected' too" in str(caught.value)
