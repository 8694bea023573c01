"""The effect of one prompt's gradient on own and other prompts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl import data, runtime, scoring
from ntkrl.configs.evidence import feature_claims, spread
from ntkrl.configs.evidence.answers import Answers
from ntkrl.configs.evidence.arm_study import StudySettings
from ntkrl.configs.evidence.arms import Arm
from ntkrl.configs.evidence.pretrained_study import PretrainedStudy
from tests.toys import toy_params, toy_policy

PROMPT, BUDGET = 2, 3


def answers(groups):
    """Answers of random tokens and lengths."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 7, PROMPT).tolist() for _ in range(max(groups) + 1)]
    completions = [rng.integers(0, 7, 1 + row % BUDGET).tolist() for row in range(len(groups))]
    encoded = [prompts[group] for group in groups]
    rows = range(len(groups))
    batch = data.supervised_batch(encoded, completions, rows, 0, PROMPT, BUDGET)
    row_O, column_O = np.nonzero(np.asarray(batch.completion_mask))
    return Answers(batch, PROMPT, row_O, column_O, np.array(groups))


def test_leave_one_out_by_hand():
    """by hand: each reward less the mean of the others in its group."""
    advantages = spread.leave_one_out(np.array([1.0, 0, 0, 2, 5]), np.array([0, 0, 0, 1, 1]))
    np.testing.assert_allclose(advantages, [1, -0.5, -0.5, -3, 3])


def test_effects_equal_dense_jacobians():
    """oracle: ∇H of every token times the gradient of every prompt, head and other leaves apart."""
    policy = toy_policy()
    params = toy_params(policy)
    made, advantages = answers([0, 0, 1, 1, 1]), np.array([1.0, -1, 0.5, 0.5, -1])
    measured = spread.spread(policy, params, made, advantages)["entropy"]
    batch = made.batch

    def read(params):
        return scoring.score(policy, params, batch.tokens, batch.mask, BUDGET)

    def entropies(params):
        return read(params).entropy[made.rows, made.columns]

    def objective(params, group):
        sums = jnp.sum(jnp.where(batch.completion_mask, read(params).log_probs, 0), axis=1)
        return jnp.mean((sums * advantages)[made.groups == group])

    jacobian = jax.jacrev(entropies)(params)
    effects = {"R": [], "G": []}
    for group in (0, 1):
        gradient = jax.grad(objective)(params, group)
        products = {
            name: np.tensordot(jacobian[name], gradient[name], axes=gradient[name].ndim)
            for name in params
        }
        effects["R"].append(products.pop("head"))
        effects["G"].append(sum(products.values()))
    r_PO, g_PO = np.array(effects["R"]), np.array(effects["G"])
    own_PO = made.groups[made.rows] == np.arange(2)[:, None]
    for side, chosen in (("own", own_PO), ("other", ~own_PO)):
        for part, values in (("R", r_PO), ("G", g_PO), ("total", r_PO + g_PO)):
            expected = np.mean(values[chosen] ** 2)
            assert measured[f"{part}_{side}"] == pytest.approx(expected, rel=1e-4)
        total = (r_PO + g_PO)[chosen]
        share = r_PO[chosen] @ total / (total @ total)
        assert measured[f"share_{side}"] == pytest.approx(share, rel=1e-4)


def test_claims(tmp_path):
    """by hand: 0.9 of the own effect reaches others through R, 0.3 through G, 0.6 in all."""
    config = runtime.read_config(["--config=pretrained/study"])
    parsed = runtime.parse_section(StudySettings, config, "study")
    made = PretrainedStudy(parsed, "pretrained/study")
    made.results = type(made.results)(tmp_path, made.settings.seeds)
    reach = {"R": 0.9, "G": 0.3, "total": 0.6}
    for seed in made.settings.seeds:
        values = {f"{part}_own": 4.0 for part in reach}
        values |= {f"{part}_other": 4 * ratio**2 for part, ratio in reach.items()}
        values |= {"share_own": 0.1, "share_other": 0.2 + 0.01 * seed}
        place = made.results.place("smollm2", "base", seed)
        place.mkdir(parents=True)
        (place / spread.FILE).write_text(json.dumps(dict.fromkeys(spread.QUANTITIES, values)))
    rl = Arm(made.results, made.settings, "smollm2", "rl")
    listed = feature_claims.feature_claims(rl)
    reached = [verdict for verdict in listed if "root mean square" in verdict.claim]
    assert [verdict.number.split(" ")[0] for verdict in reached] == ["0.6", "0.6"]
    assert all(verdict.verdict == "holds" for verdict in reached)
    more = [verdict for verdict in listed if "R's change of" in verdict.claim]
    assert all(verdict.number.startswith("difference +0.6 [") for verdict in more) and more
    shares = [verdict for verdict in listed if "R's share of a gradient's change" in verdict.claim]
    assert "own prompt: 0.1 [0.1, 0.1]; other prompts: 0.235 [" in shares[0].number
    assert "after RL" not in shares[0].number
