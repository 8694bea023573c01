"""Tests of the files of completions: their records, their limit, and what a resumed run does."""

import dataclasses
import gzip
import json
import zlib

import numpy as np
import pytest

from ntkrl.report import RolloutsWriter, StepRollouts, encode_rollouts, shorten_rollouts
from ntkrl.report import rollouts_writer as files
from ntkrl.report.rollouts_records import decode_rollouts
from ntkrl.report.rollouts_writer import is_kept, members, paths, read_every
from tests.report.made_rollouts import rollouts


def test_records_return():
    """law: what is encoded comes back, to the digits that the file states."""
    tokens = 9
    for changes in (
        {},
        {"log_ratio": None, "entropy": None},
        {"log_ratio": np.array([np.nan, *1e-6 * np.arange(tokens - 1)])},
        {"advantages": np.arange(tokens) * 0.1, "reward": np.array([np.nan, 1, 2, 3])},
    ):
        step = rollouts(7, **changes)
        line = encode_rollouts(step)
        assert line.endswith(b"\n") and line.count(b"\n") == 1
        again = decode_rollouts(line)
        for field in dataclasses.fields(StepRollouts):
            before, after = getattr(step, field.name), getattr(again, field.name)
            if not isinstance(before, np.ndarray):
                np.testing.assert_equal(after, before)
                continue
            # half a unit: 0.0005 nats of log-probs, half of the fourth digit of the largest
            nats = field.name in ("sampler_log_probs", "entropy")
            largest = 1.0 if nats else np.nanmax(np.abs(before))
            np.testing.assert_allclose(after, before, rtol=0, atol=0.5005e-3 * largest)
        assert encode_rollouts(again) == line


def test_a_token_per_advantage_by_hand():
    """by hand: one number per completion where its tokens agree, else integers of a unit."""
    record = json.loads(encode_rollouts(rollouts(1, advantages=np.repeat([0.5, -0.25, 1], 3))))
    assert record["advantages"] == [0.5, -0.25, 1.0, 0.0]
    record = json.loads(encode_rollouts(rollouts(1, advantages=np.arange(9) * 0.5)))
    assert record["advantages"] == {"unit": 1e-3, "values": list(range(0, 4500, 500))}


BROKEN = {
    "format": 2,
    "lengths": [3, 3, 3],
    "tokens": [1, 2],
    "vocabulary": {},
    "reward": ["a", 1, 2, 3],
    "sampler_log_probs": {"values": [1], "unit": 1},
    "advantages": {"values": 3},
    "group": 3,
    "prompts": "ab",
    "rows": [-1, 0],
    "finished": None,
    "rewards": [1],
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_records_are_refused(name):
    """law: a record of other types or sizes is one ValueError."""
    record = json.loads(encode_rollouts(rollouts(3)))
    for broken in (record | {name: BROKEN[name]}, {k: v for k, v in record.items() if k != name}):
        with pytest.raises(ValueError, match="is no record of completions"):
            decode_rollouts(json.dumps(broken).encode())
    for line in (b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"format":NaN}'):
        with pytest.raises(ValueError, match="is no record of completions"):
            decode_rollouts(line)


def write(directory, steps, limit_mib=1.0, start=0, pinned_every=None, **size):
    """Write steps as a run does that begins after `start`; return what is logged."""
    logged = []
    writer = RolloutsWriter(directory, limit_mib, start, pinned_every, logged.append)
    for step in steps:
        if writer.keeps(step):
            writer.write(step, encode_rollouts(rollouts(step, **size)))
    writer.sync()
    writer.close()
    return logged


def kept(directory):
    """Return the steps in the files, as gzip reads them."""
    read = [gzip.decompress(path.read_bytes()) for path in paths(directory / "rollouts")]
    return [json.loads(line)["rollout_step"] for part in read for line in part.splitlines()]


def contents(directory):
    """Return every file by name."""
    return {path.name: path.read_bytes() for path in (directory / "rollouts").iterdir()}


def test_every_step_is_kept_below_the_limit(tmp_path):
    """by hand: 230 steps in three files, each of a hundred."""
    write(tmp_path, range(1, 231))
    names = [f"steps_{first:06d}.jsonl.gz" for first in (1, 101, 201)]
    assert sorted(contents(tmp_path)) == names and kept(tmp_path) == list(range(1, 231))


def test_the_limit(tmp_path, monkeypatch):
    """law: never more than the limit; then every second step, fourth, …; ledgers stay longer."""
    sizes = []
    monkeypatch.setattr(files.RolloutsWriter, "sync", lambda self: sizes.append(size_of(tmp_path)))
    write(tmp_path, range(1, 301), 0.02, pinned_every=50)
    steps, every = kept(tmp_path), read_every(tmp_path)
    assert every in (4, 8, 16) and steps == [s for s in range(1, 301) if is_kept(s, every, 50)]
    assert {50, 150, 250} <= set(steps) and 0.004 * 2**20 < size_of(tmp_path) <= 0.02 * 2**20
    assert max(sizes) <= 0.0205 * 2**20  # a step above it before it is thinned out


def size_of(directory):
    """Return the bytes of the files of steps."""
    return sum(path.stat().st_size for path in (directory / "rollouts").glob("*.gz"))


def test_pinned_steps_by_hand():
    """by hand: those of every 50 stay up to every 64th; then every second, then every fourth.

    A power of two, so that what is kept later was always kept before: every fifth of 50 at 256
    would ask for step 250, dropped at 128.
    """
    ledgers = [50, 100, 150, 200, 250, 300, 350, 400]
    kept_of = {
        every: [s for s in ledgers if is_kept(s, every, 50)] for every in (1, 32, 64, 128, 256)
    }
    assert kept_of[1] == kept_of[32] == kept_of[64] == ledgers
    assert kept_of[128] == [100, 200, 300, 400] and kept_of[256] == [200, 400]


def test_the_number_of_steps_is_limited(tmp_path, monkeypatch):
    """law: small steps are thinned out too."""
    monkeypatch.setattr(files, "MAX_STEPS", 10)
    write(tmp_path, range(1, 101))
    assert kept(tmp_path) == list(range(16, 101, 16))


@pytest.mark.parametrize("limit_mib", [1.0, 0.02, 0.005])
def test_resumed_files_are_equal(tmp_path, limit_mib):
    """law: killed anywhere, with an end cut short, and resumed before that: the same bytes."""
    steps, rng = 250, np.random.default_rng(0)
    write(tmp_path / "a", range(1, steps + 1), limit_mib, pinned_every=40)
    for number in range(6):
        run, done = tmp_path / str(number), 0
        while done < steps:
            killed = int(rng.integers(done + 1, steps + 40))
            write(run, range(done + 1, min(killed, steps) + 1), limit_mib, done, 40)
            if killed >= steps:
                break
            last = paths(run / "rollouts")[-1:]
            if last and rng.random() < 0.7:  # after what a checkpoint stands on
                content, cut = last[0].read_bytes(), gzip.compress(b"x" * 99)
                content += cut[: int(rng.integers(1, 40))]
                if rng.random() < 0.5:
                    killed, content = max(kept(run)) - 1, last[0].read_bytes()[:-3]
                last[0].write_bytes(content)
            done = int(rng.integers(max(0, killed - 60), killed + 1))
        assert contents(run) == contents(tmp_path / "a")
    assert (read_every(tmp_path / "a") > 4) == (limit_mib < 1)


def test_a_kill_while_thinning_out(tmp_path, monkeypatch):
    """law: dropped in one file and not yet in the others: a resumed run drops the rest."""
    write(tmp_path / "a", range(1, 251), 0.02)
    replace, count = files._replace, []

    def dies(path, parts):
        count.append(path)
        if len(count) == 4:
            raise KeyboardInterrupt
        replace(path, parts)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "_replace", dies)
        write(tmp_path / "b", range(1, 251), 0.02)
    done = max(kept(tmp_path / "b")) - 5
    write(tmp_path / "b", range(done + 1, 251), 0.02, done)
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


