"""Kernels against brute-force Jacobians in float64, for toy, untied and tied models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntkrl
from ntkrl import ntk
from ntkrl.ntk import forms
from tests.oracles import dense_kernel, group_kernel
from tests.toys import TINY, toy_params, toy_policy

pytestmark = pytest.mark.usefixtures("x64")

SMALL = {**TINY, "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12}
TOKENS = np.array([[3, 4, 5, 6, 7], [1, 2, 9, 8, 0], [5, 5, 5, 2, 1]])


@functools.cache  # one policy per kind: what is jitted for it serves every test
def model(kind):
    """A toy, an untied or a tied GPT-NeoX, in float64."""
    if kind == "toy":
        policy = toy_policy(vocab=11)
        return policy, toy_params(policy, dtype=jnp.float64)
    config = {**SMALL, "tie_word_embeddings": kind == "tied"}
    return ntkrl.build("GPTNeoXForCausalLM", config, jax.random.key(0), jnp.float64)


def contexts(padded):
    """Three observed contexts; three updated ones, two of them in one sequence."""
    tokens, mask = jnp.asarray(TOKENS), None
    if padded:
        tokens = jnp.pad(tokens, ((0, 0), (2, 0)), constant_values=7)
        mask = jnp.pad(jnp.ones_like(jnp.asarray(TOKENS), bool), ((0, 0), (2, 0)))
    shift = 2 if padded else 0
    observed = ntk.Contexts(tokens, jnp.array([4, 2, 3]) + shift, mask=mask)
    rows = jnp.array([0, 1, 1])
    return observed, ntk.Contexts(tokens, jnp.array([1, 4, 2]) + shift, rows, mask)


@functools.cache
def oracle(kind, padded):
    """The brute-force kernel of a model on the contexts."""
    return dense_kernel(*model(kind), *contexts(padded))


def relative(result, expected):
    """Largest error over the largest entry; refuses empty or all-zero comparisons."""
    assert result.shape == expected.shape and result.size and np.abs(expected).max() > 0
    return float(np.abs(result - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(("kind", "padded"), [("untied", True), ("tied", True)])
def test_dense_equals_brute_force(kind, padded):
    """oracle: V Jacobian rows per context; K = R + G (+ C) to rounding."""
    policy, params = model(kind)
    observed, updated = contexts(padded)
    kernel = ntk.kernel(policy, params, observed, updated)
    expected = oracle(kind, padded)
    assert relative(kernel.dense(), expected) < 1e-10
    parts = kernel.dense("head") + kernel.dense("body") + kernel.dense("cross")
    assert relative(parts, expected) < 1e-10


@pytest.mark.parametrize("kind", ["toy", "untied"])
def test_parts_are_parameter_groups(kind):
    """oracle: R is the kernel of W alone, G of all else; without a tie nothing crosses."""
    policy, params = model(kind)
    observed, updated = contexts(False)
    kernel = ntk.kernel(policy, params, observed, updated)
    is_head = lambda name: name == policy.head_weight  # noqa: E731
    head = group_kernel(policy, params, observed, updated, is_head)
    body = group_kernel(policy, params, observed, updated, lambda name: not is_head(name))
    assert relative(kernel.dense("head"), head) < 1e-10
    assert relative(kernel.dense("body"), body) < 1e-10
    assert float(jnp.abs(kernel.dense("cross")).max()) == 0.0


def test_cross_part_of_a_tied_head_is_not_small():
    """law: C is a separate part; dropping it would be an error far above rounding."""
    policy, params = model("tied")
    kernel = ntk.kernel(policy, params, *contexts(False))
    assert float(jnp.abs(kernel.dense("cross")).max()) > 0.1


def test_head_and_body_shapes_and_formulas():
    """by hand: R = ⟨φ, φ'⟩ I and G = W M Wᵀ from the two factors."""
    policy, params = model("untied")
    observed, updated = contexts(False)
    kernel = ntk.kernel(policy, params, observed, updated)
    phi = policy.features(params, observed.tokens)
    here, there = phi[jnp.arange(3), observed.positions], phi[updated.rows, updated.positions]
    assert kernel.head.shape == (3, 3)
    np.testing.assert_allclose(np.asarray(kernel.head), np.asarray(here @ there.T), rtol=1e-12)
    assert kernel.body().shape == (3, 3, 8, 8)
    weight = params["head"]["weight"]
    from_parts = np.einsum("vd,oude,we->ouvw", weight, kernel.body(), weight)
    assert relative(np.asarray(kernel.dense("body")), from_parts) < 1e-12


def test_one_compilation_serves_new_params():
    """law: the kernel is jitted per policy, not per call."""
    policy, params = model("toy")
    observed, updated = contexts(False)
    before = forms.body_apply._cache_size()
    for scale in (1.0, 2.0, 3.0):
        scaled = jax.tree.map(lambda leaf, s=scale: s * leaf, params)
        ntk.kernel(policy, scaled, observed, updated).apply(jnp.ones((3, 11)))
    assert forms.body_apply._cache_size() - before == 1


def test_kernel_has_the_methods_of_its_contract():
    """law: nothing is inherited or added, and a kernel prints as three lines."""
    public = {name for name in dir(ntk.Kernel) if not name.startswith("_")}
    forms_of_k = {"head", "body", "dense", "apply", "bilinear", "trace", "diagonal", "estimate"}
    assert public == forms_of_k
    lines = repr(ntk.kernel(*model("toy"), *contexts(False))).splitlines()
    assert len(lines) == 3 and lines[0] == "Kernel of 3 × 3 contexts, V = 11, D = 5"
