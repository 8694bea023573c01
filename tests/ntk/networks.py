"""Small networks of the kernel tests, written in plain jax.numpy, with every kind of head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import ntk
from tests.oracles import part_kernel, role_jacobians

VOCAB, WIDTH = 9, 4
HEADS = {
    "plain": {},
    "bias": {"bias": "head_bias"},
    "scale": {"scale": 0.5},
    "cap": {"soft_cap": 1.5},
    "all": {"bias": "head_bias", "scale": 0.5, "soft_cap": 1.5},
}
TOKENS = np.array([[3, 4, 5, 6, 7], [1, 2, 8, 8, 0], [5, 5, 5, 2, 1]])


def features(params, tokens, mask=None):
    """Causal attention and a tanh layer over embeddings, both with a residual."""
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    x = params["embed"][tokens]
    causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))[None] & mask[:, None, :]
    scores = jnp.where(causal, x @ params["query"] @ jnp.swapaxes(x, 1, 2), -1e30)
    x = x + jax.nn.softmax(scores) @ x * params["gain"].reshape(1, 1, -1)
    return x + jnp.tanh(x @ params["mlp"] + params["mlp_bias"].reshape(1, 1, -1))


def head(kind, weight_name):
    """Return the logits z = κ tanh(s (W φ + b) / κ), written out, of a kind of head."""
    options = HEADS[kind]

    def logits(params, phi):
        z = jnp.einsum("...d,vd->...v", phi, params[weight_name])
        if "bias" in options:
            z = z + params["head_bias"].reshape((1,) * (z.ndim - 1) + (-1,))
        z = z * (options["scale"] if "scale" in options else 1.0)
        return (
            options["soft_cap"] * jnp.tanh(z / options["soft_cap"]) if "soft_cap" in options else z
        )

    return logits


@functools.cache
def network(kind, tied):
    """Return `(ntk.Network, params)` in float64."""
    rng = np.random.default_rng(7)
    shapes = {
        "embed": (VOCAB, WIDTH),
        "query": (WIDTH, WIDTH),
        "gain": (WIDTH,),
        "mlp": (WIDTH, WIDTH),
        "mlp_bias": (WIDTH,),
    }
    shapes |= {} if tied else {"head": (VOCAB, WIDTH)}
    shapes["head_bias"] = (VOCAB,)  # unused by some heads, so that all share compiled programs
    with jax.enable_x64(True):
        params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    described = ntk.Head("embed" if tied else "head", **HEADS[kind])
    return ntk.Network(features, described, takes_mask=True), params


def layered_features(params, tokens, mask=None):
    """Two stacked layers, scanned: causal averaging, a tanh layer with bias, a gain, a residual."""
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))[None] & mask[:, None, :]

    def layer(x, leaves):
        scores = jnp.where(causal, x @ leaves["query"] @ jnp.swapaxes(x, 1, 2), -1e30)
        mixed = jax.nn.softmax(scores) @ x * leaves["gain"].reshape(1, 1, -1)
        return x + jnp.tanh(mixed @ leaves["up"] + leaves["bias"].reshape(1, 1, -1)), None

    x, _ = jax.lax.scan(layer, params["embed"][tokens], params["layers"])
    return x * params["scale"].reshape(1, 1, -1)


@functools.cache
def layered(tied):
    """Return `(ntk.Network, params)` of the scanned network."""
    rng = np.random.default_rng(11)
    shapes = {
        "embed": (VOCAB, WIDTH),
        "layers": {"query": (2, WIDTH, WIDTH), "gain": (2, WIDTH), "up": (2, WIDTH, WIDTH)},
        "scale": (WIDTH,),
    }
    shapes["layers"]["bias"] = (2, WIDTH)
    shapes |= {} if tied else {"head": (VOCAB, WIDTH)}
    draw = lambda shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    with jax.enable_x64(True):
        params = jax.tree.map(draw, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    described = ntk.Head("embed" if tied else "head")
    network = ntk.Network(layered_features, described, takes_mask=True, stacked=("layers",))
    return network, params


def contexts(padded):
    """Three observed contexts; four updated ones, two of them in one sequence."""
    tokens, mask, shift = jnp.asarray(TOKENS), None, 0
    if padded:
        tokens, shift = jnp.pad(tokens, ((0, 0), (2, 1)), constant_values=7), 2
        mask = jnp.pad(jnp.ones_like(jnp.asarray(TOKENS), bool), ((0, 0), (2, 1)))
    observed = ntk.Contexts(tokens, jnp.array([4, 2, 3]) + shift, mask=mask)
    rows = jnp.array([2, 0, 1, 1])
    return observed, ntk.Contexts(tokens, jnp.array([3, 1, 4, 2]) + shift, rows, mask)


@functools.cache
def jacobians(kind, tied, padded):
    """Role Jacobians of both sides, by brute force."""
    net, params = network(kind, tied)
    logits = head(kind, net.head.weight)
    return [role_jacobians(features, logits, params, side) for side in contexts(padded)]


def expected(kind, tied, padded, part, **options):
    """A part of the kernel by brute force: `[O, U, V, V]`."""
    described = network(kind, tied)[0].head
    sides = jacobians(kind, tied, padded)
    return np.asarray(part_kernel(part, *sides, described.weight, described.bias, **options))


def close(result, reference, tolerance=1e-10, scale=None):
    """Compare relative to the largest entry; refuse empty comparisons."""
    result, reference = np.asarray(result), np.asarray(reference)
    assert result.shape == reference.shape and result.size
    largest = np.abs(reference).max() if scale is None else scale
    assert largest > 0
    assert np.abs(result - reference).max() <= tolerance * largest
