"""Influence through later steps, against the ledger and against training again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl import attribution
from tests.attribution.test_ledger import Case, assert_close
from tests.update.test_train_step import make_batch

pytestmark = pytest.mark.usefixtures("x64")


def influence(case, **settings):
    """The influence of the samples of the case's stage."""
    static = case.policy, case.terms, case.bound_stage.optimizer, case.bound_stage.trained
    return attribution.Influence(*static, **settings)


def chain(case, later=3):
    """The case's last step, and later ones on other batches."""
    batches = [make_batch(case.policy.vocab_size, seed=7 + number) for number in range(later)]
    return attribution.Chain(case.before, (case.batch, *batches))


CASES = {
    "sgd": ("toy", {"optimizer": "sgd", "parameters": ((".*", 1e-1),)}),
    "adam": ("toy", {}),
    "adamw, tied": ("tied", {"optimizer": "adamw", "weight_decay": 0.5}),
    "head": ("toy", {"parameters": (("head", 1e-3), (".*", None))}),
}


@pytest.mark.parametrize("name", CASES)
def test_one_step_is_the_ledgers(name):
    """oracle: without later steps, the sum of a sample's columns in the ledger.

    The ledger's cotangents are of the params before the step: equal for rates towards 0.
    """
    kind, fields = CASES[name]
    rates = fields.get("parameters", ((".*", 1e-3),))
    tiny = tuple((pattern, rate and 1e-8 * rate) for pattern, rate in rates)
    case = Case(kind, **{**fields, "parameters": tiny})
    arrays = case.read()
    result = influence(case).read(chain(case, later=0), case.prober.contexts, case.prober.targets)
    for measure, values in zip(attribution.MEASURES, result, strict=True):
        columns = [
            value
            for column, value in arrays.items()
            if column.startswith(f"{measure}/") and value.ndim == 2
        ]
        assert_close(values, sum(columns), 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_retraining_is_the_run(name):
    """law: with weights of one, the params of the real steps."""
    kind, fields = CASES[name]
    case = Case(kind, **fields)
    steps = chain(case)
    state = case.before
    for batch in steps.batches:
        state, *_ = case.step(state, batch)
    rows = len(case.batch.tokens)
    params = influence(case).retrain(steps, jnp.ones(rows))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), params, state.params
    )


@pytest.mark.parametrize("name", CASES)
def test_the_remainder_has_slope_two(name):
    """oracle: training again with one sample's weight at 1 − ε differs by ε times it, and ε²."""
    kind, fields = CASES[name]
    case, sample = Case(kind, **fields), 1
    steps, measure = chain(case), influence(case, factors="exact", chunk=2)
    where = case.prober.contexts, case.prober.targets
    slopes = measure.read(steps, *where)[..., sample]
    ones = jnp.ones(len(case.batch.tokens))
    full = case.measured(measure.retrain(steps, ones))
    errors = []
    for epsilon in (1e-2, 1e-3):
        removed = case.measured(measure.retrain(steps, ones.at[sample].add(-epsilon)))
        errors.append(np.linalg.norm(removed - full + epsilon * slopes) / epsilon)
    assert errors[0] > 5 * errors[1] and errors[1] < 0.02 * np.linalg.norm(slopes)


def test_realised_factors():
    """law: of Adam they leave something out, of SGD without clipping nothing."""
    for optimizer, same in (("adam", False), ("sgd", True)):
        case = Case("toy", optimizer=optimizer, max_grad_norm=None)
        where = chain(case), case.prober.contexts, case.prober.targets
        realised, exact = (influence(case, factors=f).read(*where) for f in ("realised", "exact"))
        assert np.allclose(realised, exact, rtol=1e-9, atol=0) == same


@pytest.mark.parametrize("factors", attribution.FACTORS)
def test_tokens_that_never_occur(factors):
    """law: second moments of 0 give finite numbers."""
    case = Case("untied", steps=1, max_grad_norm=None)
    # embeddings of the upper half of the vocabulary have no gradient in any step
    steps = chain(case, later=1)
    low = [b.replace(tokens=b.tokens % (case.policy.vocab_size // 2)) for b in steps.batches]
    opt_state = case.bound_stage.optimizer.init(case.before.params)
    steps = attribution.Chain(case.before.replace(opt_state=opt_state), tuple(low))
    result = influence(case, factors=factors).read(steps, case.prober.contexts, case.prober.targets)
    assert np.isfinite(result).all() and np.abs(result).max() > 0


def test_mistakes():
    """by hand: unknown factors, a chunk of none, batches of different shapes."""
    case = Case("toy", steps=1)
    with pytest.raises(ValueError, match="factors must be one of realised, exact, not 'none'"):
        influence(case, factors="none")
    with pytest.raises(ValueError, match="chunk must be ≥ 1, not 0"):
        influence(case, chunk=0)
    with pytest.raises(ValueError, match="a chain has one step or more"):
        influence(case).retrain(attribution.Chain(case.before, ()), jnp.ones(1))
    shorter = jax.tree.map(lambda leaf: leaf[:2], case.batch)
    steps = attribution.Chain(case.before, (case.batch, shorter))
    with pytest.raises(ValueError, match="different shapes; pad them by data.widened"):
        influence(case).read(steps, case.prober.contexts, case.prober.targets)
