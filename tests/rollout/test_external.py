"""An engine outside the package, emulated by the package's sampler."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl import rollout
from tests.rollout.test_sampler import EOS, PAD, prompts, settings, toy


def answers_of(drawn):
    """Return an engine's answer for a rollout."""
    lengths = np.asarray(drawn.completion_mask.sum(axis=1))
    width = drawn.tokens.shape[1] - drawn.completion_mask.shape[1]
    return [
        {
            "tokens": np.asarray(drawn.tokens[i, width : width + n]).tolist(),
            "log_probs": np.asarray(drawn.sampler_log_probs[i, :n]).tolist(),
        }
        for i, n in enumerate(lengths)
    ]


def test_an_engine_gives_a_rollout():
    """law: prompts without padding and weights go out; the same rollout comes in."""
    policy, params = toy()
    drawn = rollout.Sampler(policy, settings())(params, prompts(), jax.random.key(1))
    seen = {}

    def generate(weights, asked, seed):
        seen.update(weights=weights(), asked=asked, seed=seed)
        return answers_of(drawn)

    sample = rollout.ExternalSampler(generate, settings(), lambda p: {"w": np.asarray(p["mix"])})
    result = sample(params, prompts(), jax.random.key(2))
    assert [len(ids) for ids in seen["asked"]] == [2, 5] and isinstance(seen["seed"], int)
    np.testing.assert_array_equal(seen["weights"]["w"], params["mix"])
    for field in dataclasses.fields(drawn):
        if field.name not in ("features", "entropy"):  # an engine gives neither
            np.testing.assert_array_equal(getattr(result, field.name), getattr(drawn, field.name))


def test_answers_that_do_not_fit_are_named():
    """law: a wrong number, too many tokens, positive log-probs; not NaN in the loss later."""
    policy, params = toy()
    wrong = [
        {"tokens": [2] * 9, "log_probs": [-1.0] * 9},
        {"tokens": [2], "log_probs": [float("nan")]},
        {"ids": [2]},
    ]
    sample = rollout.ExternalSampler(lambda *_: wrong, settings(), dict)
    with pytest.raises(ValueError) as caught:
        sample(params, prompts(), jax.random.key(0))
    for problem in (
        "3 answers where 6 were expected",
        "answer 0 has 9 tokens and 9 log_probs",
        "answer 1 has log_probs that are not finite",
        "answer 2 has ids, not tokens and log_probs",
        "1 to 6 tokens each are allowed",
    ):
        assert problem in str(caught.value)


def test_loading_an_engine(tmp_path):
    """law: a file that is not there, or fails, is a message; a good one is called once."""
    path = tmp_path / "engine.py"
    path.write_text(
        "def make(directory, settings):\n"
        "    assert settings['end_ids'] == (0,) and directory == 'model'\n"
        "    return lambda weights, prompts, seed: seed\n"
        "def broken(directory, settings):\n"
        "    raise OSError('no GPU')\n"
    )
    result = rollout.load_engine(f"{path}:make", "model", settings())
    assert result(None, [], 3) == 3
    for spec, message in (
        ("nothing.py:make", "is not an existing 'path/to/file.py:function'"),
        (f"{path}:broken", "OSError: no GPU"),
        (f"{path}:other", "KeyError: 'other'"),
    ):
        with pytest.raises(ValueError, match=message):
            rollout.load_engine(spec, "model", settings())


def test_cut_completions_are_not_finished():
    """by hand: budget 6: an end token or fewer tokens finish; six without one do not."""
    answers = [[2, 3, EOS], [2, 3], [2] * 6, [2] * 5 + [EOS], [4], [5]]
    rows = [{"tokens": ids, "log_probs": [-0.5] * len(ids)} for ids in answers]
    sample = rollout.ExternalSampler(lambda *_: rows, settings(), dict)
    result = sample(toy()[1], prompts(), jax.random.key(0))
    np.testing.assert_array_equal(result.finished, [True, True, False, True, True, True])
    np.testing.assert_array_equal(result.tokens[1, 5:], [2, 3] + [PAD] * 4)
    assert result.sampler_log_probs.dtype == jnp.float32