def test_a_step_above_the_limit_is_not_kept(tmp_path):
    """by hand: a sentence names the size, the setting and the step."""
    (message,) = write(tmp_path, [1], 2**-12)
    assert "rollout step 1 take 0.0 MiB, more than logging.rollouts_mib = 0.000244" in message
    assert not (tmp_path / "rollouts").exists()


def test_readers_stop_at_damage(tmp_path):
    """law: complete steps before damage are read, whatever follows; while a run writes too."""
    write(tmp_path, range(1, 6))
    (path,) = paths(tmp_path / "rollouts")
    whole = path.read_bytes()
    ends = np.cumsum([len(member) for _, _, member in members(path)])
    assert ends[-1] == len(whole)
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        assert len(list(members(path))) == np.sum(ends <= size)
    for tail in (b"\0" * 50, b"PK\3\4" * 99, gzip.compress(b'{"step": 1}\n'), b"\x1f\x8b" * 9):
        path.write_bytes(whole + tail)
        assert [step for step, _, _ in members(path)] == [1, 2, 3, 4, 5]
    path.unlink()
    assert list(members(path)) == []


@pytest.mark.parametrize(("start", "lost"), [(120, ["41 to 100"]), (30, [])])
def test_lost_steps_are_reported(tmp_path, start, lost):
    """by hand: steps after damage that a resumed run does not repeat; nothing was said of them."""
    write(tmp_path, range(1, 151))
    path = paths(tmp_path / "rollouts")[0]
    size = sum(len(member) for _, _, member in list(members(path))[:40])
    path.write_bytes(path.read_bytes()[:size] + b"\0" * 9)
    messages = write(tmp_path, range(start + 1, start + 3), start=start)
    assert messages == [
        f"{path} is damaged: its completions of rollout steps {steps} are lost" for steps in lost
    ]
    assert kept(tmp_path)[-2:] == [start + 1, start + 2]


def test_bombs_are_not_inflated(tmp_path, monkeypatch):
    """law: a member that would become larger than a record may be is left out."""
    monkeypatch.setattr(files, "MAX_RECORD_BYTES", 10_000)
    write(tmp_path, [1])
    (path,) = paths(tmp_path / "rollouts")
    path.write_bytes(path.read_bytes() + zlib.compress(b" " * 10**7, wbits=31))
    assert [step for step, _, _ in members(path)] == [1]


def test_shortening(tmp_path):
    """by hand: a run that keeps no completions removes those it will repeat."""
    write(tmp_path, range(1, 151), 0.02)
    assert read_every(tmp_path) > 1
    shorten_rollouts(tmp_path, 60)
    assert max(kept(tmp_path)) <= 60 and len(paths(tmp_path / "rollouts")) == 1
    shorten_rollouts(tmp_path, 0)
    assert list((tmp_path / "rollouts").iterdir()) == []
