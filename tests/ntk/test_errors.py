"""Invalid kernel requests: one sentence with the fix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl import ntk
from tests.ntk.networks import TOKENS, VOCAB, contexts, features, network
from tests.toys import toy_params, toy_policy

TOY = toy_policy(vocab=VOCAB)


def changed(**fields):
    """Contexts with something wrong."""
    good = {"tokens": jnp.asarray(TOKENS), "positions": jnp.array([1, 1, 1])}
    return ntk.Contexts(**{**good, **fields})


CONTEXTS = {
    "position": (changed(positions=jnp.array([4, 5, -1])), r"positions 5, -1 are outside \[0, 5\)"),
    "row": (
        changed(positions=jnp.array([1]), rows=jnp.array([3])),
        r"rows 3 are outside \[0, 3\)",
    ),
    "count": (changed(positions=jnp.array([1, 2])), "one position per sequence"),
    "unequal": (
        changed(positions=jnp.array([1, 2]), rows=jnp.array([1])),
        "must be one list each, equally long",
    ),
    "empty": (
        changed(positions=jnp.zeros(0, int), rows=jnp.zeros(0, int)),
        "there is no context",
    ),
    "padding": (
        changed(positions=jnp.array([4, 4, 4]), mask=jnp.asarray(TOKENS > 1)),
        "contexts 1, 2 end on padding",
    ),
    "mask": (changed(mask=jnp.ones((3, 4), bool)), r"mask has shape \(3, 4\), the sequences"),
    "ids": (changed(tokens=jnp.ones((3, 5))), "integer ids of shape"),
    "vocabulary": (changed(tokens=jnp.asarray(TOKENS) + 4), r"ids from 4 to 12; the vocabulary is"),
}


@pytest.mark.parametrize("wrong", CONTEXTS.values(), ids=CONTEXTS.keys())
def test_bad_contexts_are_named(wrong):
    """law: errors are raised before tracing, and name the side."""
    bad, message = wrong
    params = toy_params(TOY)
    for sides, name in (((bad,), "observed"), ((changed(), bad), "updated")):
        with pytest.raises(ValueError, match=message) as caught:
            ntk.kernel(TOY, params, *sides)
        assert name in str(caught.value)


def test_networks_that_cannot_see_padding_refuse_it():
    """law: left padding changes the output of a network without a mask, so it is an error."""
    result, params = network("plain", False)
    blind = ntk.Network(features, result.head)
    mask = np.ones((3, 5), bool)
    mask[1, 0] = False
    with pytest.raises(ValueError, match="contexts 1 have padding before them"):
        ntk.kernel(blind, params, changed(mask=mask))
    mask = np.ones((3, 5), bool)
    mask[1, 3:] = False
    ntk.kernel(blind, params, changed(mask=mask))


def params_with(**leaves):
    return {**toy_params(TOY), **leaves}


PARAMS = {
    "integers": (
        params_with(head=jnp.ones((9, 5), int)),
        r"floating point; these are not: head \(",
    ),
    "dtypes": (
        params_with(mix=jnp.ones((5, 5), jnp.bfloat16)),
        r"mix dtypes \(bfloat16, float32\)",
    ),
    "values": (params_with(mix=jnp.full((5, 5), np.nan)), "not finite, in mix"),
    "leaves": (params_with(extra=jnp.tanh), "not arrays: extra; split them off"),
    "head": ({"embed": jnp.ones((9, 5)), "mix": jnp.ones((5, 5))}, "'head' is not a parameter"),
}


@pytest.mark.parametrize("wrong", PARAMS.values(), ids=PARAMS.keys())
def test_bad_params_are_named(wrong):
    """law: dtypes, values and names of params are checked first."""
    params, message = wrong
    with pytest.raises(ValueError, match=message):
        ntk.kernel(TOY, params, changed())


HEADS = {
    "transposed": (ntk.Head("head", transposed=True), "Is the head transposed"),
    "vector": (ntk.Head("gain"), "must be a matrix"),
    "bias": (ntk.Head("head", bias="mlp_bias"), r"has shape \(4,\); with the weight's"),
    "missing": (ntk.Head("heed"), r"'heed' is not a parameter. Did you mean 'head'\?"),
    "cap": (ntk.Head("head", soft_cap=0.0), "soft_cap must be positive"),
}


@pytest.mark.parametrize("wrong", HEADS.values(), ids=HEADS.keys())
def test_bad_heads_are_named(wrong):
    """law: a head that does not fit the params or the features is refused."""
    described, message = wrong
    _, params = network("plain", False)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    with pytest.raises(ValueError, match=message):
        ntk.kernel(ntk.Network(features, described, takes_mask=True), params, changed())


def test_a_policy_must_mean_what_it_says():
    """law: a head function that its description does not give would make wrong kernels."""
    import dataclasses

    odd = dataclasses.replace(TOY, head=lambda params, phi: jnp.tanh(TOY.head(params, phi)))
    with pytest.raises(ValueError, match="policy.head does not compute"):
        ntk.kernel(odd, toy_params(TOY), changed())
    with pytest.raises(ValueError, match="must be a Policy or an ntk.Network, not dict"):
        ntk.kernel({}, toy_params(TOY), changed())


def test_bad_requests_are_named():
    """law: unknown parts and algorithms, rows outside, wrong shapes, results too large."""
    params = toy_params(TOY)
    kernel = ntk.kernel(TOY, params, changed(), groups=((".*", "all"),))
    cases = [
        (lambda: kernel.dense("R"), "part 'R' is unknown; known are head, body, .*, all"),
        (lambda: kernel.dense(rows=[3, 9]), r"rows has ids from 3 to 9; the vocabulary is"),
        (lambda: kernel.dense(columns=[0.5]), "columns must be a list of token ids, not float"),
        (lambda: kernel.apply(jnp.ones((2, 9))), r"cotangents must have shape \(3, 9\), not \(2"),
        (lambda: kernel.apply(jnp.ones((3, 9), int)), "cotangents must be floating point"),
        (lambda: kernel.body(chunk=0), "chunk must be at least 1"),
        (lambda: kernel.bilinear(*[jnp.ones((3, 9))] * 2, by="row"), "by must be 'context'"),
        (
            lambda: ntk.kernel(TOY, params, changed(), algorithm="fast"),
            "algorithm 'fast' is unknown",
        ),
        (lambda: ntk.kernel(TOY, params, changed(), memory_gib=0), "memory_gib must be positive"),
        (
            lambda: ntk.kernel(TOY, params, changed(), memory_gib=1e-7).dense(),
            r"dense\(\) would be .* GiB, above memory_gib=.*; use dense\(rows",
        ),
        (
            lambda: ntk.kernel(TOY, params, changed(), groups=((".*", "head"),)),
            "head name built-in parts",
        ),
        (
            lambda: ntk.kernel(TOY, params, changed(), groups=(("mix", "a"),)),
            "no pattern covers embed, head",
        ),
        (
            lambda: ntk.kernel(TOY, params, changed(), precondition={"mix": 1.0}),
            "precondition must have the structure",
        ),
        (lambda: ntk.eigenpairs(kernel, 27), r"count must be in \[1, 27\) for 3 contexts"),
        (lambda: ntk.eigenpairs(ntk.kernel(TOY, params, *contexts(False))), "without updated"),
        (lambda: ntk.eigenpairs(kernel, 1, "output_input"), "is not symmetric"),
        (
            lambda: ntk.score_gram(TOY, params, changed(), jnp.array([1, 2])),
            "targets must be 3 token ids",
        ),
        (
            lambda: ntk.score_gram(TOY, params, changed(), jnp.array([1, 2, 9])),
            "targets have ids from 1 to 9",
        ),
        (
            lambda: ntk.alignment(kernel, ntk.kernel(TOY, params, *contexts(False))),
            "kernels differ in contexts",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
