"""Checkpoints: the same bits with the requested shardings, or a clear error."""

import asyncio
import gc
import json
import os
import shutil
import sys
import threading
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.serialization import serialization

from ntkrl import runtime, trees, update
from ntkrl.runtime import checkpoint
from ntkrl.types import TrainState
from tests.update.test_train_step import ADAM, HEAD, neox


def make_state(stage):
    """A sharded TrainState with moments that are not zero."""
    policy, params = neox(vocab_size=24)
    bound_stage = update.bind_stage(update.Stage(**stage), policy, params)
    state = update.init_state(bound_stage, params, jax.random.key(7), step=5)
    noisy = jax.tree.map(lambda leaf: leaf + jnp.ones((), leaf.dtype), state.opt_state)
    state = state.replace(opt_state=noisy)
    mesh = runtime.make_mesh(2, 2, 2)
    return jax.device_put(state, trees.shardings(state, policy.sharding, mesh))


@pytest.mark.parametrize("stage", [ADAM, HEAD], ids=["all", "head"])
def test_round_trip(tmp_path, stage):
    """law: params, moments, step, key and position come back bit for bit, placed alike."""
    state = make_state(stage)
    checkpoints = runtime.Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.latest() is None
    for step in (1, 2, 3):
        checkpoints.save(step, state, {"stage": 1, "num_tokens": 10 * step})
    checkpoints.close()
    again = runtime.Checkpoints(tmp_path / "c", keep=2)
    assert (again.steps(), again.latest()) == ([2, 3], 3)
    assert again.position(3) == {"stage": 1, "num_tokens": 30}
    result = again.restore(3, jax.tree.map(lambda leaf: leaf, state))
    assert jax.tree.structure(result) == jax.tree.structure(state)
    plain = lambda leaf: jax.random.key_data(leaf) if leaf.dtype == state.key.dtype else leaf  # noqa: E731
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(result), strict=True):
        np.testing.assert_array_equal(np.asarray(plain(a)), np.asarray(plain(b)))
    for a, b in zip(
        jax.tree.leaves(state.opt_state), jax.tree.leaves(result.opt_state), strict=True
    ):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_a_moving_reference_is_kept(tmp_path):
    """law: reference params come back bit for bit, none where there is none; params come alone."""
    plain = make_state(HEAD)
    moved = plain.replace(reference=jax.tree.map(lambda leaf: leaf + 1, plain.params))
    for name, state in (("plain", plain), ("moved", moved)):
        checkpoints = runtime.Checkpoints(tmp_path / name, keep=1)
        checkpoints.save(1, state, {})
        result = checkpoints.restore(1, state)
        checkpoints.close()
        assert jax.tree.structure(result) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, result.reference, state.reference)
        again = runtime.Checkpoints(tmp_path / name, keep=1)
        alone = again.restore_params(1, state.params)
        again.close()
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(state.params), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_claim(tmp_path):
    """law: a run directory belongs to one config; every difference is named."""
    runtime.claim_run_dir(tmp_path / "run", {"seed": 1, "model": {"path": "a"}})
    runtime.claim_run_dir(tmp_path / "run", {"seed": 1, "model": {"path": "a"}})
    with pytest.raises(ValueError, match="model.path: 'a' -> 'b'; seed: 1 -> 2"):
        runtime.claim_run_dir(tmp_path / "run", {"seed": 2, "model": {"path": "b"}})


