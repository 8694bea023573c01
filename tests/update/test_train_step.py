"""Stages and the train step: freezing, tied heads, sharding, micro-laws."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ntkrl
from ntkrl import numerics, runtime, trees, update
from ntkrl.types import UpdateBatch
from tests.toys import TINY, toy_params, toy_policy

ADAM = {"name": "all", "steps": 5, "parameters": ((".*", 1e-2),), "max_grad_norm": 1.0}
HEAD = {"name": "head", "steps": 5, "parameters": (("head/.*", 1e-2), (".*", None))}
RLOO = update.PRESETS["rloo"]


def rloo(statistics, batch):
    """Return the RLOO loss with the signature that the step expects."""
    return update.policy_loss(RLOO, 3, statistics, batch)


def neox(**overrides):
    """A tiny GPT-NeoX."""
    return ntkrl.build("GPTNeoXForCausalLM", {**TINY, **overrides}, jax.random.key(0))


def make_batch(vocab, rows=8, seed=0):
    """Left-padded prompts of 4 columns, completions of 3, everything random."""
    rng = np.random.default_rng(seed)
    mask = np.ones((rows, 7), bool)
    mask[:, 0] = rng.random(rows) < 0.5
    completion_mask = np.arange(3) < rng.integers(1, 4, rows)[:, None]
    mask[:, 4:] = completion_mask
    return UpdateBatch(
        tokens=jnp.asarray(rng.integers(0, vocab, (rows, 7))),
        mask=jnp.asarray(mask),
        completion_mask=jnp.asarray(completion_mask),
        old_log_probs=jnp.asarray(-rng.exponential(size=(rows, 3)), jnp.float32),
        ref_log_probs=jnp.asarray(-rng.exponential(size=(rows, 3)), jnp.float32),
        advantages=jnp.asarray(np.repeat(rng.normal(size=(rows, 1)), 3, axis=1), jnp.float32),
    )


def run(policy, params, stage, batches, jit=True):
    """Take a step per batch; return the state and the last metrics."""
    bound_stage = update.bind_stage(update.Stage(**stage), policy, params)
    step = update.make_step(bound_stage, update.policy_loss_fn(policy, rloo))
    step = jax.jit(step) if jit else step
    state = update.init_state(bound_stage, params, jax.random.key(0))
    for batch in batches:
        state, metrics, _ = step(state, batch)
    return state, metrics


def test_frozen_leaves_are_bit_identical_and_cost_nothing():
    """law: a head-only stage moves W, leaves every other bit alone and keeps no state for it."""
    policy, params = neox()
    batches = [make_batch(policy.vocab_size, seed=s) for s in range(3)]
    state, _ = run(policy, params, HEAD | {"optimizer": "adamw", "weight_decay": 0.1}, batches)
    before, after = trees.named_leaves(params), trees.named_leaves(state.params)
    for name in before:
        same = np.array_equal(np.asarray(before[name]), np.asarray(after[name]))
        assert same == (name != "head/weight"), name
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert [leaf.shape for leaf in moments] == [(23, 16)] * 2  # Adam's two, of W alone


def test_head_stage_has_no_body_gradient_in_its_program():
    """law: the compiled head-only step holds no array shaped like a body gradient's transpose.

    The backward pass through a layer would multiply by the MLP's transposed kernel; counting
    matrix products sees it whatever the layout: the head stage needs two more than a forward.
    """
    policy, params = neox()

    def products(stage):
        bound_stage = update.bind_stage(update.Stage(**stage), policy, params)
        state = update.init_state(bound_stage, params, jax.random.key(0))
        step = update.make_step(bound_stage, update.policy_loss_fn(policy, rloo))
        text = str(jax.make_jaxpr(step)(state, make_batch(policy.vocab_size)))
        return text.count("dot_general")

    forward = str(
        jax.make_jaxpr(lambda p, b: policy.head(p, policy.features(p, b.tokens, b.mask)))(
            params, make_batch(policy.vocab_size)
        )
    ).count("dot_general")
    assert products(HEAD) == forward + 1  # dW; no product goes back into the features
    assert products(ADAM) > 2 * forward


def test_step_equals_plain_optax(x64):
    """oracle: gradient of the full tree and optax.adam by hand, no partition."""
    policy = toy_policy()
    params = toy_params(policy, dtype=jnp.float64)
    batch = make_batch(policy.vocab_size)
    state, metrics = run(policy, params, ADAM | {"max_grad_norm": None}, [batch])

    def loss(p):
        from ntkrl.scoring import score

        return numerics.mean(rloo(score(policy, p, batch.tokens, batch.mask, 3), batch)[0])

    gradient = jax.grad(loss)(params)
    optimizer = optax.adam(1e-2)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    expected = optax.apply_updates(params, updates)
    for name, leaf in trees.named_leaves(expected).items():
        np.testing.assert_allclose(state.params[name], leaf, rtol=1e-12)
    np.testing.assert_allclose(metrics["loss"], loss(params), rtol=1e-12)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-12)


def test_each_group_has_its_own_rate():
    """law: with SGD, each row of the pattern list sets the rate of its group."""
    policy = toy_policy()
    params = toy_params(policy)
    batch = make_batch(policy.vocab_size)
    sgd = {"name": "x", "steps": 1, "optimizer": "sgd", "max_grad_norm": None}
    single, _ = run(policy, params, sgd | {"parameters": ((".*", 0.1),)}, [batch])
    two, _ = run(
        policy, params, sgd | {"parameters": (("head", 0.3), ("mix", None), (".*", 0.1))}, [batch]
    )
    moved = {n: np.asarray(single.params[n] - params[n]) for n in params}
    np.testing.assert_allclose(two.params["head"] - params["head"], 3 * moved["head"], atol=1e-6)
    np.testing.assert_allclose(two.params["embed"] - params["embed"], moved["embed"], atol=1e-6)
    np.testing.assert_array_equal(two.params["mix"], params["mix"])


def test_jit_changes_nothing_and_compiles_once():
    """law: jitted = not jitted to rounding; three steps of one shape are one compilation."""
    policy = toy_policy()
    params = toy_params(policy)
    batches = [make_batch(policy.vocab_size, seed=s) for s in range(3)]
    plain, _ = run(policy, params, ADAM, batches, jit=False)
    bound_stage = update.bind_stage(update.Stage(**ADAM), policy, params)
    step = jax.jit(update.make_step(bound_stage, update.policy_loss_fn(policy, rloo)))
    state = update.init_state(bound_stage, params, jax.random.key(0))
    for batch in batches:
        state, *_ = step(state, batch)
    assert step._cache_size() == 1
    for name in params:
        np.testing.assert_allclose(state.params[name], plain.params[name], rtol=2e-4, atol=1e-6)


# Adam divides by the gradient's own size: where a gradient is 0 but for rounding (a key's bias
# shifts all scores of a query alike) it would turn rounding into a step of ±rate. An epsilon
# above that noise keeps the comparison about sharding.
CALM = {"epsilon": 1e-3}


MUON = ADAM | CALM | {"optimizer": "muon"}


@pytest.mark.parametrize("stage", [ADAM | CALM, HEAD | CALM, MUON], ids=["all", "head", "muon"])
def test_sharded_equals_single_device(stage):
    """law: 1, 2 and 8 devices agree to 1e-5 (sums run in another order), Adam moments sharded."""
    policy, params = neox(vocab_size=24)  # 24 rows divide over tensor=2
    batches = [make_batch(24, seed=s) for s in range(2)]
    result = {}
    for count, (data, fsdp, tensor) in {1: (1, 1, 1), 2: (2, 1, 1), 8: (2, 2, 2)}.items():
        mesh = runtime.make_mesh(data, fsdp, tensor, jax.devices()[:count])
        bound_stage = update.bind_stage(update.Stage(**stage), policy, params)
        state = update.init_state(bound_stage, params, jax.random.key(0))
        placed = trees.shardings(state, policy.sharding, mesh)
        step = jax.jit(
            update.make_step(bound_stage, update.policy_loss_fn(policy, rloo)),
            in_shardings=(placed, None),
            out_shardings=update.StepResult(placed, runtime.replicated(mesh)),
            donate_argnums=0,
        )
        state = jax.device_put(jax.tree.map(jnp.copy, state), placed)
        for batch in batches:
            state, metrics, _ = step(state, runtime.place_rows(batch, mesh))
        result[count] = (state, metrics)
    sharded, _ = result[1]
    for count in (2, 8):
        state, metrics = result[count]
        for a, b in zip(
            jax.tree.leaves(sharded.params), jax.tree.leaves(state.params), strict=True
        ):
            np.testing.assert_allclose(np.asarray(b), np.asarray(a), atol=1e-5)
        np.testing.assert_allclose(float(metrics["loss"]), float(result[1][1]["loss"]), rtol=1e-5)
    spread = [
        leaf
        for leaf in jax.tree.leaves(result[8][0].opt_state)
        if not leaf.sharding.is_fully_replicated
    ]
    assert spread, "Adam's moments must be sharded like their parameters"


def test_tied_head_names_both_ways_out():
    """law: 'train the head' of a tied model is refused with the two choices there are."""
    policy, params = neox(tie_word_embeddings=True)
    with pytest.raises(ValueError) as caught:
        update.bind_stage(update.Stage(**HEAD), policy, params)
    text = str(caught.value)
    assert "'embed/embedding'" in text and "--config.model.untie=true" in text
    shared = HEAD | {"parameters": (("embed/embedding", 1e-2), (".*", None))}
    assert sum(update.bind_stage(update.Stage(**shared), policy, params).trained) == 1


def test_bad_stages_are_named():
    """law: unknown optimizer, rates that do not move, uncovered and useless patterns."""
    policy, params = neox()
    with pytest.raises(ValueError, match="'lion' is not among adafactor, adam, adamw, muon, sgd"):
        update.Stage(**ADAM | {"optimizer": "lion"})
    with pytest.raises(ValueError, match="must be > 0, or None to freeze, not 0.0"):
        update.Stage(**ADAM | {"parameters": ((".*", 0.0),)})
    for rows, message in (
        ((("head/.*", 1e-3),), "no pattern covers embed/embedding"),
        ((("haed/.*", 1e-3), (".*", None)), "'haed/.*' matches no parameter; did you mean 'head"),
        (((".*", None),), "freezes every parameter"),
    ):
        with pytest.raises(ValueError, match=message):
            update.bind_stage(update.Stage(**ADAM | {"parameters": rows}), policy, params)
