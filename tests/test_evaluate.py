"""Evaluation: measures by hand, then whole evaluations through the command line."""

import math

import numpy as np
import pytest

from ntkrl.assembly import evaluation
from ntkrl.assembly.settings import EvalSettings
from ntkrl.report.names import is_known

GIVEN = {
    "every_steps": 1,
    "prompts": 2,
    "samples_per_prompt": 4,
    "repeats": 1,
    "success_threshold": 1.0,
    "temperature": None,
}


def test_measures_of_prompts():
    """by hand: pass@k, best-of-N, n-grams and answers of two prompts with four samples each."""
    texts = ["a b", "a b", "a c", "", "so #### 7", "no #### 7.", "#### 8", r"\boxed{7}"]
    rewards = np.array([1, 0, 1, 0, 0, 0.5, 0, 0], np.float32)
    found = evaluation.prompt_measures(texts, rewards, EvalSettings(**GIVEN))
    expected = {
        "eval/reward": [0.5, 0.125],
        "eval/pass@1": [0.5, 0],
        "eval/pass@k": [1, 0],
        "eval/distinct_solutions": [2, 0],
        "eval/distinct_completions": [0.75, 1],
        "diversity/pass@1": [0.5, 0],
        "diversity/pass@2": [5 / 6, 0],  # of the six pairs one has no success
        "diversity/pass@4": [1, 0],
        "diversity/best_of_1": [0.5, 0.125],
        "diversity/best_of_2": [5 / 6, 0.25],  # three of the six pairs hold the 0.5
        "diversity/best_of_4": [1, 0.5],
        "diversity/distinct_1": [3 / 6, 7 / 9],
        "diversity/distinct_2": [2 / 3, 1],
        "diversity/distinct_answers": [3, 2],
        "diversity/answer_entropy": [1.5 * math.log(2), 2 * math.log(2) - 0.75 * math.log(3)],
    }
    assert found.keys() - expected.keys() == {"diversity/self_bleu"}
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-12, err_msg=name)
    assert all(map(is_known, found))


@pytest.mark.parametrize(("samples", "ks"), [(1, [1]), (8, [1, 2, 4, 8]), (10, [1, 2, 4, 8, 10])])
def test_numbers_of_draws(samples, ks):
    """by hand: powers of two up to the samples, and their number; one text has no self-BLEU."""
    assert evaluation.powers(samples) == ks
    settings = EvalSettings(**GIVEN | {"samples_per_prompt": samples})
    found = evaluation.prompt_measures(["x"] * samples, np.ones(samples), settings)
    assert [name for name in found if "pass@" in name][2:] == [f"diversity/pass@{k}" for k in ks]
    assert ("diversity/self_bleu" in found) == (samples > 1)
