"""Models of linen, NNX, Equinox and plain pytrees, with heads stored in either orientation."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from ntkrl import ntk
from tests.ntk.networks import TOKENS, close
from tests.oracles import kernel_by_gradients

VOCAB, WIDTH = 9, 4


class Linen(linen.Module):
    """Embedding, a tanh layer on running means, and a Dense head."""

    @linen.compact
    def __call__(self, tokens):
        return linen.Dense(VOCAB, name="head")(self.features(tokens))

    @linen.nowrap
    def running(self, x):
        return jnp.cumsum(x, axis=1) / jnp.arange(1.0, x.shape[1] + 1).reshape(1, -1, 1)

    @linen.compact
    def features(self, tokens):
        x = linen.Embed(VOCAB, WIDTH, name="embed")(tokens)
        return linen.tanh(linen.Dense(WIDTH, name="mix")(self.running(x)))


class Nnx(nnx.Module):
    """The same network in NNX."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.mix = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def features(self, tokens):
        x = self.embed(tokens)
        x = jnp.cumsum(x, axis=1) / jnp.arange(1.0, x.shape[1] + 1).reshape(1, -1, 1)
        return jnp.tanh(self.mix(x))


class Equinox(eqx.Module):
    """The same network in Equinox, written for one sequence."""

    embed: eqx.nn.Embedding
    mix: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(VOCAB, WIDTH, key=keys[0])
        self.mix = eqx.nn.Linear(WIDTH, WIDTH, key=keys[1])
        self.head = eqx.nn.Linear(WIDTH, VOCAB, key=keys[2])

    def features(self, tokens):
        x = jax.vmap(self.embed)(tokens)
        x = jnp.cumsum(x, axis=0) / jnp.arange(1.0, x.shape[0] + 1)[:, None]
        return jnp.tanh(jax.vmap(self.mix)(x))


def linen_network():
    """Linen params are the tree that init returns."""
    module = Linen()
    params = module.init(jax.random.key(0), jnp.asarray(TOKENS))
    network = ntk.Network(
        lambda params, tokens: module.apply(params, tokens, method="features"),
        ntk.Head("params/head/kernel", bias="params/head/bias", transposed=True),
    )
    return network, params, lambda phi: phi @ params["params"]["head"]["kernel"]


def nnx_network():
    """NNX models are split; the state is the tree."""
    graphdef, params = nnx.split(Nnx(nnx.Rngs(0)))
    network = ntk.Network(
        lambda params, tokens: nnx.merge(graphdef, params).features(tokens),
        ntk.Head("head/kernel/value", bias="head/bias/value", transposed=True),
    )
    return network, params, lambda phi: phi @ params["head"]["kernel"][...]


def equinox_network():
    """Equinox models are partitioned; leaves that are not arrays are closed over."""
    params, static = eqx.partition(Equinox(jax.random.key(0)), eqx.is_inexact_array)

    def features(params, tokens):
        return jax.vmap(eqx.combine(params, static).features)(tokens)

    network = ntk.Network(features, ntk.Head("head/weight", bias="head/bias"))
    return network, params, lambda phi: phi @ params.head.weight.T


FRAMEWORKS = {"linen": linen_network, "nnx": nnx_network, "equinox": equinox_network}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_kernels_of_any_framework(framework):
    """oracle: brute-force rows of the same network; the head is read from the path stated."""
    network, params, plain = FRAMEWORKS[framework]()
    contexts = ntk.last_positions(jnp.asarray(TOKENS))
    kernel = ntk.kernel(network, params, contexts)
    close(kernel.dense(), kernel_by_gradients(kernel), 2e-5)
    phi = np.asarray(network.features(params, jnp.asarray(TOKENS)))[:, -1]
    close(kernel.head, phi @ phi.T + 1, 2e-5)
    close(network.weight(params) @ phi.T, np.asarray(plain(phi)).T, 2e-5)
    direction = jax.tree.map(jnp.ones_like, params)
    change = ntk.predict(network, params, direction, contexts)
    assert set(change) == {"head", "body"} and change["head"].shape == (3, VOCAB)


def test_inputs_need_not_be_tokens():
    """oracle: real inputs, and one feature vector per row, as in any regression network."""
    rng = np.random.default_rng(0)
    params = {"in": rng.normal(size=(6, WIDTH)), "out": rng.normal(size=(VOCAB, WIDTH))}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    network = ntk.Network(_regression, ntk.Head("out"))
    inputs = jnp.asarray(rng.normal(size=(5, 6)), jnp.float32)
    contexts = ntk.Contexts({"x": inputs}, positions=jnp.zeros(5, int))
    kernel = ntk.kernel(network, params, contexts)
    close(kernel.dense(), kernel_by_gradients(kernel), 2e-5)


def _regression(params, inputs):
    return jnp.tanh(inputs["x"] @ params["in"])


@jax.custom_vjp
def _fused(x):
    """Stand in for fused attention: a derivative backward, none forward."""
    return jnp.sin(x)


_fused.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))


def _fused_features(params, tokens):
    return _fused(params["embed"][tokens] @ params["mix"])


@pytest.mark.parametrize("algorithm", ["auto", *ntk.ALGORITHMS])
def test_networks_without_forward_mode(algorithm):
    """oracle: chosen explicitly, every form works from VJPs; otherwise JAX's error explains."""
    rng = np.random.default_rng(0)
    shapes = {"embed": (VOCAB, WIDTH), "mix": (WIDTH, WIDTH), "head": (VOCAB, WIDTH)}
    params = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}
    network = ntk.Network(_fused_features, ntk.Head("head"))
    contexts = ntk.last_positions(jnp.asarray(TOKENS))
    kernel = ntk.kernel(network, params, contexts, forward_mode=False, algorithm=algorithm)
    dense = kernel_by_gradients(kernel)
    close(kernel.dense(), dense, 2e-5)
    right = rng.normal(size=(3, VOCAB))
    close(kernel.apply(right), np.einsum("ouvw,uw->ov", dense, right), 2e-5)
    with pytest.raises(TypeError, match="forward-mode"):
        ntk.kernel(network, params, contexts).apply(right)