def test_allowed_changes(tmp_path):
    """law: settings that change no number may change and are reported; refused ones apart."""
    begun = {"seed": 1, "mesh": {"data": 8}, "logging": {"wandb": None}, "checkpoint": {"keep": 2}}
    runtime.claim_run_dir(tmp_path, begun)
    assert runtime.check_run_dir(tmp_path, begun) == []
    moved = begun | {"mesh": {"data": 4}, "checkpoint": {"keep": 3}}
    assert runtime.check_run_dir(tmp_path, moved) == [
        "checkpoint.keep: 2 -> 3 (schedule and retention only, not the computation)",
        "mesh.data: 8 -> 4 (same numbers up to rounding)",
    ]
    with pytest.raises(ValueError) as caught:
        runtime.claim_run_dir(tmp_path, moved | {"seed": 2})
    assert (
        "another config: seed: 1 -> 2. Also changed, but allowed: checkpoint.keep: 2 -> 3"
        in str(caught.value)
    )
    assert json.loads((tmp_path / "config.json").read_text()) == begun
    runtime.claim_run_dir(tmp_path, moved)
    assert json.loads((tmp_path / "config.json").read_text()) == moved


def test_saving_does_not_wait_and_sees_no_later_step(tmp_path, monkeypatch):
    """law: a state donated and overwritten while it is written is saved as it was."""
    go_on, write = threading.Event(), serialization.async_serialize_from_host

    async def held_up(*arguments, **named):
        if not await asyncio.to_thread(go_on.wait, 60):
            go_on.set()  # saving waited for this, and fails below
        return await write(*arguments, **named)

    monkeypatch.setattr(serialization, "async_serialize_from_host", held_up)
    state = make_state(ADAM)
    before = jax.tree.map(np.array, state.params)
    checkpoints = runtime.Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, state, {})
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: 0 * x - 7, tree), donate_argnums=0)
    params = state.params
    for _ in range(3):
        params = overwrite(params)
    written, writing = checkpoints.steps(), checkpoints.manager.is_saving_in_progress()
    go_on.set()
    checkpoints.close()
    assert written == [] and writing and float(jax.tree.leaves(params)[0].min()) == -7.0
    again = runtime.Checkpoints(tmp_path, keep=2, reading=True)
    jax.tree.map(np.testing.assert_array_equal, again.restore_params(1, params), before)
    again.close()


@pytest.mark.parametrize("mode, best", [("max", 3), ("min", 2)])
def test_the_best_stay(tmp_path, mode, best):
    """by hand: of rewards 5, 0, 9, none, 4, 4 at steps 1 to 6 the best, and the newest two."""
    checkpoints = runtime.Checkpoints(tmp_path, 2, runtime.Best(1, "eval/reward", mode))
    state = make_state(HEAD)
    for step, reward in enumerate((5.0, 0.0, 9.0, None, 4.0, 4.0), start=1):
        metrics = {"loss": 1.0} if reward is None else {"loss": 1.0, "eval/reward": reward}
        checkpoints.save(step, state, {}, metrics)
    checkpoints.close()
    again = runtime.Checkpoints(tmp_path, 2, runtime.Best(1, "eval/reward", mode), reading=True)
    assert (again.steps(), again.best_step(), again.latest()) == ([best, 5, 6], best, 6)
    again.close()
    # ranked by another metric from now on: those before count least
    again = runtime.Checkpoints(tmp_path, 1, runtime.Best(1, "loss", mode))
    again.save(7, state, {}, {"loss": 2.0})
    again.save(8, state, {}, {"loss": float("nan")})
    again.close()
    assert (again.steps(), again.best_step()) == ([7, 8], 7)


DAMAGES = {
    "a bit of an array": lambda place: flip(place / "state", -1),
    "a bit of the index": lambda place: flip(place / "state", 0),
    "array file cut short": lambda place: cut(place / "state"),
    "array file missing": lambda place: largest(place / "state").unlink(),
    "no arrays": lambda place: shutil.rmtree(place / "state"),
    "empty directory": lambda place: (shutil.rmtree(place), place.mkdir()),
    "a digit of the position": lambda place: replace(place / "position/metadata", "3", "8"),
    "position cut short": lambda place: replace(place / "position/metadata", "}", ""),
    "no position": lambda place: shutil.rmtree(place / "position"),
    "no sums": lambda place: shutil.rmtree(place / "sums"),
    "a digit of the sums": lambda place: replace(place / "sums/metadata", "1", "2"),
}


