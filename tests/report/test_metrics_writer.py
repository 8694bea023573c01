"""Tests of writing run directories."""

import json
import math
import os

import pytest

from ntkrl.report import MetricsWriter


def test_line_by_hand(tmp_path):
    """By hand: floats as JSON, NaN and infinity as null, stage as text, flushed before closing."""
    writer = MetricsWriter(tmp_path / "run")
    writer.write(3, {"stage": "all", "reward": 0.5, "kl": math.nan, "grad_norm": math.inf})
    expected = b'{"step": 3, "stage": "all", "reward": 0.5, "kl": null, "grad_norm": null}\n'
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == expected
    writer.close()


def test_names(tmp_path):
    """Law: names outside the glossary and its patterns are refused, all in one message."""
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"rewards/length/mean": 1.0, "rewards/a/b/std": 1.0, "logged/x": 2.0})
        with pytest.raises(ValueError, match=r"'entropi' \(did you mean 'entropy'\?\), 'foo'"):
            writer.write(2, {"entropi": 1.0, "foo": 2.0, "reward": 1.0})
        for name in ("rewards/length/max", "rewards//mean", "logged/", "xlogged/a"):
            with pytest.raises(ValueError, match=name):
                writer.write(2, {name: 1.0})
        with pytest.raises(ValueError, match="step"):
            writer.write(2, {"step": 2})
    # A refused line leaves nothing behind.
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_timings(tmp_path):
    """By hand: timings have free names that end in _seconds."""
    with MetricsWriter(tmp_path) as writer:
        writer.write_timings(1, {"sample_seconds": 2, "nap_seconds": 0.5})
        with pytest.raises(ValueError, match="sample_ms"):
            writer.write_timings(2, {"sample_ms": 1.0})
    expected = b'{"step": 1, "sample_seconds": 2.0, "nap_seconds": 0.5}\n'
    assert (tmp_path / "timings.jsonl").read_bytes() == expected


def test_resume_bytes(tmp_path):
    """By hand: resuming at step 2 keeps exactly the bytes up to it, odd spacing included.

    Damaged lines of timings, which no result depends on, do not stop it.
    """
    kept = b'{"step":0,  "reward": 1}\n{"step": 2, "reward": 1e-3}\n'
    later = b'{"step": 3, "reward": 2.0}\n{"step": 4, "rew'
    (tmp_path / "metrics.jsonl").write_bytes(kept + later)
    (tmp_path / "timings.jsonl").write_bytes(b'{"step": 2}\n\0\0\n{"st\n{"step": 3}\n')
    (tmp_path / "finished").touch()
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        assert (tmp_path / "metrics.jsonl").read_bytes() == kept
        assert (tmp_path / "timings.jsonl").read_bytes() == b'{"step": 2}\n'
        assert not (tmp_path / "finished").exists()
        writer.write(3, {"reward": 5.0})
    added = b'{"step": 3, "reward": 5.0}\n'
    assert (tmp_path / "metrics.jsonl").read_bytes() == kept + added
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "timings.jsonl"]


def test_no_resume_step_keeps_whole_lines(tmp_path):
    """By hand: without a step only a cut line goes; a line that lost its newline gets it back."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 9}\n{"st')
    MetricsWriter(tmp_path).close()
    assert path.read_bytes() == b'{"step": 9}\n'
    path.write_bytes(b'{"step": 9}')
    MetricsWriter(tmp_path).close()
    assert path.read_bytes() == b'{"step": 9}\n'


def test_resume_refuses_a_broken_line_inside(tmp_path):
    """Law: a broken line that no crash explains stops the resume and is left where it is."""
    before = b'{"step": 1}\nrubbish\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_bytes(before)
    with pytest.raises(ValueError, match="line 2"):
        MetricsWriter(tmp_path, resume_step=1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_uninterrupted_equals_resumed(tmp_path):
    """Story: write, die in the middle of a line, resume, and have the bytes of one long run."""
    for name in ("whole", "killed"):
        with MetricsWriter(tmp_path / name) as writer:
            for step in range(4 if name == "killed" else 6):
                writer.write(step, {"reward": step / 7})
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rewa')
    with MetricsWriter(tmp_path / "killed", resume_step=1) as writer:
        for step in range(2, 6):
            writer.write(step, {"reward": step / 7})
    uninterrupted, killed = (
        (tmp_path / n / "metrics.jsonl").read_bytes() for n in ("whole", "killed")
    )
    assert uninterrupted == killed
    assert [json.loads(line)["step"] for line in uninterrupted.splitlines()] == list(range(6))


def test_starting_over_replaces_damaged_lines(tmp_path):
    """By hand: a negative step keeps nothing, and reads nothing that a power cut damaged."""
    (tmp_path / "metrics.jsonl").write_bytes(b"\0\0\0\n" + b'{"step": 0}\n')
    MetricsWriter(tmp_path, resume_step=-1).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


CHANGES = {
    "removed": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "a line cut off": lambda path: path.write_bytes(path.read_bytes()[:30]),
    "a line of another writer": lambda path: path.write_bytes(path.read_bytes() + b'{"step": 9}\n'),
    "replaced by a copy": lambda path: (
        (path.parent / "copy").write_bytes(path.read_bytes()),
        (path.parent / "copy").replace(path),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_lines_lost_while_writing(tmp_path, change):
    """Law: at the next checkpoint the file has every line again, and later ones; it is reported."""
    messages, path = [], tmp_path / "metrics.jsonl"
    with MetricsWriter(tmp_path) as writer:
        for step in range(3):
            writer.write(step, {"reward": step / 7})
        assert writer.sync(messages.append).lines == 3 and messages == []
        before = path.read_bytes()
        CHANGES[change](path)
        writer.sync(messages.append)
        assert path.read_bytes() == before and len(messages) == 1
        assert "by something else while the run wrote it; its 3 lines are" in messages[0]
        writer.write(3, {"reward": 1.0})
        writer.sync(messages.append)
    assert path.read_bytes() == before + b'{"step": 3, "reward": 1.0}\n' and len(messages) == 1


def test_lines_are_synced_at_checkpoints_only(tmp_path, monkeypatch):
    """Law: writing a line syncs nothing; `sync` does both files, as a checkpoint stands on them."""
    synced, fsync = [], os.fsync

    def record(descriptor):
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    with MetricsWriter(tmp_path) as writer:
        monkeypatch.setattr(os, "fsync", record)
        writer.write(1, {"reward": 1.0})
        writer.write_timings(1, {"nap_seconds": 1.0})
        assert synced == []
        writer.sync(print)
        assert synced == ["metrics.jsonl", "timings.jsonl"]


def test_full_disk(tmp_path):
    """By hand: a line that finds no room names the file and the way out, and closing is quiet."""
    with MetricsWriter(tmp_path) as writer:
        writer._metrics = open("/dev/full", "a")
        with pytest.raises(OSError, match="/dev/full cannot be written: No space left") as caught:
            writer.write(1, {"reward": 1.0})
        assert "run the same command again" in str(caught.value)
