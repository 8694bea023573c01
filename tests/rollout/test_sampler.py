"""The sampler against the plain forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntkrl
from ntkrl import rollout, runtime, scoring, softmax, trees
from ntkrl.types import PromptBatch
from tests.toys import TINY, toy_params, toy_policy

EOS, PAD = 0, 1


def settings(**overrides):
    """Settings of a small sampler."""
    base = dict(
        completions_per_prompt=3,
        max_completion_tokens=6,
        temperature=1.0,
        end_ids=(EOS,),
        pad_id=PAD,
    )
    return rollout.SamplerSettings(**base | overrides)


def prompts(lengths=(2, 5), width=5, vocab=7):
    """Return left-padded prompts of chosen lengths."""
    rng = np.random.default_rng(0)
    tokens, mask = np.full((len(lengths), width), PAD), np.zeros((len(lengths), width), bool)
    for i, length in enumerate(lengths):
        tokens[i, width - length :] = rng.integers(2, vocab, length)
        mask[i, width - length :] = True
    return PromptBatch(
        tokens=jnp.asarray(tokens),
        mask=jnp.asarray(mask),
        rows=jnp.arange(len(lengths)),
        copies=jnp.zeros(len(lengths), int),
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
    sample = rollout.Sampler(policy, settings(temperature=temperature))
    drawn = sample(params, prompts(), jax.random.key(1))
    result = scoring.score(
        policy, params, drawn.tokens, drawn.mask, 6, softmax.SoftmaxOptions(temperature)
    )
    mask = np.asarray(drawn.completion_mask)
    assert mask.sum() > 6  # more than the first token of each row
    gap = np.abs(np.asarray(result.log_probs - drawn.sampler_log_probs))[mask]
    assert gap.max() < 2e-5
    np.testing.assert_allclose(drawn.entropy[mask], result.entropy[mask], atol=2e-5)
    assert (np.asarray(drawn.entropy)[~mask] == 0).all() and np.std(drawn.entropy[mask]) > 0.01


def test_shapes_and_ends():
    """law: groups are consecutive, the end token counts, pad follows it, nothing after."""
    policy, params = toy()
    params = {**params, "head": params["head"].at[EOS].add(1.0)}
    drawn = rollout.Sampler(policy, settings(max_completion_tokens=12))(
        params, prompts(), jax.random.key(3)
    )
    longest = int(drawn.completion_mask.sum(axis=1).max())
    assert drawn.completion_mask.shape == (6, 8 if longest <= 8 else 12)
    assert drawn.tokens.shape == (6, 5 + drawn.completion_mask.shape[1])
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
    drawn = rollout.Sampler(policy, settings(max_completion_tokens=1))(
        params, prompts(), jax.random.key(0)
    )
    assert drawn.completion_mask.all() and drawn.tokens.shape == (6, 6)


def test_draws_follow_the_distribution():
    """law: first-token frequencies of 4000 draws are within 4 standard errors of π."""
    policy, params = toy()
    prompt = prompts(lengths=(4,))
    many = settings(completions_per_prompt=4000, max_completion_tokens=1)
    drawn = rollout.Sampler(policy, many)(params, prompt, jax.random.key(5))
    phi = policy.features(params, prompt.tokens, prompt.mask)[0, -1]
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
    rollout.Sampler(spied, settings())(params, prompts(), jax.random.key(0))
    assert seen[0] == (2, 5) and set(seen[1:]) == {(6, 1)}


def test_early_exit():
    """law: decoding stops with the chunk in which the last row ended, long before the budget."""
    policy, params = toy()
    calls = []

    def decode(p, cache, tokens, mask):
        jax.debug.callback(lambda: calls.append(1))
        return policy.decode(p, cache, tokens, mask)

    spied = dataclasses.replace(policy, decode=decode, max_tokens=600)
    params = {**params, "head": jnp.zeros_like(params["head"])}
    # logits all zero: each step ends a row with chance 1/7, so 500 steps are never needed
    sample = rollout.Sampler(spied, settings(max_completion_tokens=500))
    drawn = sample(params, prompts(), jax.random.key(0))
    jax.block_until_ready(drawn)
    jax.effects_barrier()
    longest = int(drawn.completion_mask.sum(axis=1).max())
    assert bool(drawn.finished.all()) and longest < 200
    chunks = -(-(longest - 1) // sample.chunk_length)
    assert len(calls) == 1 + chunks * sample.chunk_length  # the prefill and whole chunks


def test_rows_do_not_depend_on_their_neighbours():
    """law: a row's completion is a function of its prompt and key alone."""
    policy, params = toy()
    sample = rollout.Sampler(policy, settings(completions_per_prompt=1))
    two = prompts(lengths=(3, 5))
    other = two.replace(tokens=two.tokens.at[1].set(2))
    first, second = (sample(params, p, jax.random.key(9)) for p in (two, other))
    np.testing.assert_array_equal(first.tokens[0], second.tokens[0])


