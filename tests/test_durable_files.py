"""Files that replace others: complete or as before, and synced before they are visible."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from ntkrl import durable_files


@pytest.fixture
def calls(monkeypatch):
    """Record fsync, and renames with whether the renamed file was synced before."""
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        events.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def record_replace(source, target):
        events.append(("rename", os.path.basename(source)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    return events


def test_a_file_is_synced_before_its_name_and_the_directory_after_it(tmp_path, calls):
    """law: content, rename, directory, in this order; the new directory is synced above it."""
    durable_files.save_text(tmp_path / "new" / "a.json", "{}")
    (above, content, rename, below) = calls
    assert above == ("sync", tmp_path.name) and below == ("sync", "new")
    assert content[0] == "sync" and rename == ("rename", content[1])
    assert (tmp_path / "new" / "a.json").read_text() == "{}"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


def test_a_failed_write_leaves_the_former_file_alone(tmp_path):
    """law: an error while writing changes nothing, and leaves no file behind."""
    path = tmp_path / "a.npz"
    durable_files.save_arrays(path, {"x": np.arange(3)})
    before = path.read_bytes()
    with pytest.raises(RuntimeError), durable_files.replacing(path) as file:
        file.write(b"half")
        raise RuntimeError("killed")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_directory_is_replaced_with_all_its_content(tmp_path, monkeypatch, exchange):
    """law: with and without an atomic exchange; neighbours of similar names stay."""
    if not exchange:
        monkeypatch.setattr(durable_files, "EXCHANGE", 1 << 30)  # no such flag: the call fails
    target = tmp_path / "out"
    for name in ("out", "out.old", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "former").write_text(name)
    with durable_files.replacing_directory(target) as fresh:
        (fresh / "new").write_text("new")
        assert (target / "former").exists()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.old", "out.partial"}
    assert (tmp_path / "out.old" / "former").read_text() == "out.old"


def test_a_failed_directory_leaves_the_former_one(tmp_path):
    """law: an error inside changes nothing, and leaves nothing behind."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "former").write_text("former")
    with pytest.raises(RuntimeError), durable_files.replacing_directory(target) as fresh:
        (fresh / "new").write_text("new")
        raise RuntimeError("killed")
    assert [path.name for path in target.iterdir()] == ["former"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_directory_that_another_filled_meanwhile(tmp_path):
    """law: a new directory does not replace one that came into being while it was written."""
    target = tmp_path / "out"
    with pytest.raises(OSError), durable_files.replacing_directory(target) as fresh:
        (fresh / "new").write_text("new")
        target.mkdir()
        (target / "mine").write_text("mine")
    assert [path.name for path in target.iterdir()] == ["mine"] and list(tmp_path.iterdir()) == [
        target
    ]


def test_a_copy_on_a_full_disk_names_the_new_file(tmp_path, small_disk):
    """law: neither the file that is copied nor a temporary name."""
    (tmp_path / "weights").write_bytes(bytes(2**16))
    target = small_disk(2**14) / "out"
    with pytest.raises(OSError) as raised, durable_files.replacing_directory(target) as fresh:
        shutil.copyfile(tmp_path / "weights", fresh / "weights")
    sentence = f"no space left on the device for {target / 'weights'}; make room"
    assert durable_files.full_disk(raised.value).startswith(sentence)
    assert list(target.parent.iterdir()) == []


def test_a_full_disk_is_recognised(tmp_path):
    """law: by number, by a library's words, behind another error; a sentence stays as it is."""
    full = OSError(errno.ENOSPC, "No space left on device", "a/b")
    sentence = "no space left on the device for a/b; make room, and run the same command again."
    assert durable_files.full_disk(full) == sentence
    assert durable_files.full_disk(OSError(errno.EDQUOT, "Disk quota exceeded")) is not None
    assert durable_files.full_disk(RuntimeError("I/O error: os error 28")) is not None
    try:
        try:
            raise full
        finally:
            raise ValueError("Can't close the ZIP file")
    except ValueError as error:
        assert durable_files.full_disk(error) == sentence
        assert durable_files.full_disk(OSError("x cannot be written; make room.")) is None
    assert durable_files.full_disk(ValueError("no room")) is None
    assert durable_files.full_disk(OSError(errno.EACCES, "Permission denied", "a")) is None


def test_a_place_is_checked_before_any_work(tmp_path):
    """by hand: a file, a path below one and an unwritable place by name; nothing is left."""
    file = tmp_path / "notes.txt"
    file.write_text("x")
    for place in (file, file / "out"):
        with pytest.raises(ValueError, match=r"since .*notes.txt is a file; give .*\(--out\)"):
            durable_files.check_place(place, "--out")
    with pytest.raises(ValueError, match=r"/proc/out cannot be written \(No such file or dir"):
        durable_files.check_place(Path("/proc/out"), "--out")
    durable_files.check_place(tmp_path / "a" / "b", "--out")
    durable_files.check_place(tmp_path, "--out")
    assert list(tmp_path.iterdir()) == [file]