def largest(place):
    """The file that holds most bytes of arrays."""
    return max(place.rglob("d/*"), key=lambda path: path.stat().st_size)


def flip(place, where):
    """Change a bit of the arrays (-1), or of the index that leads to them (0)."""
    path = largest(place) if where else place / "manifest.ocdbt"
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 4
    path.write_bytes(content)


def cut(place):
    """Lose the second half of the largest file."""
    path = largest(place)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace(path, old, new):
    """Change the text of a file."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_noticed(tmp_path, name):
    """law: whatever of a checkpoint changes, it is not read as if it had not."""
    state = make_state(ADAM)
    noise = jax.random.normal(jax.random.key(1), (200, 300))  # does not compress
    noise = jax.device_put(noise, runtime.replicated(runtime.make_mesh(2, 2, 2)))
    state = state.replace(params={**state.params, "noise": noise})
    checkpoints = runtime.Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, state, {"num_tokens": 123})
    checkpoints.save(2, state, {"num_tokens": 123})
    checkpoints.close()
    DAMAGES[name](tmp_path / "2")
    again = runtime.Checkpoints(tmp_path, keep=2)
    with pytest.raises(runtime.CorruptCheckpointError) as caught:
        again.position(2)
        again.restore(2, state)
    if name == "a bit of an array":
        assert str(caught.value) == "bits of params/noise have changed since they were saved"
    assert again.position(1) == {"num_tokens": 123}
    again.quarantine(2)
    assert again.steps() == [1] and (tmp_path / "2.damaged").is_dir()
    again.save(2, state, {"num_tokens": 5})  # the step is free again
    again.close()
    assert again.steps() == [1, 2] and again.position(2) == {"num_tokens": 5}


def test_synced_before_an_older_one_goes(tmp_path, monkeypatch):
    """law: every file of a checkpoint is synced before its name appears, its name before removals.

    Without this a power cut leaves empty JSON files in the newest checkpoint, and no older ones.
    """
    events, (fsync, rename, rmtree) = [], (os.fsync, os.rename, shutil.rmtree)

    def record_fsync(descriptor):
        fsync(descriptor)
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))

    def record_rename(source, target, **options):
        events.append(("rename", Path(source), Path(target)))
        rename(source, target, **options)

    def record_rmtree(path, *arguments, **options):
        events.append(("remove", Path(path)))
        rmtree(path, *arguments, **options)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    monkeypatch.setattr(shutil, "rmtree", record_rmtree)
    checkpoints = runtime.Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, make_state(HEAD), {})
    checkpoints.save(2, make_state(HEAD), {})
    checkpoints.close()
    named = next(i for i, event in enumerate(events) if event[-1] == tmp_path / "2")
    removed = next(i for i, e in enumerate(events) if e[0] == "remove" and e[1] == tmp_path / "1")
    assert events[named][0] == "rename" and named < removed
    temporary = events[named][1]
    synced = {
        event[1].relative_to(temporary) for event in events[:named] if temporary in event[1].parents
    }
    files = {path.relative_to(tmp_path / "2") for path in (tmp_path / "2").rglob("*")}
    late = {Path("commit_success.txt"), Path("_CHECKPOINT_METADATA")}
    assert files - synced <= late and {Path("position/metadata"), Path("state/d")} <= synced
    assert ("sync", tmp_path) in events[named:removed]
    assert all(("sync", tmp_path / "2" / name) in events[named:removed] for name in late & files)


def test_broken_metrics_rank_nothing(tmp_path):
    """law: metrics that are not JSON leave a checkpoint valid, but unranked."""
    best = runtime.Best(1, "reward", "max")
    checkpoints = runtime.Checkpoints(tmp_path, 3, best)
    for step, reward in ((1, 1.0), (2, 2.0)):
        checkpoints.save(step, make_state(HEAD), {}, {"reward": reward})
    checkpoints.close()
    (tmp_path / "2" / "metrics" / "metrics").write_text('{"rew')
    again = runtime.Checkpoints(tmp_path, 3, best)
    assert (again.steps(), again.best_step(), again.position(2)) == ([1, 2], 1, {})
    again.close()


@pytest.fixture
def unraisable(monkeypatch):
    """Return the reports on exceptions that no code can catch."""
    reports = []
    monkeypatch.setattr(checkpoint, "_default_hook", reports.append)
    return reports


def test_writes_that_end_late_are_not_told(small_disk, unraisable):
    """story: on a full disk one sentence, and no trace of each other array's write."""
    params = {f"{n}": jax.random.normal(jax.random.key(n), (256, 256)) for n in range(40)}
    state = TrainState(step=jnp.int32(0), params=params, opt_state=None, key=jax.random.key(0))
    checkpoints = runtime.Checkpoints(small_disk("4m") / "c", keep=1)
    with pytest.raises(runtime.CheckpointWriteError, match="no space left on the device"):
        checkpoints.save(1, state, {})
        checkpoints.finish_saving()
    checkpoints.close()
    assert unraisable == [] and checkpoints.steps() == []


