"""Losses against their written formulas: by hand, and by slow loops in float64."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl import advantage, numerics, update
from ntkrl.softmax import TokenStatistics
from ntkrl.types import UpdateBatch
from ntkrl.update import RolloutArrays, token_weights
from ntkrl.update.credit import covariance_weights
from tests.update import formulas

PRESETS = update.PRESETS
RLOO = PRESETS["rloo"]
BUDGET, GROUP = 6, 4


def batch_of(mask, old, ref, advantages, penalties=None):
    """Return an UpdateBatch whose tokens no loss reads."""
    shape = np.shape(mask)
    wide = np.broadcast_to(np.reshape(advantages, (shape[0], -1)), shape)
    return UpdateBatch(
        tokens=jnp.zeros(shape, int),
        mask=jnp.ones(shape, bool),
        completion_mask=jnp.asarray(mask, bool),
        old_log_probs=jnp.asarray(old),
        ref_log_probs=jnp.asarray(ref),
        advantages=jnp.asarray(wide),
        penalties=None if penalties is None else jnp.asarray(penalties),
    )


def statistics_of(log_probs, entropy=None, kl=None):
    """Return token statistics, of which the losses use a few."""
    log_probs = jnp.asarray(log_probs)
    entropy = -log_probs if entropy is None else entropy
    return TokenStatistics(log_probs, entropy, log_probs * 0, jnp.exp(log_probs), None, kl)


def draws(seed=0, rows=8, columns=5, spread=0.3):
    """Random log-probs, rewards and a ragged mask with at least one token a row."""
    rng = np.random.default_rng(seed)
    old = -rng.exponential(size=(rows, columns))
    rewards = rng.normal(size=rows)
    rewards[:GROUP] = 0.5 if seed == 2 else rewards[:GROUP]
    return {
        "rewards": rewards,
        "old": old,
        "log_probs": old + spread * rng.normal(size=old.shape),
        "ref": old + 0.3 * rng.normal(size=old.shape),
        "mask": np.arange(columns) < rng.integers(1, columns + 1, rows)[:, None],
        "finished": rng.random(rows) < 0.7,
    }


def prepared(objective, rewards, old, ref, mask, finished, log_probs=None, behaviour=None, seed=0):
    """Return the UpdateBatch that the loop builds from a rollout, and its token weights."""
    old_log_probs = jnp.asarray(old)
    rollout = RolloutArrays(
        rewards=jnp.asarray(rewards),
        old_log_probs=old_log_probs,
        ref_log_probs=jnp.asarray(ref),
        behaviour_log_probs=old_log_probs if behaviour is None else jnp.asarray(behaviour),
        mask=jnp.asarray(mask),
        finished=jnp.asarray(finished),
    )
    weights = token_weights(objective, GROUP, rollout, jax.random.key(seed))
    return batch_of(weights.mask, old, ref, weights.advantages, weights.penalties), weights


def value(objective, batch, log_probs):
    """Return the scalar that the step minimises."""
    total, _ = update.policy_loss(objective, BUDGET, statistics_of(log_probs), batch)
    return numerics.mean(total)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_equal_their_formulas(x64, name, seed):
    """oracle: every row against loops, off policy so that clips bite; seed 2 has an equal group."""
    arrays, objective = draws(seed, spread=1e-3 if name == "gspo" else 0.3), PRESETS[name]
    batch, _ = prepared(objective, **arrays)
    slow = formulas.Batch(**arrays, group=GROUP, budget=BUDGET)
    function = getattr(formulas, name.removesuffix("_trl012"))
    extra = (arrays["log_probs"],) if name == "cispo" else ()
    result, gradient = jax.value_and_grad(lambda lp: value(objective, batch, lp))(
        jnp.asarray(arrays["log_probs"])
    )
    assert abs(float(result) - function(slow, *extra)) < 1e-12
    # the gradient too, by differences, at the tokens of two rows
    for i, t in itertools.chain.from_iterable(((r, t) for t in slow.tokens(r)) for r in (3, 6)):
        sides = []
        for h in (1e-6, -1e-6):
            slow.log_probs = arrays["log_probs"].copy()
            slow.log_probs[i, t] += h
            sides.append(function(slow, *extra))
        assert abs((sides[0] - sides[1]) / 2e-6 - float(gradient[i, t])) < 1e-8


def test_every_preset_says_its_formula_and_source():
    """law: each row has its formula and source, and names the axes that it sets."""
    assert set(update.FORMULAS) == set(PRESETS)
    for name, text in update.FORMULAS.items():
        assert text.startswith("Minimise") and "Source:" in text, name
    assert update.describe(PRESETS["dapo"]).startswith("advantage group_normalised · ratio_level")
    assert "clip_high 0.28" in update.describe(PRESETS["dapo"])
    assert set(update.CHOICES["advantage"]) == {*advantage.ESTIMATORS, "pass_at_k", "reward_to_go"}


@pytest.mark.parametrize("name", advantage.LINEAR)
def test_the_kl_in_the_reward_has_its_part_of_the_advantages(x64, name):
    """law: without the KL the advantages lack that part, corrected and masked alike."""
    arrays = draws(0, spread=0.0) | {"behaviour": draws(0)["log_probs"]}
    more = {"correction": "truncate", "correction_cap": 1.1, "covariance_range": (-9.0, 9.0)}
    axes = {"kl_place": "reward", "kl_coefficient": 5.0, "advantage": name, "clip": "none", **more}
    objective = update.Objective(**axes)
    result = prepared(objective, **arrays)[1]
    bare = dataclasses.replace(objective, kl_coefficient=0.0)
    expected = result["advantages"] - prepared(bare, **arrays)[1]["advantages"]
    np.testing.assert_allclose(result["kl_advantages"], expected, atol=1e-12)
    assert np.abs(expected).max() > 0.1 and prepared(bare, **arrays)[1]["kl_advantages"] is None
    cut = dataclasses.replace(objective, covariance="clip", covariance_fraction=0.5)
    clipped, mask = prepared(cut, **arrays)[1], arrays["mask"]
    gone = (np.asarray(clipped["advantages"]) == 0) & mask
    assert 0 < gone.sum() < mask.sum()
    kept = np.where(gone, 0, result["kl_advantages"])
    np.testing.assert_array_equal(clipped["kl_advantages"], kept)
    scaled = dataclasses.replace(objective, advantage="group_normalised")
    assert prepared(scaled, **arrays)[1]["kl_advantages"] is None


def test_rloo_by_hand():
    """by hand: ratios exp(0.1 + 0.2) = 1.35 (clipped at 1.2, A = 2) and exp(−0.1), A = −2.

    A clip per token, the likely bug, would leave the first ratio at exp(0.1)·exp(0.2) unclipped.
    """
    mask = [[1, 1], [1, 0]]
    batch = batch_of(mask, [[-1.0, -1.0], [-1.0, 0.0]], np.zeros((2, 2)), [2.0, -2.0])
    statistics = statistics_of([[-0.9, -0.8], [-1.1, 9.0]])
    total, measures = update.policy_loss(RLOO, BUDGET, statistics, batch)
    np.testing.assert_allclose(total.total, -1.2 * 2 + 2 * np.exp(-0.1), rtol=1e-6)
    assert int(total.count) == 2
    # of two completions one is clipped, however many tokens it has
    assert float(numerics.mean(measures.totals["clip_ratio/high_mean"])) == 0.5


def test_aggregations_by_hand():
    """by hand: token losses −1, −1 | 1, 1 | (no token), budget 6.

    Tokens: 0/3 … with one row of two tokens (−1 each) and one of one token (+1).
    """
    mask, old = [[1, 1], [1, 0], [0, 0]], [[-1.0, -1.0], [-1.0, 0.0], [0.0, 0.0]]
    batch = batch_of(mask, old, old, [1.0, -1.0, 5.0])
    expected = {"token_mean": -1 / 3, "sequence_mean": 0.0, "sequence_sum": -1 / 2}
    expected["constant"] = -1 / (2 * BUDGET)
    for name, target in expected.items():
        objective = update.Objective(aggregation=name)
        np.testing.assert_allclose(value(objective, batch, old), target, atol=1e-7)


def test_clips_by_hand():
    """by hand: ρ = 4: A = 1 → 1.2; A = −1 → −4, bounded at −3; detached 1.2 · log π."""
    old, new = [[-2.0]], [[-2.0 + np.log(4.0)]]
    up, down = (batch_of([[1]], old, old, [a]) for a in (1.0, -1.0))
    plain = update.Objective()
    dual = dataclasses.replace(plain, dual_clip=3.0)
    detach = dataclasses.replace(plain, clip="detach")
    bare = dataclasses.replace(plain, clip="none")
    result = [
        float(value(objective, batch, new))
        for objective, batch in (
            (plain, up),
            (plain, down),
            (dual, up),
            (dual, down),
            (detach, up),
            (bare, up),
        )
    ]
    expected = [-1.2, 4.0, -1.2, 3.0, -1.2 * (np.log(4.0) - 2), -4.0]
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    slope = jax.grad(lambda lp: value(detach, up, lp))(jnp.asarray(new))
    np.testing.assert_allclose(slope, [[-1.2]], rtol=1e-6)


def test_kl_estimators_by_hand():
    """by hand: log π − log π_ref = 0.5: k1 0.5, k2 0.125, k3 e^−0.5 − 0.5; masked ones are 0."""
    log_probs, ref = jnp.array([[-1.0, -3.0]]), jnp.array([[-1.5, 9e9]])
    mask = jnp.array([[True, False]])
    for name, expected in (("k1", 0.5), ("k2", 0.125), ("k3", np.exp(-0.5) - 0.5)):
        result = update.kl_estimate(name, log_probs, ref, mask)
        np.testing.assert_allclose(result, [[expected, 0.0]], rtol=1e-6)


def test_entropy_bonus_has_a_gradient():
    """law: the bonus raises the entropy; in peers it was a number without a gradient."""
    objective = update.Objective(entropy_coefficient=0.3)
    batch = batch_of([[1, 1]], [[-1.0, -1.0]], np.zeros((1, 2)), [0.0])

    def loss(entropy):
        statistics = statistics_of([[-1.0, -1.0]], entropy)
        return numerics.mean(update.policy_loss(objective, BUDGET, statistics, batch)[0])

    np.testing.assert_allclose(jax.grad(loss)(jnp.array([[0.7, 0.9]])), [[-0.15, -0.15]])


def test_whole_kl_in_the_loss():
    """by hand: the loss takes KL(π‖π_ref) over the vocabulary where the estimator is full."""
    objective = update.Objective(kl_estimator="full", kl_place="loss", kl_coefficient=0.5)
    batch = batch_of([[1, 0]], [[-1.0, -1.0]], np.zeros((1, 2)), [0.0])
    statistics = statistics_of([[-1.0, -1.0]], kl=jnp.array([[0.25, 77.0]]))
    total, measures = update.policy_loss(objective, BUDGET, statistics, batch)
    assert (float(total.total), int(total.count)) == (0.125, 1)
    assert float(measures.totals["kl"].total) == 0.25


def test_corrections_multiply_the_surrogate():
    """law: the weight is on the surrogate of each token, and in the metrics."""
    arrays = draws(0)
    del arrays["log_probs"]
    objective = update.Objective(correction="truncate", correction_cap=1.2)
    behaviour = arrays["old"] - 0.3
    plain, _ = prepared(update.Objective(), **arrays)
    batch, result = prepared(objective, **arrays, behaviour=behaviour)
    mask = arrays["mask"]
    np.testing.assert_allclose(batch.advantages[mask], 1.2 * plain.advantages[mask], rtol=1e-5)
    for name in ("min", "mean", "max"):
        expected = result["metrics"][f"sampling/importance_sampling_ratio/{name}"]
        np.testing.assert_allclose(expected, 1.2, rtol=1e-5)


def test_covariance_masks(x64):
    """oracle: c by hand in numpy; KL-Cov takes the largest, Clip-Cov a random few of the range."""
    drawn = draws(1, rows=40, columns=10)
    mask, old = drawn["mask"], drawn["old"]
    advantages = np.broadcast_to(drawn["rewards"][:, None], mask.shape)
    covariance = (old - old[mask].mean()) * (advantages - advantages[mask].mean())
    count = int(0.05 * mask.sum())
    arrays = [jnp.asarray(array) for array in (old, advantages, mask)]
    kl = update.Objective(covariance="kl", covariance_fraction=0.05, covariance_penalty=0.7)
    same, penalties = covariance_weights(kl, *arrays, jax.random.key(0))
    largest = np.sort(covariance[mask])[-count]
    np.testing.assert_array_equal(penalties, np.where(mask & (covariance >= largest), 0.7, 0.0))
    np.testing.assert_array_equal(same, advantages)
    clip = dataclasses.replace(kl, covariance="clip", covariance_range=(0.2, 1.0))
    result, none = covariance_weights(clip, *arrays, jax.random.key(0))
    taken = (np.asarray(result) == 0) & (advantages != 0)
    assert none is None and taken.sum() == count
    assert (mask & (covariance > 0.2) & (covariance < 1.0))[taken].all()
    other, _ = covariance_weights(clip, *arrays, jax.random.key(1))
    assert not np.array_equal(result, other)
    # a range with too few tokens takes those and no other
    narrow = dataclasses.replace(clip, covariance_range=(largest - 1e-9, largest + 1e-9))
    result, _ = covariance_weights(narrow, *arrays, jax.random.key(0))
    assert ((np.asarray(result) == 0) & (advantages != 0)).sum() == 1


def test_penalties_by_hand():
    """by hand: 0.7 · |log ρ| beside the surrogate, on the token that carries it."""
    batch = batch_of([[1, 1]], [[-1.0, -1.0]], np.zeros((1, 2)), [0.0], [[0.0, 0.7]])
    result = value(update.Objective(), batch, [[-0.5, -1.2]])
    np.testing.assert_allclose(result, 0.7 * 0.2 / 2, rtol=1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_on_policy_gradient_is_the_policy_gradient(x64, name):
    """law: at ratio 1 the gradient is that of −A log π, weighted by the aggregation."""
    arrays = draws(3)
    objective = dataclasses.replace(PRESETS[name], kl_place="off", kl_coefficient=0.0)
    arrays["log_probs"] = arrays["old"]
    batch, result = prepared(objective, **arrays)
    mask = np.asarray(result["mask"], float)
    lengths = np.maximum(mask.sum(axis=1, keepdims=True), 1)
    completions = (mask.sum(axis=1) > 0).sum()
    over = {
        "token_mean": mask.sum(),
        "sequence_mean": completions * lengths,
        "sequence_sum": completions,
        "constant": completions * BUDGET,
    }[objective.aggregation]
    if objective.ratio_level == "sequence":
        over = completions  # the product's full gradient reaches each token
    expected = -np.asarray(batch.advantages) * mask / over
    gradient = jax.grad(lambda lp: value(objective, batch, lp))(jnp.asarray(arrays["old"]))
    np.testing.assert_allclose(gradient, expected, atol=1e-12)


@pytest.mark.parametrize("name", PRESETS)
def test_padding_and_its_values_change_nothing(name):
    """law: further masked columns, full of extreme numbers, leave loss and gradient alone."""
    arrays, objective = draws(4), PRESETS[name]
    wide = dict(arrays)
    for part, fill in (("old", -1e4), ("ref", 1e4), ("log_probs", 3.0), ("mask", False)):
        wide[part] = np.pad(arrays[part], ((0, 0), (0, 3)), constant_values=fill)

    def read(h):
        batch, _ = prepared(objective, **h)
        return jax.value_and_grad(lambda lp: value(objective, batch, lp))(
            jnp.asarray(h["log_probs"])
        )

    (narrow_value, narrow), (wide_value, padded) = read(arrays), read(wide)
    np.testing.assert_allclose(wide_value, narrow_value, rtol=1e-6)
    np.testing.assert_allclose(padded[:, :5], narrow, atol=1e-7)
    np.testing.assert_array_equal(padded[:, 5:], 0.0)


def test_supervised_loss_is_a_token_mean():
    """by hand: three tokens of 1, 2 and 6 nats: 9 over 3."""
    batch = batch_of([[1, 1], [1, 0]], np.zeros((2, 2)), np.zeros((2, 2)), np.ones(2))
    total, _ = update.supervised_loss(statistics_of([[-1.0, -2.0], [-6.0, -50.0]]), batch)
    assert (float(total.total), int(total.count)) == (9.0, 3)


def test_impossible_axes_are_all_named():
    """law: every conflict of a setting comes in one message."""
    with pytest.raises(ValueError) as caught:
        update.Objective(
            advantage="gae",
            ratio_level="none",
            clip_low=1.5,
            dual_clip=1.0,
            kl_coefficient=0.1,
            covariance="kl",
            correction_cap=0.0,
        )
    for problem in (
        "advantage 'gae' is not among none, batch_mean, leave_one_out",
        "clip_low in (0, 1] and clip_high > 0, not 1.5",
        "ratio_level none has no ratio to clip: set clip none",
        "dual_clip > 1 + clip_high = 1.2, not 1.0",
        "kl_coefficient 0.1 has no effect with kl_place off",
        "covariance compares with the policy that sampled",
        "correction_cap > 0, not 0.0",
    ):
        assert problem in str(caught.value)
    for axes, problem in (
        ({"clip": "none", "dual_clip": 3.0}, "dual_clip bounds the ratio of clip min"),
        ({"advantage": "none", "group_filter": "drop"}, "needs an advantage within groups"),
    ):
        with pytest.raises(ValueError, match=problem):
            update.Objective(**axes)
