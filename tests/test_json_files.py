"""JSON files of users: every mistake is one sentence with the file, and nothing grows or hangs."""

import json
import os
import tracemalloc

import pytest

from ntkrl.json_files import MAX_BYTES, MAX_DEPTH, check_regular, parse_json, read_json, read_object


def nested(depth, opening="[", closing="]"):
    """A value in so many lists."""
    return opening * depth + closing * depth


REFUSED = {
    b"": "is not valid JSON (Expecting value",
    b'{"a": 1,}': "is not valid JSON",
    b'{"a": NaN}': "a is nan, not a finite number",
    b'{"a": [1, {"b": -Infinity}]}': "a[1].b is -inf, not a finite number",
    b'{"a": 1e999}': "a is inf, not a finite number",
    b'{"a": ' + 5000 * b"9" + b"}": "is not valid JSON (Exceeds the limit",
    b'{"a": 1, "b": 2, "a": 3}': "the field 'a' occurs twice, as 1 and as 3",
    b'{"a": 1, "a": {}}': "the field 'a' occurs twice",
    b"\xff{}": "not UTF-8 at byte 0; save it as UTF-8",
    "{}".encode("utf-16"): "not UTF-8 at byte 0",
    nested(MAX_DEPTH + 1).encode(): "nested deeper than 64",
    nested(100_000).encode(): "nested deeper than 64",
    nested(1000, '{"a":', "}").replace(":}", ":1}").encode(): "nested deeper than 64",
    b"[1, 2]": "must hold a JSON object, not list",
    b"null": "must hold a JSON object, not NoneType",
    b"{}" + b" " * MAX_BYTES: f"has {MAX_BYTES + 2} bytes; a file of this name has at most",
}


@pytest.mark.parametrize("content", REFUSED, ids=lambda content: repr(content[:20]))
def test_refused_files(tmp_path, content):
    """by hand: one line that begins with the file and names the field or the place."""
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_object(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and REFUSED[content] in message, message
    assert "\n" not in message and len(message) < 400


def test_accepted_files(tmp_path):
    """by hand: what the reader of JSON returns, with a byte-order mark, a field twice the same."""
    path = tmp_path / "x.json"
    for value in ({}, {"a": [1, 2.5, None, True, "é"]}, {"model_max_length": 10**30}):
        for content in (json.dumps(value).encode(), b"\xef\xbb\xbf" + json.dumps(value).encode()):
            path.write_bytes(content)
            assert read_object(path) == value
    path.write_text('{"a": [1], "a": [1]}')
    assert read_object(path) == {"a": [1]}
    path.write_text('{"a": NaN}')
    assert str(read_object(path, finite=False)["a"]) == "nan"
    path.write_text(nested(MAX_DEPTH))
    assert parse_json(path.read_text()) == read_json(path)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop", "nothing"])
def test_only_regular_files_are_opened(tmp_path, kind):
    """law: a pipe without a writer would block for ever, a device would never end."""
    path = tmp_path / "x.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "nothing":
        path.symlink_to("/dev/zero" if kind == "device" else path)
    with pytest.raises(ValueError) as caught:
        read_object(path)
    assert str(caught.value).startswith(str(path))
    if kind in ("pipe", "folder", "device"):
        with pytest.raises(ValueError, match="is not a regular file"):
            check_regular(path, 10)


def test_links_are_followed(tmp_path):
    """law: the cache of the Hugging Face hub holds links to files."""
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "x.json").symlink_to(tmp_path / "blob")
    assert read_object(tmp_path / "x.json") == {}


def test_large_files_are_not_read(tmp_path):
    """law: a sparse file of a terabyte is refused by its size."""
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    tracemalloc.start()
    with pytest.raises(ValueError, match="has 1099511627776 bytes"):
        read_object(path)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()
