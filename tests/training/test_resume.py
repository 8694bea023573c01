"""Runs that resume after a kill, a request to stop, other devices or a lost disk."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from ntkrl.main import main
from tests.children import Children
from tests.training.test_train import ROOT, STAGES, UNWATCHED, base, lines, words

__all__ = ["base"]  # a fixture


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """Children that share compiled programs."""
    result = Children(tmp_path_factory.mktemp("children"))
    yield result
    result.close()


PROBED = ["--config.eval.every_steps=3", "--config.probe.every_steps=2"]
PROBED.append("--config.probe.ledger_every_steps=5")


def arguments(base, run, *more):
    """A classifier-first run that saves after every step, and neither evaluates nor probes."""
    more = [*STAGES, *UNWATCHED, "--config.checkpoint.every_steps=1", *more]
    return words(base, run, *more, config="cfrl")


@pytest.fixture(scope="module")
def uninterrupted(base, children, tmp_path_factory):
    """A run that was never killed."""
    run = tmp_path_factory.mktemp("runs") / "unprobed"
    return completed(children, arguments(base, run), run)


@pytest.fixture(scope="module")
def probed(base, children, tmp_path_factory):
    """A run with evaluations, probes and ledgers that was never killed."""
    run = tmp_path_factory.mktemp("runs") / "probed"
    return completed(children, arguments(base, run, *PROBED), run)


def completed(children, command, run):
    """Run a command to its end; return the run."""
    status, output = children.run(command)
    assert status == 0, output
    return run


def assert_same(uninterrupted, broken):
    """Metrics, probes, completions and exported weights are the same bits."""
    assert (uninterrupted / "metrics.jsonl").read_bytes() == (broken / "metrics.jsonl").read_bytes()
    exported = [run / "export" / "model.safetensors" for run in (uninterrupted, broken)]
    assert exported[0].read_bytes() == exported[1].read_bytes()
    logged = [
        {path.name: path.read_bytes() for path in (run / "rollouts").iterdir()}
        for run in (uninterrupted, broken)
    ]
    assert logged[0] == logged[1] and logged[0].keys() == {"steps_000001.jsonl.gz"}
    looks = [
        sorted(p.relative_to(run) for p in run.glob("[pl]*/*.*")) for run in (uninterrupted, broken)
    ]
    probed = any("probe/entropy" in line for line in lines(uninterrupted))
    files = 2 + 6 + 2 * 2 if probed else 0  # the set, probes, ledgers
    assert looks[0] == looks[1] and len(looks[0]) == files
    for name in looks[0]:
        if name.suffix == ".json":
            assert (uninterrupted / name).read_bytes() == (broken / name).read_bytes()
            continue
        for key, array in np.load(uninterrupted / name).items():
            np.testing.assert_array_equal(array, np.load(broken / name)[key])


def seen(run):
    """Return the parts of a run directory that change during a run."""
    try:
        sizes = [(run / name).stat().st_size for name in ("metrics.jsonl", "timings.jsonl")]
        return sizes, sorted(os.listdir(run / "checkpoints"))
    except FileNotFoundError:
        return None


def await_changes(run, count):
    """Return when the run directory has changed so many times, or the run is finished."""
    before = seen(run)
    while count and not (run / "finished").exists():
        now = seen(run)
        count -= now != before
        before = now
        time.sleep(0.0005)


def half_written(run):
    """Return whether the directory has a partial checkpoint."""
    return bool(list((run / "checkpoints").glob("*.orbax-checkpoint-tmp*")))


def killed_at_random(children, command, run, rng, kills):
    """Kill a run up to `kills` times, then let it finish; return how often, and in a save."""
    killed, in_save = 0, 0
    while True:
        child = children.start(command)
        if killed < kills:
            await_changes(run, int(rng.integers(1, 20)))
            time.sleep(rng.uniform(0, 0.01))
            if not (run / "finished").exists():
                os.kill(child, signal.SIGKILL)
        status, output = children.wait()
        if status == 0:
            return killed, in_save
        assert status == -signal.SIGKILL, output
        killed, in_save = killed + 1, in_save + half_written(run)
        if (run / "metrics.jsonl").exists() and rng.random() < 0.5:  # a line that was cut short
            with (run / "metrics.jsonl").open("a") as file:
                file.write('{"step": 99, "rollout_st')


def test_killed_in_a_save(base, children, probed, tmp_path):
    """story: SIGKILL where a checkpoint is written but not yet named; it counts for nothing."""
    run = tmp_path / "run"
    status, output = children.run(arguments(base, run, *PROBED), dies_in_save=4)
    assert status == -signal.SIGKILL, output
    assert half_written(run) and not (run / "checkpoints" / "4").exists()
    status, output = children.run(arguments(base, run, *PROBED))
    assert status == 0, output
    assert "after rollout step 3" in output and not half_written(run)
    assert_same(probed, run)
    result = lines(probed)
    assert len({line["reward"] for line in result[1:]}) > 3  # something was learnt from
    assert [line["stage"] for line in result[1:]] == ["classifier"] * 4 + ["all"] * 6
    # the first stage left the body alone: the features of the probe set have not moved
    drift = {
        line["step"]: line["probe/feature_distortion"] for line in result if "probe/entropy" in line
    }
    assert drift[4] == 0.0 and drift[6] > 0.0
    shares = [line["predict/head_share"] for line in result if "predict/head_share" in line]
    assert shares[:2] == [1.0, 1.0] and shares[2] < 1.0


def test_killed_at_any_moment(base, children, uninterrupted, tmp_path):
    """story: SIGKILL at six random moments; metrics and weights as if never killed."""
    rng, killed, number = np.random.default_rng(3), 0, 0
    while killed < 6:
        run = tmp_path / str(number)
        killed += killed_at_random(children, arguments(base, run), run, rng, 6 - killed)[0]
        assert_same(uninterrupted, run)
        number += 1


@pytest.mark.slow
def test_killed_at_many_moments(base, children, probed, tmp_path, capsys):
    """story: SIGKILL at fifty random moments, some of them inside a save."""
    rng, killed, in_save, number = np.random.default_rng(4), 0, 0, 0
    while killed < 50:
        run = tmp_path / str(number)
        result = killed_at_random(children, arguments(base, run, *PROBED), run, rng, 12)
        killed, in_save, number = killed + result[0], in_save + result[1], number + 1
        assert_same(probed, run)
    with capsys.disabled():
        print(f"\n{killed} kills in {number} runs, {in_save} of them inside a save")
    assert in_save > 5


def stopped(children, command, run, changes, sent=signal.SIGTERM, **settings):
    """Start a command, send a signal after some changes of its run directory; return its step."""
    child = children.start(command, **settings)
    await_changes(run, changes)
    os.kill(child, sent)
    status, output = children.wait()
    assert status == 75, output
    step = int(lines(run)[-1]["rollout_step"])
    assert f"stopped by {sent.name}; saved step {step}; run the same command again" in output
    assert f"{sent.name}: finishing the current rollout step, to save and stop; press" in output
    assert "Traceback" not in output and not half_written(run)
    assert (run / "checkpoints" / str(step)).exists()
    return step


def test_sigterm_saves_and_leaves(base, children, uninterrupted, tmp_path, capsys):
    """story: SIGTERM saves after the rollout step under way, status 75; the command goes on."""
    run = tmp_path / "run"
    rewards = shutil.copy(ROOT / "tests" / "toy_rewards.py", tmp_path)
    function = f"--config.reward.function={rewards}:score"
    rarely = "--config.checkpoint.every_steps=100"
    step = stopped(children, arguments(base, run, rarely, function), run, 8)
    assert 1 <= step < 10
    assert [path.name for path in (run / "checkpoints").iterdir()] == [str(step)]
    left = {int(line["rollout_step"]): line["reward"] for line in lines(uninterrupted)[1 + step :]}
    mode, better = ("max", max) if min(left, key=left.get) == 10 else ("min", min)
    ranked = [f"--config.checkpoint.{word}" for word in ("keep=1", "keep_best=1")]
    ranked.append(f"--config.checkpoint.best_mode={mode}")
    with open(rewards, "a") as file:
        file.write("# the same, in other words\n")
    status, output = children.run(arguments(base, run, *ranked, function))
    assert status == 0, output
    assert f"{rewards} has changed since step {step} was saved" in output
    assert "the config has changed: checkpoint.every_steps: 100 -> 1 (schedule and" in output
    assert_same(uninterrupted, run)
    # of those saved since then, the best stays beside the newest
    best = better(left, key=left.get)
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {str(best), "10"} and best < 10
    for name, number in ((f"--step={best}", best), ("--step=best", best), ("--step=10", 10)):
        assert main(["export", str(run), str(tmp_path / name), name]) == 0  # on eight devices
        assert f"step {number} of {run} written" in "".join(capsys.readouterr())
    files = [tmp_path / f"--step={best}", tmp_path / "--step=best", tmp_path / "--step=10"]
    files = [(place / "model.safetensors").read_bytes() for place in [*files, run / "export"]]
    assert files[0] == files[1] != files[2] == files[3]
    assert main(["export", str(uninterrupted), str(tmp_path / "x"), "--step=best"]) == 2
    assert "ranks no checkpoints" in capsys.readouterr().err


def damage(checkpoint):
    """Flip a bit of the largest file, which holds the arrays."""
    path = max(checkpoint.rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_damaged_checkpoints(base, children, uninterrupted, tmp_path):
    """story: a damaged checkpoint is reported and moved aside, and the one before is restored.

    So are the lines that it stands on, of which none was left.
    """
    run, other = tmp_path / "run", tmp_path / "other"
    kept = "--config.checkpoint.keep=3"
    step = stopped(children, arguments(base, run, kept), run, 20, signal.SIGINT)
    damage(run / "checkpoints" / str(step))
    shutil.rmtree(run / "checkpoints" / str(step - 1))
    (run / "checkpoints" / str(step - 1)).mkdir()
    shutil.copytree(run, other)
    (run / "metrics.jsonl").unlink()
    status, output = children.run(arguments(base, run, kept))
    assert status == 0, output
    restored = f"metrics.jsonl is missing; all {step - 1} are restored from the copy in the"
    assert restored in output  # up to step - 2, and the line before the first step
    assert f"the checkpoint of step {step} is damaged (" in output, output
    assert f"the checkpoint of step {step - 1} is damaged (KeyError: " in output
    assert f"going back to step {step - 2}" in output
    assert (run / "checkpoints" / f"{step}.damaged").is_dir()
    assert_same(uninterrupted, run)
    swapped = json.loads((other / "config.json").read_text()) | {"seed": 5}
    (other / "config.json").write_text(json.dumps(swapped))
    status, output = children.run(arguments(base, other, kept, "--config.seed=5"))
    assert status == 2 and f"the checkpoint of step {step} in {other}" in output
    assert "was begun with another config: seed: 0 -> 5." in output
    (other / "config.json").write_text(json.dumps(swapped | {"seed": 0}))
    damage(other / "checkpoints" / str(step - 2))
    before = (other / "metrics.jsonl").read_bytes()
    status, output = children.run(arguments(base, other, kept))
    assert status == 2 and "can be read (step" in output and "remove the run directory" in output
    assert (other / "metrics.jsonl").read_bytes() == before
    assert (other / "checkpoints" / str(step)).is_dir()


def test_a_finished_run_is_checked(base, children, uninterrupted, tmp_path):
    """story: run again, a finished run that has lost files is mended, or refused, not believed."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    content = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(content[: len(content) // 2])
    shutil.rmtree(run / "export")
    status, output = children.run(arguments(base, run))
    assert status == 0, output
    half = content[: len(content) // 2].count(b"\n")
    assert f"is marked as finished, but metrics.jsonl has {half} of 11 lines; export/" in output
    assert "resuming from the last checkpoint" in output and "after rollout step 10" in output
    assert_same(uninterrupted, run)
    status, output = children.run(arguments(base, run))
    assert status == 0 and "is finished; give it more steps" in output
    shutil.rmtree(run / "export")
    shutil.rmtree(run / "checkpoints")
    status, output = children.run(arguments(base, run))
    assert status == 2 and "model.safetensors is missing" in output
    assert "has no checkpoint to mend it from: put the files back" in output
    assert (run / "metrics.jsonl").read_bytes() == content
    (run / "finished").unlink()
    status, output = children.run(arguments(base, run))
    assert status == 0, output
    assert f"{run} has no checkpoint yet: starting over; 11 lines of metrics.jsonl are" in output
    assert_same(uninterrupted, run)


def test_another_number_of_devices(base, children, tmp_path):
    """story: begun on eight devices, gone on with on four and on one: parameters within 1e-5."""
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    # SGD: Adam would turn rounding of gradients that are zero into steps of a full rate
    more = [
        "--config.stages[0].steps=6",
        "--config.stages[0].optimizer=sgd",
        "--config.stages[0].parameters=(('.*', 1e-1),)",
        *UNWATCHED,
        "--config.checkpoint.every_steps=1",
    ]
    status, output = children.run(words(base, alone, *more))
    assert status == 0, output

    def on(data, fsdp, tensor):
        mesh = {"data": data, "fsdp": fsdp, "tensor": tensor}
        return words(base, moved, *more, *(f"--config.mesh.{k}={v}" for k, v in mesh.items()))

    first = stopped(children, on(2, 2, 2), moved, 3, devices=8)
    second = stopped(children, on(1, 4, 1), moved, 3, devices=4)
    assert 0 < first < second < 6
    status, output = children.run(on(1, 1, 1))
    assert status == 0 and f"after rollout step {second}" in output
    assert "mesh.fsdp: 4 -> 1 (same numbers up to rounding)" in output
    exports = [load_file(run / "export" / "model.safetensors") for run in (alone, moved)]
    start = load_file(base / "model.safetensors")
    assert max(np.abs(exports[0][name] - start[name]).max() for name in start) > 1e-3
    for name in start:
        np.testing.assert_allclose(exports[1][name], exports[0][name], atol=1e-5)


def test_full_disk(base, children, uninterrupted, small_disk, tmp_path):
    """story: no space for more checkpoints: reported, the run continues, and stops at the third."""
    pages = sum(
        -(-p.stat().st_size // 4096) + 1 for p in (uninterrupted / "checkpoints/10").rglob("*")
    )
    disk, run = small_disk(pages * 4096 * 3 // 2), tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(disk)
    status, output = children.run(arguments(base, run))
    assert status == 2 and "Traceback" not in output
    good = max(int(path.name) for path in disk.iterdir())  # fails where one is half written
    message = "could not be written: no space left on the device; the last good checkpoint is step"
    assert output.count(f"{message} {good} in ") == 3 and output.count("; going on") == 2
    assert "3 in a row failed (checkpoint.failures); make room" in output
    small_disk(pages * 4096 * 20, "remount")
    status, output = children.run(arguments(base, run))
    assert status == 0 and f"after rollout step {good}" in output, output
    assert_same(uninterrupted, run)
