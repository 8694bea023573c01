"""Checkpoints give back the same bits, with the shardings asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl import runtime, trees, update
from tests.update.test_step import ADAM, HEAD, neox


def make_state(stage):
    """A sharded TrainState with moments that are not zero."""
    policy, params = neox(vocab_size=24)
    program = update.stage_program(update.Stage(**stage), policy, params)
    state = update.init_state(program, params, jax.random.key(7), step=5)
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
    found = again.restore(3, jax.tree.map(lambda leaf: leaf, state))
    assert jax.tree.structure(found) == jax.tree.structure(state)
    plain = lambda leaf: jax.random.key_data(leaf) if leaf.dtype == state.key.dtype else leaf  # noqa: E731
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(np.asarray(plain(a)), np.asarray(plain(b)))
    for a, b in zip(
        jax.tree.leaves(state.opt_state), jax.tree.leaves(found.opt_state), strict=True
    ):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_a_moving_reference_is_kept(tmp_path):
    """law: reference params come back bit for bit, none where there is none; params come alone."""
    plain = make_state(HEAD)
    moved = plain.replace(reference=jax.tree.map(lambda leaf: leaf + 1, plain.params))
    for name, state in (("plain", plain), ("moved", moved)):
        checkpoints = runtime.Checkpoints(tmp_path / name, keep=1)
        checkpoints.save(1, state, {})
        found = checkpoints.restore(1, state)
        checkpoints.close()
        assert jax.tree.structure(found) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, found.reference, state.reference)
        again = runtime.Checkpoints(tmp_path / name, keep=1)
        alone = again.restore_params(1, state.params)
        again.close()
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(state.params), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_claim(tmp_path):
    """law: a run directory belongs to one config; every difference is named."""
    runtime.claim(tmp_path / "run", {"seed": 1, "model": {"path": "a"}})
    runtime.claim(tmp_path / "run", {"seed": 1, "model": {"path": "a"}})
    with pytest.raises(ValueError, match="model.path: 'a' -> 'b'; seed: 1 -> 2"):
        runtime.claim(tmp_path / "run", {"seed": 2, "model": {"path": "b"}})
