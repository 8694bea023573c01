"""A real step against its prediction; a probe set read in blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl import probe, update
from ntkrl.probe.prober import LOGIT_BYTES, comparison
from ntkrl.types import ProbeSet
from tests.toys import toy_params, toy_policy
from tests.update.test_train_step import make_batch, rloo


def test_comparison_by_hand():
    """by hand: parts (1, 0) and (1, 2): total (2, 2), shares 2/8 and 6/8, error 0.1·√2/√8."""
    result = comparison(
        {
            "predicted_head": np.array([1.0, 0.0]),
            "predicted_body": np.array([1.0, 2.0]),
            "entropy_change_head": np.array([0.0, 3.0]),
            "entropy_change_body": np.array([4.0, -3.0]),
            "actual": np.array([2.1, 1.9]),
        }
    )
    np.testing.assert_allclose(result["predict/head_share"], 0.25)
    np.testing.assert_allclose(result["predict/body_share"], 0.75)
    # ⟨(0, 3), (4, 0)⟩ = 0 and ⟨(4, −3), (4, 0)⟩ = ⟨(4, 0), (4, 0)⟩
    assert result["predict/entropy_head_share"] == 0 and result["predict/entropy_body_share"] == 1
    expected = np.hypot(0.1, 0.1) / np.hypot(2.1, 1.9)
    np.testing.assert_allclose(result["predict/relative_error"], expected)


def probe_set(vocab):
    """Four rows of two prompts, as a rollout would give them."""
    batch = make_batch(vocab, rows=4)
    return ProbeSet(
        tokens=batch.tokens,
        mask=batch.mask,
        completion_mask=batch.completion_mask,
        groups=jnp.array([0, 0, 1, 1]),
    )


@pytest.mark.parametrize(
    "rows", [((".*", 1e-4),), (("head", 1e-4), (".*", None))], ids=["all", "head"]
)
def test_prediction_of_a_real_adam_step(x64, rows):
    """law: a small clipped Adam step is predicted to its size; a head-only one by R alone."""
    policy = toy_policy()
    params = toy_params(policy, dtype=jnp.float64)
    prober = probe.Prober(policy, probe_set(policy.vocab_size), params)
    stage = update.Stage(name="x", steps=1, parameters=rows, max_grad_norm=0.5)
    bound_stage = update.bind_stage(stage, policy, params)
    state = update.init_state(bound_stage, params, jax.random.key(0))
    after, *_ = update.make_step(bound_stage, update.policy_loss_fn(policy, rloo))(
        state, make_batch(policy.vocab_size)
    )
    metrics, arrays, _ = prober.compare(params, after.params)
    count = int(np.asarray(probe_set(policy.vocab_size).completion_mask).sum())
    assert arrays["actual"].shape == (count,) and np.abs(arrays["actual"]).max() > 1e-5
    assert metrics["predict/relative_error"] < 1e-2
    assert metrics["predict/correlation"] > 0.999
    total = metrics["predict/head_share"] + metrics["predict/body_share"]
    np.testing.assert_allclose(total, 1.0, rtol=1e-9)
    if len(rows) == 2:
        assert metrics["predict/head_share"] == 1.0
    measures = prober.measures(after.params)
    moved = float(jnp.linalg.norm(after.params["head"] - params["head"]))
    np.testing.assert_allclose(measures["probe/head_distance"], moved, rtol=1e-6)


def test_a_large_probe_set_is_read_in_blocks(x64):
    """law: a few completions at a time give the same result as all together."""
    policy = toy_policy()
    params = toy_params(policy, dtype=jnp.float64)
    after = jax.tree.map(lambda leaf: leaf * 1.01, params)
    arguments = policy, probe_set(policy.vocab_size), params
    unsplit = probe.Prober(*arguments)
    each = LOGIT_BYTES * arguments[1].completion_mask.shape[1] * policy.vocab_size / 2**30
    for count, blocks in ((1, 4), (3, 2)):
        cut = probe.Prober(*arguments, memory_gib=count * each)
        assert len(cut.blocks) == blocks and len({b[1].shape for b in cut.blocks}) == 1
        for result, expected in zip(
            cut.compare(params, after)[1].items(),
            unsplit.compare(params, after)[1].items(),
            strict=True,
        ):
            assert result[0] == expected[0]
            np.testing.assert_allclose(result[1], expected[1], rtol=1e-10)
        measures = unsplit.measures(after)
        for name, value in cut.measures(after).items():
            assert value == pytest.approx(measures[name], rel=1e-9), name