def test_others_are_told(unraisable):
    """by hand: a closed loop that the package's code called, and any other exception."""
    loop = asyncio.new_event_loop()
    loop.close()
    with pytest.raises(RuntimeError, match="Event loop is closed") as closed:
        loop.call_soon_threadsafe(print)
    late = closed.value.__traceback__.tb_next
    for error, trace in ((closed.value, closed.tb), (ValueError("x"), late), (closed.value, late)):
        fields = {"exc_type": type(error), "exc_value": error, "exc_traceback": trace}
        sys.unraisablehook(types.SimpleNamespace(**fields, err_msg=None, object=None))
    assert [str(report.exc_value) for report in unraisable] == ["Event loop is closed", "x"]


def test_failed_writes_are_logged_once(caplog):
    """by hand: asyncio's log of an exception within Orbax is dropped, of another it is not."""

    async def fail():
        raise OSError("No space left on device")

    async def fail_in_orbax():
        await serialization.async_serialize_from_host(None, None)

    async def fail_in_tensorstore():
        error = ValueError("Failed writing: No space left on device [os_error_code='28']")
        asyncio.get_running_loop().create_future().set_exception(error)

    async def forget(function):
        await asyncio.wait([asyncio.ensure_future(function())])

    for function, count in ((fail_in_orbax, 0), (fail_in_tensorstore, 0), (fail, 1)):
        asyncio.run(forget(function))
        gc.collect()
        logged = [record for record in caplog.records if record.name == "asyncio"]
        assert len(logged) == count


def test_numbered_directories_of_others(tmp_path):
    """law: they are refused by name: as old checkpoints they would be removed."""
    state = make_state(HEAD)
    checkpoints = runtime.Checkpoints(tmp_path, keep=1)
    checkpoints.save(3, state, {})
    checkpoints.close()
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"1/notes.txt: not of a checkpoint.*move it out of"):
        runtime.Checkpoints(tmp_path, keep=1)
    assert (tmp_path / "1" / "notes.txt").read_text() == "mine"
    (tmp_path / "1").rename(tmp_path / "notes")
    runtime.Checkpoints(tmp_path, keep=1).close()


def test_a_second_damaged_checkpoint_of_a_step(tmp_path):
    """law: it is kept beside the first."""
    checkpoints = runtime.Checkpoints(tmp_path, keep=1)
    for name in ("3.damaged", "3.damaged.2"):
        checkpoints.save(3, make_state(HEAD), {})
        checkpoints.finish_saving()
        assert checkpoints.quarantine(3) == tmp_path / name
    assert {path.name for path in tmp_path.iterdir()} == {"3.damaged", "3.damaged.2"}
    checkpoints.close()
