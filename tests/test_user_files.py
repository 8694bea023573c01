"""Execution of users' Python files."""

import os

import pytest

from ntkrl import user_files

TEXT = """from __future__ import annotations
import dataclasses

@dataclasses.dataclass
class Options:
    size: int = {size}

def make():
    return Options().size
"""


def test_a_file_is_executed_once_for_each_content(tmp_path):
    """story: the same module until the file is edited.

    A module that sys.modules lacks gives AttributeError in a dataclass with postponed annotations.
    """
    path = tmp_path / "options.py"
    path.write_text(TEXT.format(size=1))
    module = user_files.execute(path)
    assert module.make() == 1 and user_files.execute(path) is module
    path.write_text(TEXT.format(size=2))
    assert user_files.execute(path).make() == 2


def test_a_file_that_fails_is_executed_again(tmp_path):
    """story: no half-executed module is returned the second time."""
    path = tmp_path / "broken.py"
    path.write_text("value = 1\nraise OSError('no GPU')\n")
    for _ in range(2):
        with pytest.raises(OSError, match="no GPU"):
            user_files.execute(path)


def test_code_of_other_directories_needs_trust(tmp_path, monkeypatch):
    """law: a directory elsewhere, a link to one, and another user's directory or config."""
    (tmp_path / "here" / "run").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "there")
    for place in ("here/run", "there"):
        (tmp_path / place / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "here")
    run = tmp_path / "here" / "run"
    user_files.check_trust(run, ["mine.py:score"], trusted=False)
    message = r"names code .* rights, mine.py:score, and the directory is outside the current .*add"
    for place in ("there", "here/link"):
        with pytest.raises(ValueError, match=message):
            user_files.check_trust(tmp_path / place, ["mine.py:score"], trusted=False)
        user_files.check_trust(tmp_path / place, ["mine.py:score"], trusted=True)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ValueError, match="the directory belongs to another user"):
        user_files.check_trust(run, ["mine.py:score"], trusted=False)
