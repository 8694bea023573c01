"""A GPU's results against the CPU's: `JAX_PLATFORMS=cuda,cpu pytest -m gpu`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl import models, ntk, rollout, scoring, update
from ntkrl.types import PromptBatch, UpdateBatch
from tests.oracles import dense_kernel

pytestmark = pytest.mark.gpu
CONFIG = {
    "vocab_size": 311,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def device(kind):
    """The first device of a kind; the test is skipped where there is none."""
    try:
        return jax.local_devices(backend=kind)[0]
    except RuntimeError:
        pytest.skip(f"JAX finds no {kind} here")


def model(kind, dtype=jnp.float32, **changes):
    """The same weights on a device, drawn on the processor."""
    device("gpu")
    with jax.default_device(device("cpu")):
        policy, params = models.build(
            "GPTNeoXForCausalLM", CONFIG | changes, jax.random.key(0), dtype=dtype
        )
    return policy, jax.device_put(params, device(kind))


def tokens(rows=6, length=24):
    """Random ids `[rows, length]`."""
    return np.random.default_rng(0).integers(2, CONFIG["vocab_size"], (rows, length))


def test_kernels_equal_brute_force(x64):
    """oracle: K, R + G and its factors on the GPU, float64, ≤ 1e-10 of a dense Jacobian's there."""
    small = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
    small["num_attention_heads"] = 2
    policy, params = model("gpu", jnp.float64, **small)
    where = ntk.last_positions(jnp.asarray(tokens(3, 7) % 29))
    expected = dense_kernel(policy, params, where, where)
    kernel = ntk.kernel(policy, params, where)
    factored = ntk.factored(kernel)
    written = jnp.einsum("vd,oude,we->ouvw", factored.weight, factored.body, factored.weight)
    written += factored.head[..., None, None] * jnp.eye(29)
    for result in (kernel.dense(), written):
        assert {place.platform for place in result.devices()} == {"gpu"}
        assert jnp.abs(result - expected).max() <= 1e-10 * jnp.abs(expected).max()


def test_log_probs_equal_the_processors():
    """law: float32 log-probs are the processor's, ≤ 1e-4 nats."""
    values = []
    for kind in ("cpu", "gpu"):
        policy, params = model(kind)
        ids = jax.device_put(tokens(), device(kind))
        values.append(scoring.score(policy, params, ids, ids > 0, 16).log_probs)
    assert np.abs(np.asarray(values[0]) - np.asarray(values[1])).max() <= 1e-4


def test_the_sampler_equals_the_trainer():
    """law: log-probs recorded while drawing are those of reading again, ≤ 2e-5 nats."""
    policy, params = model("gpu")
    ids = jnp.asarray(tokens(4, 8))
    batch = PromptBatch(tokens=ids, mask=ids > 0, rows=jnp.arange(4), copies=jnp.zeros(4, int))
    settings = rollout.SamplerSettings(4, 24, 1.0, end_ids=(), pad_id=0)
    drawn = rollout.Sampler(policy, settings)(params, batch, jax.random.key(1))
    again = scoring.score(policy, params, drawn.tokens, drawn.mask, 24).log_probs
    assert jnp.abs(again - drawn.sampler_log_probs).max() <= 2e-5


def test_a_step_equals_the_processors():
    """law: a step of SGD on W alone is the processor's to 1e-4; frozen leaves keep their bits."""
    moved = []
    for kind in ("cpu", "gpu"):
        policy, params = model(kind)
        with jax.default_device(device(kind)):
            ids = jnp.asarray(tokens())
            old = scoring.score(policy, params, ids, ids > 0, 16).log_probs
            draw = np.random.default_rng(1).normal(size=(6, 16)).astype(np.float32)
            part = UpdateBatch(
                tokens=ids,
                mask=ids > 0,
                completion_mask=jnp.ones((6, 16), bool),
                old_log_probs=old,
                ref_log_probs=old,
                advantages=jnp.asarray(draw),
            )
            rates = (("head/.*", 1e-2), (".*", None))
            stage = update.Stage("head", 1, rates, optimizer="sgd", max_grad_norm=None)
            bound_stage = update.bind_stage(stage, policy, params)
            loss = lambda read, rows: update.policy_loss(update.PRESETS["grpo"], 16, read, rows)  # noqa: E731
            step = jax.jit(update.make_step(bound_stage, update.policy_loss_fn(policy, loss), 1))
            after = step(update.init_state(bound_stage, params, jax.random.key(0)), part)[0].params
        change = jax.tree.map(lambda new, then: np.asarray(new) - np.asarray(then), after, params)
        moved.append(change.pop("head")["weight"])
        assert not any(leaf.any() for leaf in jax.tree.leaves(change))
    assert np.abs(moved[0] - moved[1]).max() <= 1e-4 * np.abs(moved[0]).max()
