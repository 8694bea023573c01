"""A disk that fills at any moment of a run: one sentence, no damage, and the same bits later."""

import numpy as np
import pytest

from tests.children import Children
from tests.training.test_train import base, words

__all__ = ["base"]  # a fixture

SHARES = (0.0001, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
"""Sizes of the disk, as shares of a finished run."""
PROGRESS = ("it/s", "s/it", "?it", "B/s")


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """Children that share compiled programs."""
    result = Children(tmp_path_factory.mktemp("children"))
    yield result
    result.close()


def arguments(base, run):
    """A run with a checkpoint at every step, probes, ledgers, evaluations and event files."""
    more = ["--config.stages[0].steps=4", "--config.checkpoint.every_steps=1"]
    more += ["--config.probe.ledger_every_steps=2", "--config.logging.tensorboard=True"]
    return words(base, run, *more)


def disk_size(directory):
    """Return the bytes of a directory's files on a disk with pages of 4096."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return sum(-(-path.stat().st_size // 4096) for path in files) * 4096


def troubles(command, status, output, usual):
    """Return the last line of a command on a full disk, after checks of its output."""
    lines = [line for line in output.replace("\r", "\n").splitlines() if line.strip()]
    lines = [line for line in lines if not any(mark in line for mark in PROGRESS)]
    assert status == 2 and "Traceback" not in output, output
    assert len([line for line in lines if line not in usual]) <= 3, lines
    assert "no space left" in lines[-1].lower() and lines[-1].startswith(f"ntkrl {command}: ")
    return lines[-1]


def kept(run):
    """Return the files of a run that must be the same bits."""
    names = ("metrics.jsonl", "export/model.safetensors", "probes/*.npz", "ledger/*.npz")
    return {p.relative_to(run): p for name in names for p in run.glob(name)}


@pytest.mark.slow
def test_the_disk_fills_at_any_moment(base, children, small_disk, tmp_path, capsys):
    """story: status 2 and at most three lines; with room, the same command ends with equal bits."""
    uninterrupted = tmp_path / "whole"
    status, output = children.run(arguments(base, uninterrupted))
    assert status == 0, output
    size = disk_size(uninterrupted)
    usual = output.splitlines()
    for share in SHARES:
        run = small_disk(max(4096, int(size * share))) / "run"
        status, output = children.run(arguments(base, run))
        message = troubles("train", status, output, usual)
        small_disk(20 * size, "remount")
        saved = [int(path.name) for path in run.glob("checkpoints/*") if path.name.isdigit()]
        status, output = children.run(arguments(base, run))
        assert status == 0, output
        assert not saved or f"after rollout step {max(saved)}" in output, output
        files, others = kept(uninterrupted), kept(run)
        assert files.keys() == others.keys(), share
        for name, path in files.items():
            if name.suffix != ".npz":
                assert path.read_bytes() == others[name].read_bytes(), (share, name)
                continue
            for key, array in np.load(path).items():
                np.testing.assert_array_equal(array, np.load(others[name])[key])
        with capsys.disabled():
            print(f"\n{share:.2%}: {message}")
        small_disk.remove()


@pytest.mark.slow
def test_the_disk_fills_during_other_commands(base, children, small_disk, tmp_path, capsys):
    """story: export, evaluate, kernel and report end in one sentence and leave no half result."""
    run, prompts = tmp_path / "run", tmp_path / "prompts.jsonl"
    status, output = children.run(arguments(base, run))
    assert status == 0, output
    prompts.write_text('{"prompt": "1+2="}\n{"prompt": "3*4="}\n')

    def evaluation(out):
        return ["evaluate", *words(base, out)[1:]]

    commands = {
        "export": lambda out: ["export", str(run), str(out)],
        "evaluate": evaluation,
        "kernel": lambda out: ["kernel", str(base), f"--prompts={prompts}", f"--out={out}"],
        "report": lambda out: ["report", str(run), f"--out={out}"],
    }
    for command, arguments_of in commands.items():
        status, output = children.run(arguments_of(tmp_path / command))
        assert status == 0, (command, output)
        size, usual = disk_size(tmp_path / command), output.splitlines()
        names = {path.relative_to(tmp_path / command) for path in (tmp_path / command).rglob("*")}
        for share in (0.0001, 0.1, 0.3, 0.6, 0.9):
            disk = small_disk(max(4096, int(size * share)))
            status, output = children.run(arguments_of(disk / "out"))
            message = troubles(command, status, output, usual)
            assert not list(disk.rglob("*partial*")), command
            small_disk(20 * size, "remount")
            status, output = children.run(arguments_of(disk / "out"))
            assert status == 0, (command, output)
            assert {path.relative_to(disk / "out") for path in (disk / "out").rglob("*")} == names
            with capsys.disabled():
                print(f"\n{command} {share:.2%}: {message}")
            small_disk.remove()
