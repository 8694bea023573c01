"""Chunks of rows, micro-batches and stored features: equivalent ways to the same step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl import numerics, rollout, scoring, update
from ntkrl.scoring import completion_features, head_of
from ntkrl.types import PromptBatch
from tests.toys import toy_params, toy_policy
from tests.update.test_train_step import ADAM, HEAD, make_batch, neox

GRPO = update.PRESETS["grpo"]
# SGD of rate 1: the step is the gradient
SGD = ADAM | {"optimizer": "sgd", "parameters": ((".*", 1.0),), "max_grad_norm": None}


def grpo(statistics, batch):
    """A loss per token with a KL term."""
    return update.policy_loss(GRPO, 3, statistics, batch)


def stepped(policy, params, batch, stage=SGD, chunk=1024, microbatches=1, loss=grpo, jit=True):
    """Params and metrics after one step."""
    bound_stage = update.bind_stage(update.Stage(**stage), policy, params)
    objective = update.policy_loss_fn(policy, loss, chunk_tokens=chunk)
    step = update.make_step(bound_stage, objective, microbatches)
    state = update.init_state(bound_stage, params, jax.random.key(0))
    return (jax.jit(step) if jit else step)(state, batch)[:2]


def close(result, expected, atol):
    """Two trees agree, and are not zero."""
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected)) > 0.1
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


@pytest.mark.parametrize("preset", ["rloo", "grpo", "dr_grpo", "dapo", "gspo", "reinforce"])
def test_chunks_and_microbatches_change_nothing(x64, preset):
    """law: rows in one piece, in chunks with a padded last one, tile by tile, in micro-batches.

    A mean per part, the likely bug, would weigh short parts as much as long ones.
    """
    policy = toy_policy()
    params = toy_params(policy, dtype=jnp.float64)
    batch = jax.tree.map(
        lambda leaf: leaf.astype(float) if leaf.dtype == jnp.float32 else leaf,
        make_batch(policy.vocab_size),
    )

    def loss(statistics, part):
        return update.policy_loss(update.PRESETS[preset], 3, statistics, part)

    unsplit, measured = stepped(policy, params, batch, loss=loss)
    # 3 rows of 3 tokens: chunks of 3, 3 and 2 rows; 2 tokens: less than a row, so tiles
    for settings in (
        {"chunk": 9},
        {"chunk": 2},
        {"microbatches": 4},
        {"microbatches": 2, "chunk": 3},
    ):
        state, metrics = stepped(policy, params, batch, loss=loss, **settings)
        close(state.params, unsplit.params, 1e-12)
        for name, value in measured.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-10, atol=1e-12, err_msg=name)


def test_gradient_equals_plain_autodiff(x64):
    """oracle: logits of the full batch at once and jax.grad."""
    policy = toy_policy()
    params = toy_params(policy, dtype=jnp.float64)
    batch = make_batch(policy.vocab_size)
    objective = dataclasses.replace(GRPO, entropy_coefficient=0.3)

    def loss(statistics, part):
        return update.policy_loss(objective, 3, statistics, part)

    def plain(params):
        phi = completion_features(policy, params, batch.tokens, batch.mask, 3)
        log_pi = jax.nn.log_softmax(policy.head(params, phi))
        picked = jnp.take_along_axis(log_pi, batch.tokens[:, -3:, None], -1)[..., 0]
        entropy = -jnp.sum(jnp.exp(log_pi) * log_pi, -1)
        statistics = scoring.TokenStatistics(picked, entropy, entropy, jnp.exp(picked), None)
        return numerics.mean(loss(statistics, batch)[0])

    expected = jax.tree.map(jnp.subtract, params, jax.grad(plain)(params))
    state, _ = stepped(policy, params, batch, loss=loss, chunk=9)
    close(state.params, expected, 1e-12)


def test_microbatches_must_divide():
    """law: an error before tracing."""
    policy = toy_policy()
    with pytest.raises(ValueError, match="8 rows cannot be cut in 3 equal micro-batches"):
        stepped(
            policy, toy_params(policy), make_batch(policy.vocab_size), microbatches=3, jit=False
        )


def sampled(policy, params):
    """A rollout with features, as an update batch."""
    rng = np.random.default_rng(0)
    mask = np.ones((4, 6), bool)
    mask[1, :3] = False
    prompts = PromptBatch(
        tokens=jnp.asarray(rng.integers(2, policy.vocab_size, (4, 6))),
        mask=jnp.asarray(mask),
        rows=jnp.arange(4),
        copies=jnp.zeros(4, int),
    )
    settings = rollout.SamplerSettings(2, 5, 1.0, end_ids=(0,), pad_id=1, keep_features=True)
    drawn = rollout.Sampler(policy, settings)(params, prompts, jax.random.key(1))
    batch = make_batch(policy.vocab_size)
    length = drawn.completion_mask.shape[1]
    noise = 0.1 * rng.normal(size=drawn.completion_mask.shape).astype(np.float32)
    return batch.replace(
        tokens=drawn.tokens,
        mask=drawn.mask,
        completion_mask=drawn.completion_mask,
        old_log_probs=drawn.sampler_log_probs + noise,
        ref_log_probs=drawn.sampler_log_probs - noise,
        advantages=jnp.repeat(batch.advantages[:, :1], length, axis=1),
        features=drawn.features,
    )


def test_stage_one_reuses_the_samplers_features():
    """law: a head-only step from stored features equals the one that reads the body, to 1e-5."""
    policy, params = neox()
    batch = sampled(policy, params)
    sgd = HEAD | {"optimizer": "sgd", "parameters": (("head/.*", 1.0), (".*", None))}
    reread, _ = stepped(policy, params, batch.replace(features=None), sgd)
    reused, metrics = stepped(policy, params, batch, sgd)
    before = params["head"]["weight"]
    close(reused.params["head"]["weight"] - before, reread.params["head"]["weight"] - before, 1e-5)
    assert metrics["grad_norm"] > 0
    for name in ("embed", "layers", "final_norm"):
        for a, b in zip(*map(jax.tree.leaves, (reused.params[name], params[name])), strict=True):
            np.testing.assert_array_equal(a, b)


def test_stage_one_reads_no_body():
    """law: its program holds two products, logits and dW, and works without the body's params."""
    policy, params = neox()
    batch = sampled(policy, params)
    bound_stage = update.bind_stage(update.Stage(**HEAD), policy, params)
    step = update.make_step(bound_stage, update.policy_loss_fn(policy, grpo))
    state = update.init_state(bound_stage, params, jax.random.key(0))
    assert bound_stage.head_alone
    text = str(jax.make_jaxpr(step)(state, batch))
    assert text.count("dot_general") == 2
    lost = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    alone = state.replace(params=lost | {"head": params["head"]})
    result, metrics, _ = step(alone, batch)
    assert np.isfinite(metrics["loss"]) and np.isfinite(result.params["head"]["weight"]).all()
    shapes = [leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert shapes == [(23, 16)] * 2


@pytest.mark.parametrize(
    "tied, parameters, alone",
    [
        (False, (("head/.*", 1e-2), (".*", None)), True),
        (False, (("(head|final_norm)/.*", 1e-2), (".*", None)), False),
        (True, (("embed/embedding", 1e-2), (".*", None)), False),
    ],
)
def test_which_stages_move_the_head_alone(tied, parameters, alone):
    """law: a norm moves the features, and so does a matrix that is read in and out."""
    policy, params = neox(tie_word_embeddings=tied)
    stage = update.Stage(**HEAD | {"parameters": parameters})
    assert update.bind_stage(stage, policy, params).head_alone == alone


def test_whole_kl_to_a_reference(x64):
    """oracle: KL(π‖π_ref) over the vocabulary in the loss, against plain autodiff."""
    policy = toy_policy()
    params = toy_params(policy, dtype=jnp.float64)
    other = toy_params(policy, seed=1, dtype=jnp.float64)
    batch = make_batch(policy.vocab_size)
    arrays = (batch.tokens, batch.mask, 3)
    batch = batch.replace(
        advantages=batch.advantages * 0, ref_features=completion_features(policy, other, *arrays)
    )
    objective = update.Objective(kl_estimator="full", kl_place="loss", kl_coefficient=1.0)

    def loss(statistics, part):
        return update.policy_loss(objective, 3, statistics, part)

    def plain(params):
        policy_statistics, ref = (
            jax.nn.log_softmax(policy.head(p, completion_features(policy, p, *arrays)))
            for p in (params, other)
        )
        kl = jnp.sum(jnp.exp(policy_statistics) * (policy_statistics - ref), -1)
        return jnp.sum(jnp.where(batch.completion_mask, kl, 0)) / jnp.sum(batch.completion_mask)

    bound_stage = update.bind_stage(update.Stage(**SGD), policy, params)
    step = update.make_step(bound_stage, update.policy_loss_fn(policy, loss, chunk_tokens=9))
    state = update.init_state(bound_stage, params, jax.random.key(0))
    result, metrics, _ = step(state, batch, head_of(policy, other))
    expected, gradient = jax.value_and_grad(plain)(params)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-12)
    close(result.params, jax.tree.map(jnp.subtract, params, gradient), 1e-12)
