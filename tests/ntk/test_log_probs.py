"""First-order predictions against measured changes of log-probs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ntkrl import ntk
from tests.ntk.test_kernel import TOKENS, contexts, model
from tests.toys import toy_params, toy_policy

pytestmark = pytest.mark.usefixtures("x64")


def log_probs(policy, params, where):
    """log π over the vocabulary at contexts with one position per sequence."""
    phi = policy.features(params, where.tokens, where.mask)[jnp.arange(3), where.positions]
    return jax.nn.log_softmax(policy.head(params, phi), axis=-1)


def policy_gradient(policy, params, updated, targets, advantages):
    """∇ of Σ_u A_u log π(y_u | c_u)."""

    def objective(p):
        phi = policy.features(p, updated.tokens, updated.mask)[updated.rows, updated.positions]
        chosen = jax.nn.log_softmax(policy.head(p, phi))[jnp.arange(3), targets]
        return jnp.sum(advantages * chosen)

    return jax.grad(objective)(params)


@pytest.mark.parametrize("kind", ["toy", "untied", "tied"])
def test_sum_of_groups_equals_directional_derivative(kind):
    """oracle: central differences of log π along a random direction."""
    policy, params = model(kind)
    observed, _ = contexts(False)
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
    parts = ntk.predict(policy, params, direction, observed)
    step = 1e-5
    ahead = jax.tree.map(lambda a, u: a + step * u, params, direction)
    behind = jax.tree.map(lambda a, u: a - step * u, params, direction)
    slope = (log_probs(policy, ahead, observed) - log_probs(policy, behind, observed)) / (2 * step)
    np.testing.assert_allclose(np.asarray(sum(parts.values())), np.asarray(slope), atol=1e-6)


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_prediction_of_a_gradient_step_is_the_kernel_applied(kind):
    """law: along the policy gradient, predict = T(o) Σ_u A_u K(o, u) g_u, part by part."""
    policy, params = model(kind)
    observed, updated = contexts(False)
    targets, advantages = jnp.array([1, 5, 2]), jnp.array([1.0, -0.5, 2.0])
    direction = policy_gradient(policy, params, updated, targets, advantages)
    phi = policy.features(params, updated.tokens)[updated.rows, updated.positions]
    scores = jax.nn.one_hot(targets, 11) - jax.nn.softmax(policy.head(params, phi))
    kernel = ntk.kernel(policy, params, observed, updated)
    probs = jnp.exp(log_probs(policy, params, observed))

    def centred(change):
        return change - jnp.sum(probs * change, axis=-1, keepdims=True)

    parts = ntk.predict(policy, params, direction, observed)
    full = centred(kernel.apply(advantages[:, None] * scores))
    np.testing.assert_allclose(np.asarray(sum(parts.values())), np.asarray(full), atol=1e-11)
    if kind == "untied":  # with a tie the gradient carries both roles and parts mix
        head = centred(kernel.apply(advantages[:, None] * scores, "head"))
        np.testing.assert_allclose(np.asarray(parts["head"]), np.asarray(head), atol=1e-11)


@pytest.mark.parametrize("optimizer", [optax.sgd(1.0), optax.adam(1.0)], ids=["sgd", "adam"])
def test_remainder_falls_with_slope_two(optimizer):
    """law: actual − predicted is O(step²) for the real step of any optimizer.

    A prediction that forgot a term would leave a remainder of slope one.
    """
    policy, params = model("untied")
    observed, updated = contexts(False)
    targets, advantages = jnp.array([1, 5, 2]), jnp.array([1.0, -0.5, 2.0])
    gradient = policy_gradient(policy, params, updated, targets, -advantages)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    # steps small enough that the second order rules, whatever the optimizer's scale
    unit = 1.0 / optax.tree.norm(updates)
    remainders = []
    for step in (1e-2, 1e-3):
        direction = jax.tree.map(lambda u, s=step: s * unit * u, updates)
        after = optax.apply_updates(params, direction)
        actual = log_probs(policy, after, observed) - log_probs(policy, params, observed)
        predicted = sum(ntk.predict(policy, params, direction, observed).values())
        remainders.append(float(jnp.abs(actual - predicted).max()))
    slope = np.log10(remainders[0] / remainders[1])
    assert 1.9 < slope < 2.1, (slope, remainders)


def test_head_only_step_is_exact_in_logits():
    """law: stage 1 is linear in W, so Δz = η Σ_u A_u ⟨φ_o, φ_u⟩ g_u has no remainder."""
    policy, params = model("untied")
    observed, updated = contexts(False)
    gradient = policy_gradient(
        policy, params, updated, jnp.array([1, 5, 2]), jnp.array([1.0, -0.5, 2.0])
    )
    rate = 0.7  # a large step: exactness does not need a small one
    after = {
        **params,
        "head": {"weight": params["head"]["weight"] + rate * gradient["head"]["weight"]},
    }
    phi = policy.features(params, observed.tokens)[jnp.arange(3), observed.positions]
    moved = policy.head(after, phi) - policy.head(params, phi)
    there = policy.features(params, updated.tokens)[updated.rows, updated.positions]
    scores = jax.nn.one_hot(jnp.array([1, 5, 2]), 11) - jax.nn.softmax(policy.head(params, there))
    weights = rate * jnp.array([1.0, -0.5, 2.0])[:, None] * scores
    expected = ntk.kernel(policy, params, observed, updated).head @ weights
    np.testing.assert_allclose(np.asarray(moved), np.asarray(expected), atol=1e-12)


def test_targets_and_groups():
    """law: targets select entries of the full prediction; finer groups sum to the body."""
    policy, params = model("untied")
    observed = ntk.Contexts(jnp.asarray(TOKENS), jnp.array([4, 2, 3]))
    direction = jax.tree.map(
        lambda leaf: 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params
    )
    full = ntk.predict(policy, params, direction, observed)
    targets = jnp.array([2, 9, 0])
    picked = ntk.predict(policy, params, direction, observed, targets)
    for name in ("head", "body"):
        expected = np.asarray(full[name])[np.arange(3), np.asarray(targets)]
        np.testing.assert_allclose(np.asarray(picked[name]), expected, atol=1e-12)
    groups = ((r"layers/attention/.*", "attention"), (r"layers/.*", "rest"), (r".*", "outside"))
    split = ntk.predict(policy, params, direction, observed, targets, groups)
    assert set(split) == {"head", "attention", "rest", "outside"}
    finer = split["attention"] + split["rest"] + split["outside"]
    np.testing.assert_allclose(np.asarray(finer), np.asarray(picked["body"]), atol=1e-12)


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_changes_of_entropy_and_of_the_likeliest_token(kind):
    """oracle: the sum over groups is the JVP of H and of max log π; log π as `predict` has it."""
    policy, params = model(kind)
    observed = ntk.Contexts(jnp.asarray(TOKENS), jnp.array([4, 2, 3]))
    direction = jax.tree.map(
        lambda leaf: 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params
    )
    targets = jnp.array([2, 9, 0])
    parts = ntk.predict_changes(policy, params, direction, observed, targets)
    for name, expected in ntk.predict(policy, params, direction, observed, targets).items():
        np.testing.assert_allclose(parts[name].log_prob, expected, atol=1e-14)

    def measures(params):
        phi = policy.features(params, observed.tokens)[jnp.arange(3), observed.positions]
        log_probs = jax.nn.log_softmax(policy.head(params, phi))
        return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1), jnp.max(log_probs, axis=-1)

    _, (entropy, likeliest) = jax.jvp(measures, (params,), (direction,))
    assert np.abs(entropy).max() > 1e-3 and np.abs(likeliest).max() > 1e-3
    for values, index in ((entropy, 1), (likeliest, 2)):
        total = sum(changes[index] for changes in parts.values())
        np.testing.assert_allclose(total, values, rtol=1e-10, atol=1e-13)


def test_bad_input_is_named():
    """law: a direction of another shape, wrong targets, uncovered groups."""
    policy = toy_policy()
    params = toy_params(policy)
    observed = ntk.Contexts(jnp.asarray(TOKENS % 7), jnp.array([4, 2, 3]))
    with pytest.raises(ValueError, match="structure and the shapes"):
        ntk.predict(policy, params, {"head": params["head"]}, observed)
    with pytest.raises(ValueError, match=r"targets must have shape \(3,\), not \(2,\)"):
        ntk.predict(policy, params, params, observed, jnp.array([1, 2]))
    with pytest.raises(ValueError, match="no pattern covers embed, mix"):
        ntk.predict(policy, params, params, observed, groups=((r"head", "w"),))
    with pytest.raises(ValueError, match="is the name of the head's role"):
        ntk.predict(policy, params, params, observed, groups=((r".*", "head"),))
