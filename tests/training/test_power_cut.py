"""Runs whose machine loses power: what was not synced is gone."""

import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from tests.training.test_resume import (
    arguments,
    assert_same,
    await_changes,
    base,
    children,
    uninterrupted,
)

__all__ = ["base", "children", "uninterrupted"]  # fixtures

CUTS = 6
"""Per run."""
COMMIT_SECONDS = 300
"""Interval at which ext4 commits its journal by itself: longer than a test."""


def system(*command):
    """Run a system command; return whether it succeeded."""
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class Disk:
    """An ext4 file system in a file. A copy of the file is the disk after a power cut."""

    def __init__(self, directory):
        self.image, self.place = directory / "image", directory / "disk"
        self.place.mkdir()
        self.copies = []

    def create(self):
        """Make and mount the file system; return whether that is possible."""
        with self.image.open("wb") as file:
            file.truncate(2**27)
        return system("mkfs.ext4", "-q", self.image) and self.mount(self.image)

    def mount(self, image):
        """Mount a file, replaying its journal as after a power cut."""
        return system("mount", "-o", f"loop,commit={COMMIT_SECONDS}", image, self.place)

    def unmount(self):
        """Unmount what is mounted."""
        return system("umount", self.place)

    def cut(self, child=None):
        """Copy the file as it is, without syncing; a running child is stopped meanwhile."""
        copy = self.image.with_name(f"cut-{len(self.copies)}")
        if child is not None:
            os.kill(child, signal.SIGSTOP)
            time.sleep(0.05)  # a sync under way ends
        assert system("cp", "--sparse=always", self.image, copy)
        if child is not None:
            os.kill(child, signal.SIGCONT)
        self.copies.append(copy)
        return copy


@pytest.fixture
def disk(tmp_path):
    """Mount a disk whose power can be cut."""
    disk = Disk(tmp_path)
    if shutil.which("mkfs.ext4") is None or not disk.create():
        pytest.skip("needs mkfs.ext4, loop devices, and to be root")
    yield disk
    disk.unmount()


def saved_steps(path):
    """Return the steps of the checkpoints that were reported as saved."""
    return [int(line) for line in path.read_text().split()] if path.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_power_cuts(base, children, uninterrupted, disk, tmp_path, capsys, seed):
    """story: power cuts at random moments and after the end; nothing that was reported is lost.

    Before files were synced, config.json and metrics.jsonl were empty, both checkpoints unreadable
    and the exported weights zeros.
    """
    rng, run, saves = np.random.default_rng(seed), disk.place / "run", tmp_path / "saves"
    command = arguments(base, run)
    child = children.start(command, saves=saves)
    cuts = []
    while len(cuts) < CUTS:
        await_changes(run, int(rng.integers(1, 7)))
        time.sleep(rng.uniform(0, 0.02))
        finished = (run / "finished").exists()
        steps = saved_steps(saves)
        cuts.append((disk.cut(None if finished else child), steps))
        if finished:
            break
    status, output = children.wait()
    assert status == 0, output
    cuts.append((disk.cut(), saved_steps(saves)))
    assert disk.unmount()
    outcomes = []
    for image, steps in cuts:
        assert disk.mount(image)
        begun, marked = (run / "config.json").exists(), (run / "finished").exists()
        status, output = children.run(command)
        assert status == 0 and "Traceback" not in output, output
        if marked:
            assert "is finished; give it more steps" in output
            outcome = "finished"
        elif "resuming" in output:
            step = int(output.partition("after rollout step ")[2].split()[0])
            assert step >= max(steps, default=0), (step, steps, output)
            outcome = f"step {step} of {max(steps, default=0)}"
        else:
            assert not steps and ("starting over" in output or not begun), (steps, output)
            outcome = "start"
        outcomes.append(outcome)
        assert_same(uninterrupted, run)
        assert disk.unmount()
    assert outcomes[-1] == "finished"
    with capsys.disabled():
        print(f"\n{len(cuts)} cuts: {', '.join(outcomes)}")