def neox(**overrides):
    """A tiny GPT-NeoX whose end token is likely enough to end rows at different times."""
    policy, params = ntkrl.build("GPTNeoXForCausalLM", {**TINY, **overrides}, jax.random.key(0))
    return policy, {**params, "head": {"weight": 0.5 * params["head"]["weight"]}}


def compilations(sampler):
    """How many programs were compiled so far."""
    return sum(program._cache_size() for program in sampler.programs)


def test_growing_caches_and_leaving_rows_change_nothing():
    """law: small chunks, a growing cache and compaction draw the same as one long chunk."""
    policy, params = neox()
    many = settings(completions_per_prompt=16, max_completion_tokens=40)
    moved = dataclasses.replace(many, chunk_steps=4)
    plain = rollout.Sampler(policy, dataclasses.replace(many, chunk_steps=64, fewest_rows=32))
    small = rollout.Sampler(policy, dataclasses.replace(moved, fewest_rows=2))
    key = jax.random.key(4)
    expected = plain(params, prompts(), key)
    before = compilations(small)
    result = small(params, prompts(), key)
    compact, grow_cache = small.programs.compact, small.programs.grow_cache
    assert compact._cache_size() >= 2 and grow_cache._cache_size() >= 2
    assert plain.programs.decode_chunk._cache_size() == 1
    np.testing.assert_array_equal(result.tokens, expected.tokens)
    np.testing.assert_array_equal(result.finished, expected.finished)
    np.testing.assert_allclose(result.sampler_log_probs, expected.sampler_log_probs, atol=2e-5)
    small(params, prompts(), jax.random.key(5))
    # rows 32, 16, 8, 4, 2 and cache lengths 21, 37, 44 at most, whatever is drawn
    assert small.programs.decode_chunk._cache_size() <= 15
    assert compilations(small) - before <= 15 + 12 + 10 + 1


def test_the_cache_grows_by_a_quarter():
    """by hand: 16 columns or a quarter in multiples of 16, at most the 39 tokens that are read."""
    policy, _ = toy()
    small = rollout.Sampler(policy, settings(max_completion_tokens=40))
    drawn = (1, 17, 18, 33, 34, 40)
    assert [small.cache_columns(5, count) - 5 for count in drawn] == [16, 16, 32, 32, 39, 39]
    # 64 + 16, + 32, + 32, + 48, and 127 of 128 tokens; doubled chunks had 16, 32, 64, 127
    large = rollout.Sampler(policy, settings(max_completion_tokens=128))
    lengths = sorted({large.cache_columns(64, count) for count in range(1, 129)})
    assert lengths == [80, 112, 144, 191]


