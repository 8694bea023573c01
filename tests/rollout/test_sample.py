"""The sampler against the plain forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntkrl
from ntkrl import rollout, scoring
from ntkrl.types import PromptBatch
from tests.toys import TINY, toy_params, toy_policy

EOS, PAD = 0, 1


def settings(**overrides):
    """Settings of a small sampler."""
    base = dict(
        completions_per_prompt=3, max_completion_tokens=6, temperature=1.0, eos_id=EOS, pad_id=PAD
    )
    return rollout.SamplerSettings(**base | overrides)


def prompts(lengths=(2, 5), width=5, vocab=7):
    """Left-padded prompts of the given lengths."""
    rng = np.random.default_rng(0)
    tokens, mask = np.full((len(lengths), width), PAD), np.zeros((len(lengths), width), bool)
    for i, length in enumerate(lengths):
        tokens[i, width - length :] = rng.integers(2, vocab, length)
        mask[i, width - length :] = True
    return PromptBatch(
        tokens=jnp.asarray(tokens), mask=jnp.asarray(mask), rows=jnp.arange(len(lengths))
    )


def toy():
    """A toy policy and its params."""
    policy = toy_policy()
    return policy, toy_params(policy)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("family", ["toy", "neox"])
def test_log_probs_equal_rescored_ones(family, temperature):
    """law: the importance ratio before the first update is 1, for ragged prompts."""
    policy, params = toy()
    if family == "neox":
        policy, params = ntkrl.build("GPTNeoXForCausalLM", TINY, jax.random.key(0))
    sample = jax.jit(rollout.make_sampler(policy, settings(temperature=temperature)))
    drawn = sample(params, prompts(), jax.random.key(1))
    found = scoring.score(policy, params, drawn.tokens, drawn.mask, 6, temperature)
    mask = np.asarray(drawn.completion_mask)
    assert mask.sum() > 6  # more than the first token of each row
    gap = np.abs(np.asarray(found.log_probs - drawn.sampler_log_probs))[mask]
    assert gap.max() < 2e-5


def test_shapes_and_ends():
    """law: groups are consecutive, the end token counts, pad follows it, nothing after."""
    policy, params = toy()
    params = {**params, "head": params["head"].at[EOS].add(1.0)}
    drawn = rollout.make_sampler(policy, settings(max_completion_tokens=12))(
        params, prompts(), jax.random.key(3)
    )
    assert drawn.tokens.shape == (6, 17) and drawn.completion_mask.shape == (6, 12)
    np.testing.assert_array_equal(drawn.tokens[0, :5], drawn.tokens[2, :5])
    ended = 0
    for row in range(6):
        completion, mask = np.asarray(drawn.tokens[row, 5:]), np.asarray(drawn.completion_mask[row])
        length = int(mask.sum())
        assert mask[:length].all() and (completion[length:] == PAD).all()
        assert EOS not in completion[: length - 1]
        assert bool(drawn.finished[row]) == (completion[length - 1] == EOS)
        ended += bool(drawn.finished[row])
        assert (np.asarray(drawn.sampler_log_probs[row, length:]) == 0).all()
    assert 0 < ended  # the test means nothing if no row ends early
    np.testing.assert_array_equal(drawn.mask[:, 5:], drawn.completion_mask)


def test_a_budget_of_one_token():
    """law: the loop may take no step at all."""
    policy, params = toy()
    drawn = rollout.make_sampler(policy, settings(max_completion_tokens=1))(
        params, prompts(), jax.random.key(0)
    )
    assert drawn.completion_mask.all() and drawn.tokens.shape == (6, 6)


def test_draws_follow_the_distribution():
    """law: first-token frequencies of 4000 draws lie within 4 standard errors of π."""
    policy, params = toy()
    one = prompts(lengths=(4,))
    many = settings(completions_per_prompt=4000, max_completion_tokens=1)
    drawn = rollout.make_sampler(policy, many)(params, one, jax.random.key(5))
    phi = policy.features(params, one.tokens, one.mask)[0, -1]
    expected = np.asarray(jax.nn.softmax(policy.head(params, phi)))
    counts = np.bincount(np.asarray(drawn.tokens[:, -1]), minlength=7) / 4000
    error = np.sqrt(expected * (1 - expected) / 4000)
    assert (np.abs(counts - expected) < 4 * error).all()
    assert len(set(np.asarray(drawn.tokens[:, -1]).tolist())) > 3


def test_prompt_is_read_once():
    """law: the prefill sees P rows, not P·N."""
    policy, params = toy()
    seen = []

    def decode(p, cache, tokens, mask):
        seen.append(tokens.shape)
        return policy.decode(p, cache, tokens, mask)

    spied = dataclasses.replace(policy, decode=decode)
    rollout.make_sampler(spied, settings())(params, prompts(), jax.random.key(0))
    assert seen[0] == (2, 5) and set(seen[1:]) == {(6, 1)}


def test_early_exit():
    """law: the loop stops when every row has ended, long before the budget."""
    policy, params = toy()
    calls = []

    def decode(p, cache, tokens, mask):
        jax.debug.callback(lambda: calls.append(1))
        return policy.decode(p, cache, tokens, mask)

    spied = dataclasses.replace(policy, decode=decode, max_tokens=600)
    params = {**params, "head": jnp.zeros_like(params["head"])}
    # logits all zero: each step ends a row with chance 1/7, so 500 steps are never needed
    sample = jax.jit(rollout.make_sampler(spied, settings(max_completion_tokens=500)))
    drawn = sample(params, prompts(), jax.random.key(0))
    jax.block_until_ready(drawn)
    jax.effects_barrier()
    longest = int(drawn.completion_mask.sum(axis=1).max())
    assert bool(drawn.finished.all()) and longest < 200
    assert len(calls) == longest  # the prefill and one read per further token


def test_rows_do_not_depend_on_their_neighbours():
    """law: a row's completion is a function of its own prompt and key."""
    policy, params = toy()
    sample = rollout.make_sampler(policy, settings(completions_per_prompt=1))
    two = prompts(lengths=(3, 5))
    other = two.replace(tokens=two.tokens.at[1].set(2))
    first, second = (sample(params, p, jax.random.key(9)) for p in (two, other))
    np.testing.assert_array_equal(first.tokens[0], second.tokens[0])


def test_errors():
    """law: temperature 0, empty groups and a context that is too small are refused by name."""
    with pytest.raises(ValueError, match="temperature must be > 0, not 0.0"):
        settings(temperature=0.0)
    with pytest.raises(ValueError, match="completions_per_prompt must be ≥ 1, not 0"):
        settings(completions_per_prompt=0)
    policy, params = toy()
    with pytest.raises(ValueError, match="prompts of 5 tokens and completions of 60 exceed .* 64"):
        rollout.make_sampler(policy, settings(max_completion_tokens=60))(
            params, prompts(), jax.random.key(0)
        )
