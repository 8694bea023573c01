"""A disk that fills at any moment of a run: one sentence, no damage, and the same bits later."""

import numpy as np
import pytest

from tests.children import Children
from tests.training.test_train import base, words

__all__ = ["base"]  # a fixture

SHARES = (0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
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
    size = sum(-(-path.stat().st_size // 4096) + 1 for path in uninterrupted.rglob("*")) * 4096
    usual = output.splitlines()
    for share in SHARES:
        run = small_disk(int(size * share)) / "run"
        status, output = children.run(arguments(base, run))
        lines = [line for line in output.replace("\r", "\n").splitlines() if line.strip()]
        lines = [line for line in lines if not any(mark in line for mark in PROGRESS)]
        assert status == 2 and "Traceback" not in output, (share, output)
        assert len([line for line in lines if line not in usual]) <= 3, (share, lines)
        assert "no space left" in lines[-1].lower() and lines[-1].startswith("ntkrl train: ")
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
            print(f"\n{share:.0%}: {lines[-1]}")
        small_disk.remove()
