"""Records of the lines of metrics.jsonl: what they notice, and what they restore."""

import dataclasses
import hashlib
import json
import zlib

import pytest

from ntkrl.report import (
    LineRecord,
    MetricsWriter,
    changed_files,
    file_sizes,
    finished_problems,
    mark_finished,
    restore_lines,
)


def written(directory, steps=4):
    """Write lines; return their record, as a checkpoint stores it, and the file's content."""
    with MetricsWriter(directory) as writer:
        for step in range(steps):
            writer.write(step, {"reward": step / 7})
            writer.write_timings(step, {"nap_seconds": 0.5})
        record = writer.sync(print)
    record = LineRecord(**json.loads(json.dumps(dataclasses.asdict(record))))
    return record, (directory / "metrics.jsonl").read_bytes()


def test_a_record_by_hand(tmp_path):
    """by hand: the number of lines, SHA-256 of the file, and the file itself."""
    record, content = written(tmp_path)
    digest = hashlib.sha256(content).hexdigest()
    assert (record.lines, record.sha256, record.timings) == (4, digest, 4)
    assert record.content() == content
    # resumed: the record goes on from the lines in the file
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        writer.write(3, {"reward": 3 / 7})
        again = writer.sync(print)
    assert (again.lines, again.sha256, again.content()) == (4, digest, content)


def without(number):
    """Return a change that drops a line."""
    return lambda lines: lines[:number] + lines[number + 1 :]


HOLES = {
    "missing": (None, "metrics.jsonl is missing"),
    "empty": (lambda lines: [], "metrics.jsonl has 0 of 4 lines"),
    "shortened": (lambda lines: lines[:2], "metrics.jsonl has 2 of 4 lines"),
    "cut in a line": (lambda lines: [*lines[:3], lines[3][:9]], "metrics.jsonl has 3 of 4 lines"),
    "a line lost": (without(1), "metrics.jsonl has 3 of 4 lines"),
    "a line lost, later ones there": (
        lambda lines: [*without(1)(lines), b'{"step": 4}\n'],
        "the first 4 lines of metrics.jsonl have changed since they were written",
    ),
    "lines exchanged": (
        lambda lines: [lines[1], lines[0], *lines[2:]],
        "the first 4 lines of metrics.jsonl have changed since they were written",
    ),
    "zeros": (
        lambda lines: [b"\0" * sum(map(len, lines))],
        "metrics.jsonl has 0 of 4 lines",
    ),
}


@pytest.mark.parametrize("hole", HOLES)
def test_holes_are_filled_and_reported(tmp_path, hole):
    """law: whatever the file lost before the checkpoint is reported and restored, byte for byte."""
    record, content = written(tmp_path)
    change, problem = HOLES[hole]
    path = tmp_path / "metrics.jsonl"
    damaged = None if change is None else b"".join(change(content.splitlines(keepends=True)))
    path.unlink()
    if damaged is not None:
        path.write_bytes(damaged)
    (message,) = restore_lines(tmp_path, record)
    expected = f"{tmp_path}: {problem}; all 4 are restored from the copy in the checkpoint"
    assert message.startswith(expected) and path.read_bytes() == content
    if damaged is not None:  # nothing is lost, not even what is wrong
        assert message.endswith("the file as it was is called metrics.jsonl.damaged")
        assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damaged
    assert restore_lines(tmp_path, record) == []


def test_later_lines_go_without_a_word(tmp_path):
    """by hand: lines after the checkpoint, which the run writes again, complete or not."""
    record, content = written(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content + b'{"step": 4, "reward": 1.0}\n\0\0\n{"st')
    assert restore_lines(tmp_path, record) == [] and path.read_bytes() == content
    assert not (tmp_path / "metrics.jsonl.damaged").exists()


def test_lost_timings_are_reported(tmp_path):
    """by hand: 1 of 4 lines of timings is left, and half of one."""
    record, _ = written(tmp_path)
    path = tmp_path / "timings.jsonl"
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 4 + 5])
    (message,) = restore_lines(tmp_path, record)
    assert "timings.jsonl has lost 3 of 4 lines; going on without them" in message


def test_copies_are_small(tmp_path):
    """law: the copy in a checkpoint is a fraction of the lines, which repeat their names."""
    with MetricsWriter(tmp_path) as writer:
        for step in range(500):
            values = {f"logged/measure_{n}": (step * n) % 97 / 7 for n in range(40)}
            writer.write(step, values)
        record = writer.sync(print)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    assert len(record.packed) < size / 3 and zlib.crc32(record.content()) == zlib.crc32(
        (tmp_path / "metrics.jsonl").read_bytes()
    )


def test_missing_readings_are_named(tmp_path):
    """by hand: of three files of readings and ledgers one is removed and one cut short."""
    for name in ("probes/step_000002.npz", "probes/step_000004.npz", "ledger/step_000004.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"content")
    sizes = file_sizes(tmp_path)
    assert changed_files(tmp_path, sizes) == []
    (tmp_path / "probes/step_000006.npz").write_bytes(b"later")
    assert changed_files(tmp_path, sizes) == []
    (tmp_path / "probes/step_000002.npz").unlink()
    (tmp_path / "ledger/step_000004.json").write_bytes(b"cont")
    assert changed_files(tmp_path, sizes) == ["ledger/step_000004.json", "probes/step_000002.npz"]


def finished(directory):
    """Write a finished run with an exported model."""
    record, content = written(directory)
    for name, text in (("model.safetensors", "weights"), ("config.json", "{}"), ("README.md", "")):
        (directory / "export").mkdir(exist_ok=True)
        (directory / "export" / name).write_text(text)
    mark_finished(directory, 3, record, ["export"])
    return content


DAMAGES = {
    "metrics.jsonl is missing": lambda run: (run / "metrics.jsonl").unlink(),
    "metrics.jsonl has 0 of 4 lines": lambda run: (run / "metrics.jsonl").write_bytes(b""),
    "export/model.safetensors has 4 of 7 bytes": lambda run: (
        run / "export/model.safetensors"
    ).write_text("weig"),
    "export/model.safetensors is missing": lambda run: (run / "export/model.safetensors").unlink(),
    "export/config.json is missing": lambda run: (run / "export/config.json").unlink(),
    "the file finished does not state what it vouches for": lambda run: (
        run / "finished"
    ).write_text(""),
}


@pytest.mark.parametrize("problem", DAMAGES)
def test_a_mark_is_checked(tmp_path, problem):
    """law: a run is finished only if its lines and exports are as its mark states."""
    assert finished_problems(tmp_path) is None
    finished(tmp_path)
    mark = json.loads((tmp_path / "finished").read_text())
    assert mark["rollout_steps"] == 3 and mark["files"]["export/model.safetensors"] == 7
    (tmp_path / "export/README.md").write_text("edited")
    assert finished_problems(tmp_path) == []
    DAMAGES[problem](tmp_path)
    assert finished_problems(tmp_path) == [problem]
    without_exports = [] if problem.startswith("export") else [problem]
    assert finished_problems(tmp_path, exports=False) == without_exports
