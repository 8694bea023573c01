"""Token statistics and their gradients against plain autodiff and numpy, in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl.softmax import OutputHead, SoftmaxOptions, logit_statistics, logits, token_statistics
from tests.oracles import log_softmax

ROWS, T, D, V = 2, 5, 3, 7
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "all": {"bias": True, "scale": 0.4, "soft_cap": 2.0},
}
TILES = [(1, None), (4, 2), (7, 3), (100, None), (100, 3), (100, 50)]
NAMES = ("log_probs", "entropy", "sum_squares", "max_prob", "kl")


def draws(kind="plain", seed=0):
    """A head, features, targets, and a reference of another width."""
    rng = np.random.default_rng(seed)
    settings = dict(HEADS[kind])
    if settings.pop("bias", False):
        settings["bias"] = jnp.asarray(rng.normal(size=V))
    head = OutputHead(jnp.asarray(2 * rng.normal(size=(V, D))), **settings)
    other = OutputHead(jnp.asarray(rng.normal(size=(V, 2))))
    features = jnp.asarray(rng.normal(size=(ROWS, T, D)))
    targets = jnp.asarray(rng.integers(0, V, (ROWS, T)))
    return head, features, targets, (other, jnp.asarray(rng.normal(size=(ROWS, T, 2))))


def plain(head, features, targets, temperature, reference):
    """Return the same by full logits and jax.nn.log_softmax; autodiff does the rest."""
    z = jnp.einsum("btd,vd->btv", features, head.weight)
    z = head.scale * (z if head.bias is None else z + head.bias[None, None])
    z = z if head.soft_cap is None else head.soft_cap * jnp.tanh(z / head.soft_cap)
    log_pi = jax.nn.log_softmax(z / temperature)
    other = jnp.einsum("btd,vd->btv", reference[1], reference[0].weight) / temperature
    pi = jnp.exp(log_pi)
    return {
        "log_probs": jnp.take_along_axis(log_pi, targets[..., None], -1)[..., 0],
        "entropy": -jnp.sum(pi * log_pi, -1),
        "sum_squares": jnp.sum(pi**2, -1),
        "max_prob": jnp.max(pi, -1),
        "kl": jnp.sum(pi * (log_pi - jax.nn.log_softmax(other)), -1),
    }


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values(x64, kind, tiles, temperature):
    """oracle: full logits, whatever the tiles; the last tile overlaps the one before."""
    head, features, targets, reference = draws(kind)
    expected = plain(head, features, targets, temperature, reference)
    result = token_statistics(
        head, features, targets, SoftmaxOptions(temperature, *tiles, top=3), reference
    )
    for name in NAMES:
        np.testing.assert_allclose(getattr(result, name), expected[name], rtol=1e-11, atol=1e-13)
    log_pi = log_softmax(np.asarray(logits(head, features)) / temperature)
    np.testing.assert_array_equal(result.argmax, log_pi.argmax(-1))
    order = np.argsort(-log_pi, axis=-1)[..., :3]
    np.testing.assert_array_equal(result.top_tokens, order)
    np.testing.assert_allclose(result.top_log_probs, np.take_along_axis(log_pi, order, -1))


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("kind", HEADS)
def test_gradients(x64, kind, tiles):
    """oracle: autodiff of full logits in head and features, each statistic weighted at random."""
    head, features, targets, reference = draws(kind)
    weights = np.random.default_rng(9).normal(size=(len(NAMES), ROWS, T))

    def total(read):
        def value(head, features):
            result = read(head, features)
            return sum(jnp.sum(w * result[n]) for n, w in zip(NAMES, weights, strict=True))

        return jax.grad(value, argnums=(0, 1))(head, features)

    def ours(head, features):
        result = token_statistics(head, features, targets, SoftmaxOptions(0.7, *tiles), reference)
        return result._asdict()

    expected = total(lambda h, f: plain(h, f, targets, 0.7, reference))
    for a, b in zip(jax.tree.leaves(total(ours)), jax.tree.leaves(expected), strict=True):
        assert float(jnp.abs(b).max()) > 1e-2
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES[:4])
def test_one_cotangent_at_a_time(x64, name):
    """law: a statistic's gradient does not need the others', with logits made again or kept."""
    head, features, targets, reference = draws("bias")

    def total(read):
        return jax.grad(lambda w: jnp.sum(jnp.sin(read(OutputHead(w, head.bias)))))(head.weight)

    expected = total(lambda h: plain(h, features, targets, 1.0, reference)[name])
    made = total(
        lambda h: getattr(token_statistics(h, features, targets, SoftmaxOptions(1.0, 4, 2)), name)
    )
    kept = total(lambda h: getattr(logit_statistics(logits(h, features), targets), name))
    np.testing.assert_allclose(made, expected, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(kept, expected, rtol=1e-10, atol=1e-13)


def test_unneeded_cotangents_are_not_made():
    """law: a frozen head costs no dW, and fixed features no dφ: one product less each."""
    head, features, targets, _ = draws()

    def products(argnums):
        def value(head, features):
            return jnp.sum(token_statistics(head, features, targets).log_probs)

        text = str(jax.make_jaxpr(jax.grad(value, argnums=argnums))(head, features))
        return text.count("dot_general")

    # logits forward and backward, then dW and dφ
    assert (products((0, 1)), products(0), products(1)) == (4, 3, 3)


def test_excluded_tokens():
    """by hand: a bias of −∞ takes a token out; entropy and gradients stay finite."""
    head = OutputHead(jnp.zeros((3, 2)), jnp.array([0.0, 0.0, -jnp.inf]))

    def total(weight):
        result = token_statistics(
            OutputHead(weight, head.bias),
            jnp.ones((1, 2)),
            jnp.zeros(1, int),
            SoftmaxOptions(chunk_vocabulary=1),
        )
        return jnp.sum(result.entropy + result.log_probs + result.sum_squares), result

    gradient, result = jax.grad(total, has_aux=True)(head.weight)
    np.testing.assert_allclose(result.entropy, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0.5, 0.5], [-0.5, -0.5], [0, 0]], atol=1e-6)
    shut = token_statistics(head, jnp.ones((1, 2)), jnp.array([2]))
    assert float(shut.log_probs[0]) == -np.inf


def test_half_precision_statistics_are_float32():
    """law: bfloat16 features give float32 statistics, and gradients in the dtypes that came."""
    features = jnp.ones((4, 3), jnp.bfloat16)
    weight = jnp.eye(3, dtype=jnp.float32)

    def total(weight, features):
        result = token_statistics(OutputHead(weight), features, jnp.zeros(4, int))
        assert result.log_probs.dtype == result.entropy.dtype == jnp.float32
        return jnp.sum(result.log_probs)

    d_weight, d_features = jax.grad(total, argnums=(0, 1))(weight, features)
    assert (d_weight.dtype, d_features.dtype) == (jnp.float32, jnp.bfloat16)


@pytest.mark.parametrize("statistics", ["logits", "features"])
def test_half_precision_multiplies_in_half_precision(statistics):
    """law: no product of the loss or of its gradient has a float32 operand under bfloat16."""

    def total(weight, features, targets):
        head = OutputHead(weight)
        if statistics == "features":
            return jnp.sum(token_statistics(head, features, targets).log_probs)
        return jnp.sum(logit_statistics(logits(head, features), targets).log_probs)

    shapes = ((5, 3), jnp.float32), ((2, 4, 3), jnp.bfloat16), ((2, 4), jnp.int32)
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    text = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*arguments).as_text()
    operands = re.findall(r"dot_general .* : \(tensor<\S*x(\w+)>, tensor<\S*x(\w+)>\)", text)
    # autodiff of the product alone has two with f32: dz has the dtype of the logits
    assert len(operands) >= 3 and set(operands) == {("bf16", "bf16")}


def test_half_precision_gradients_of_logits():
    """oracle: gradients of bfloat16 features equal float32's of the same numbers to rounding."""
    keys = jax.random.split(jax.random.key(0), 2)
    features = jax.random.normal(keys[0], (2, 4, 16), jnp.bfloat16)
    weight = jax.random.normal(keys[1], (8, 16), jnp.bfloat16).astype(jnp.float32)
    targets = jnp.arange(8).reshape(2, 4)

    def total(weight, features):
        head = OutputHead(weight, jnp.arange(8.0), scale=0.5)
        return jnp.sum(logit_statistics(logits(head, features), targets).log_probs)

    half = jax.grad(total, argnums=(0, 1))(weight, features)
    full = jax.grad(total, argnums=(0, 1))(weight, features.astype(jnp.float32))
    assert (half[0].dtype, half[1].dtype) == (jnp.float32, jnp.bfloat16)
    for values, exact in zip(half, full, strict=True):
        # bfloat16 has 8 bits: 2⁻⁸ of the largest of dz, and of the result
        np.testing.assert_allclose(
            values.astype(jnp.float32), exact, atol=0.01 * np.abs(exact).max()
        )


def test_memory_does_not_grow_with_positions_times_vocabulary():
    """law: by the compiler's analysis, four times the tokens and the tile stays the peak."""

    def temporary(length, vocab):
        shapes = [
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in (
                ((vocab, 16), jnp.float32),
                ((1, length, 16), jnp.float32),
                ((1, length), jnp.int32),
            )
        ]

        def value(weight, features, targets):
            result = token_statistics(
                OutputHead(weight), features, targets, SoftmaxOptions(1.0, 64, 512)
            )
            return jnp.sum(result.log_probs) + jnp.sum(result.entropy)

        compiled = jax.jit(jax.grad(value, argnums=(0, 1))).lower(*shapes).compile()
        scratch = compiled.memory_analysis().temp_size_in_bytes
        # what grows rightly: gradients and their like, of W's and of φ's size
        return scratch - 3 * 4 * 16 * (vocab + length)

    tile = 64 * 512 * 4
    assert temporary(2048, 16384) < 8 * tile < 2048 * 16384 * 4 / 100