@pytest.mark.parametrize("budget", [1, 2, 16, 20, 64, 128])
def test_chunks_are_of_equal_length(budget):
    """law: they are no longer than asked for, and waste less than a step each."""
    chosen = settings(max_completion_tokens=budget, chunk_steps=16)
    length, steps = chosen.chunk_length("cpu"), max(budget - 1, 1)
    chunks = -(-steps // length)
    assert length <= 16 and chunks == -(-steps // 16) and chunks * length - steps < chunks
    automatic = settings(max_completion_tokens=budget)
    assert automatic.chunk_length("cpu") <= 4 and automatic.chunk_length("gpu") == length


def test_no_row_ends_past_the_budget():
    """law: chunks of another length leave no mark of steps past the budget: 12 = 1 + 6 + 6 − 1."""
    policy, params = neox()
    options = {"max_completion_tokens": 12, "completions_per_prompt": 32}
    expected = rollout.Sampler(policy, settings(**options, chunk_steps=11))
    result = rollout.Sampler(policy, settings(**options, chunk_steps=6))
    assert (expected.chunk_length, result.chunk_length) == (11, 6)
    first, second = (sample(params, prompts(), jax.random.key(1)) for sample in (expected, result))
    jax.tree.map(np.testing.assert_array_equal, first.finished, second.finished)
    np.testing.assert_array_equal(first.tokens, second.tokens)
    assert 0 < int(first.finished.sum()) < 64


def test_nothing_recompiles():
    """law: further batches of the same shapes compile nothing."""
    policy, params = neox()
    sampler = rollout.Sampler(policy, settings(max_completion_tokens=20, fewest_rows=64))
    sampler(params, prompts(), jax.random.key(0))
    before = compilations(sampler)
    for seed in range(1, 4):
        sampler(params, prompts(), jax.random.key(seed))
    assert compilations(sampler) == before
    assert sampler.programs.prefill._cache_size() == 1


def test_what_a_prompt_gets_does_not_depend_on_the_batch():
    """law: keys belong to the request: another order, other neighbours, a copy of a prompt."""
    policy, params = neox()
    sample = rollout.Sampler(policy, settings(max_completion_tokens=12))
    two = prompts()
    key = jax.random.key(2)
    both = sample(params, two, key)
    swapped = sample(params, jax.tree.map(lambda leaf: leaf[::-1], two), key)
    alone = sample(params, jax.tree.map(lambda leaf: leaf[1:], two), key)
    length = min(drawn.completion_mask.shape[1] for drawn in (both, swapped, alone))
    completions = [np.asarray(drawn.tokens[:, 5 : 5 + length]) for drawn in (both, swapped, alone)]
    np.testing.assert_array_equal(completions[0][3:], completions[1][:3])
    np.testing.assert_array_equal(completions[0][3:], completions[2])
    twice = jax.tree.map(lambda leaf: jnp.repeat(leaf[:1], 2, axis=0), two)
    copied = sample(params, twice.replace(copies=jnp.array([0, 1])), key)
    assert not np.array_equal(copied.tokens[:3], copied.tokens[3:])
    assert len({tuple(row) for row in np.asarray(copied.tokens).tolist()}) > 3
    many = rollout.Sampler(policy, settings(max_completion_tokens=12, completions_per_prompt=6))
    at_once = many(params, jax.tree.map(lambda leaf: leaf[:1], two), key)
    np.testing.assert_array_equal(at_once.tokens, copied.tokens)


def test_greedy_takes_the_likeliest():
    """law: temperature 0 follows the arg max; equal completions, log-probs of the policy."""
    policy, params = neox()
    drawn = rollout.Sampler(policy, settings(temperature=0.0, completions_per_prompt=2))(
        params, prompts(), jax.random.key(0)
    )
    length = drawn.completion_mask.shape[1]
    result = scoring.score(policy, params, drawn.tokens, drawn.mask, length)
    mask = np.asarray(drawn.completion_mask)
    np.testing.assert_array_equal(
        np.asarray(result.argmax)[mask], np.asarray(drawn.tokens[:, -length:])[mask]
    )
    np.testing.assert_allclose(drawn.sampler_log_probs[mask], result.log_probs[mask], atol=2e-5)
    np.testing.assert_array_equal(drawn.tokens[0], drawn.tokens[1])


def test_features_are_those_the_head_read():
    """law: the recorded features give the recorded log-probs, and are those of a forward pass."""
    policy, params = neox()
    drawn = rollout.Sampler(policy, settings(keep_features=True))(
        params, prompts(), jax.random.key(0)
    )
    mask, length = np.asarray(drawn.completion_mask), drawn.completion_mask.shape[1]
    again = scoring.completion_features(policy, params, drawn.tokens, drawn.mask, length)
    np.testing.assert_allclose(np.asarray(drawn.features)[mask], again[mask], atol=1e-5)


def test_a_half_precision_cache():
    """law: a bfloat16 cache is one, and log-probs stay within its rounding."""
    policy, params = neox()
    seen = []

    def init_cache(batch_size, length, dtype=None):
        seen.append(dtype)
        return policy.init_cache(batch_size, length, dtype)

    spied = dataclasses.replace(policy, init_cache=init_cache)
    drawn = rollout.Sampler(spied, settings(cache_dtype=jnp.bfloat16))(
        params, prompts(), jax.random.key(0)
    )
    assert set(seen) == {jnp.bfloat16}
    length = drawn.completion_mask.shape[1]
    result = scoring.score(policy, params, drawn.tokens, drawn.mask, length)
    gap = np.abs(result.log_probs - drawn.sampler_log_probs)[np.asarray(drawn.completion_mask)]
    assert 0 < gap.max() < 0.05


def test_stop_strings_end_completions():
    """law: a completion ends with the first token after which the stop string occurs."""
    policy, params = neox()
    key, long = jax.random.key(1), settings(max_completion_tokens=30, chunk_steps=4)
    free = rollout.Sampler(policy, long)(params, prompts(), key)

    def find(ids):
        pairs = [i for i in range(len(ids) - 1) if ids[i] + ids[i + 1] == 20]
        return pairs[0] + 2 if pairs else None

    truncated = rollout.Sampler(policy, long, find)(params, prompts(), key)
    stopped = 0
    for row in range(6):
        ids = np.asarray(free.tokens[row, 5:])[: int(free.completion_mask[row].sum())]
        end = find(ids)
        stopped += end is not None
        expected = ids if end is None else ids[:end]
        count = int(truncated.completion_mask[row].sum())
        np.testing.assert_array_equal(truncated.tokens[row, 5 : 5 + count], expected)
        assert (np.asarray(truncated.tokens[row, 5 + count :]) == PAD).all()
        assert bool(truncated.finished[row]) == (end is not None or bool(free.finished[row]))
        np.testing.assert_array_equal(
            truncated.sampler_log_probs[row, :count], free.sampler_log_probs[row, :count]
        )
    assert 2 <= stopped < 6


def test_errors():
    """law: every setting outside its range, and a context that is too small, are named."""
    with pytest.raises(ValueError) as caught:
        settings(temperature=-1.0, completions_per_prompt=0, top_k=0, top_p=0.0, min_p=1.0)
    for problem in (
        "temperature must be finite and ≥ 0, not -1.0",
        "completions_per_prompt must be ≥ 1, not 0",
        "top_k must be ≥ 1, or None",
        "top_p must be in (0, 1], or None",
        "min_p must be in [0, 1), or None",
    ):
        assert problem in str(caught.value)
    with pytest.raises(ValueError, match="temperature 0 takes the likeliest token"):
        settings(temperature=0.0, top_k=3)
    policy, params = toy()
    with pytest.raises(ValueError, match="prompts of 5 tokens and completions of 60 exceed .* 64"):
        rollout.Sampler(policy, settings(max_completion_tokens=60))(
            params, prompts(), jax.random.key(0)
        )


def test_eight_devices_draw_what_one_draws():
    """law: rows spread over data 2 × fsdp 2, a head over tensor 2, with compaction."""
    policy, params = neox(vocab_size=24)
    many = settings(completions_per_prompt=8, max_completion_tokens=30, keep_features=True)
    many = dataclasses.replace(many, chunk_steps=4, fewest_rows=4)
    key = jax.random.key(4)
    expected = rollout.Sampler(policy, many)(params, prompts(), key)
    mesh = runtime.make_mesh(2, 2, 2)
    placed = jax.device_put(params, trees.shardings(params, policy.sharding, mesh))
    # prompts of four rows spread over the four places of a batch
    four = jax.tree.map(lambda leaf: jnp.tile(leaf, (2,) + (1,) * (leaf.ndim - 1)), prompts())
    four = four.replace(copies=jnp.array([0, 0, 1, 1]))
    spread = rollout.Sampler(policy, many, mesh=mesh)
    result = spread(placed, runtime.place_rows(four, mesh), key)
    length = min(drawn.completion_mask.shape[1] for drawn in (expected, result))
    np.testing.assert_array_equal(
        result.tokens[:16, 5 : 5 + length], expected.tokens[:, 5 : 5 + length]
    )
    np.testing.assert_allclose(
        result.sampler_log_probs[:16, :length], expected.sampler_log_probs[:, :length], atol=2e-5
    )
    np.testing.assert_allclose(
        result.features[:16, :length], expected.features[:, :length], atol=2e-5
    )
    assert int(result.completion_mask.sum()) > 32
