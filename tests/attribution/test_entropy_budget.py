"""Weights that keep the predicted change of entropy above a budget."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from ntkrl import ntk, scoring
from ntkrl.attribution.entropy_budget import EntropyShares, budget_weights
from ntkrl.numerics import masked_total
from tests.attribution.test_ledger import BUDGET, Case

CASES = {
    "sgd": ("toy", {"optimizer": "sgd", "momentum": 0.9, "parameters": ((".*", 1e-1),)}),
    "adamw, tied": ("tied", {"optimizer": "adamw", "weight_decay": 0.5}),
    "head": ("toy", {"parameters": (("head", 1e-3), (".*", None))}),
}
pytestmark = pytest.mark.usefixtures("x64")


def test_by_hand():
    """by hand: nothing to do; one sample is scaled; one vanishes and another doubles."""
    shares = jnp.array([-0.3, 0.1])
    enough = budget_weights(shares, 0.0, 0.2)
    np.testing.assert_array_equal(enough.weights, [1, 1])
    assert enough.change == pytest.approx(-0.2)
    # −0.2 + 0.1 λ = −0.1 at λ = 1
    np.testing.assert_allclose(budget_weights(shares, 0.0, 0.1).weights, [0.7, 1.1])
    # the first vanishes at λ = 10/3, where the change is −0.15 + 0.1 + 0.01 λ
    gone = budget_weights(shares, -0.15, 0.0)
    np.testing.assert_allclose(gone.weights, [0.0, 1.5])
    assert gone.change == pytest.approx(0.0) and gone.least == pytest.approx(-0.05)


def test_a_budget_that_cannot_be_met():
    """by hand: the bounds, and the least budget that they meet."""
    result = budget_weights(jnp.array([-0.3, 0.0, 0.02]), -0.05, 0.001)
    np.testing.assert_array_equal(result.weights, [0, 1, 2])
    assert result.change == pytest.approx(-0.01) and result.least == pytest.approx(0.01)
    none = budget_weights(jnp.zeros(3), -0.05, 0.01)
    np.testing.assert_array_equal(none.weights, [1, 1, 1])


@pytest.mark.parametrize("seed", range(20))
def test_equals_a_solver(seed):
    """oracle: scipy's quadratic programme, at budgets that few and many samples meet."""
    rng = np.random.default_rng(seed)
    shares, rest = rng.normal(-0.3, 1.0, 8), rng.normal()
    budget = abs(rng.normal()) * 0.5
    result = budget_weights(jnp.asarray(shares), rest, budget)
    if budget < result.least:
        np.testing.assert_array_equal(result.weights, np.where(shares > 0, 2, 0))
        return
    constraint = {"type": "ineq", "fun": lambda w: rest + w @ shares + budget}
    solved = minimize(
        lambda w: 0.5 * np.sum((w - 1) ** 2),
        np.ones(8),
        jac=lambda w: w - 1,
        bounds=[(0, 2)] * 8,
        constraints=[constraint],
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert result.change >= -budget - 1e-9
    np.testing.assert_allclose(result.weights, solved.x, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_shares_are_the_ledgers(name):
    """oracle: the ledger's columns of the entropy, averaged over the batch's own tokens."""
    kind, fields = CASES[name]
    case = Case(kind, **fields)
    batch = case.batch
    rows, columns = np.nonzero(np.asarray(batch.completion_mask))
    places = columns + batch.tokens.shape[1] - batch.completion_mask.shape[1]
    contexts = ntk.Contexts(batch.tokens, jnp.asarray(places - 1), jnp.asarray(rows), batch.mask)
    arrays = case.ledger().read(case.described()[0], contexts, batch.tokens[rows, places]).arrays
    samples, others = 0.0, 0.0
    for key, values in arrays.items():
        measure, column, *group = key.split("/", 2)
        if measure == "entropy" and column == "policy":
            samples = samples + values.mean(axis=0)
        elif measure == "entropy" and column in ("momentum", "decay", "kl", "bonus"):
            others = others + np.sum(values) / len(rows)

    def entropy(params, batch):
        values = scoring.score(case.policy, params, batch.tokens, batch.mask, BUDGET).entropy
        return masked_total(values, batch.completion_mask)

    static = case.bound_stage.optimizer, case.bound_stage.trained
    for microbatches in (1, 2):
        measure = EntropyShares(case.terms, entropy, *static, microbatches)
        shares, rest = measure.read(case.before, batch)
        np.testing.assert_allclose(shares, samples, rtol=1e-8, atol=1e-12)
        assert float(rest) == pytest.approx(others, rel=1e-8)
