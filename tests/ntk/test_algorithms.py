"""Algorithms for one matrix agree with each other and with brute force, whatever the request."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntkrl
from ntkrl import jaxpr, ntk
from ntkrl.ntk import network as feature_functions
from tests.ntk.networks import TOKENS, VOCAB, close, contexts, layered
from tests.oracles import kernel_by_gradients
from tests.toys import TINY, toy_policy

SMALL = {**TINY, "vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 12}
GROUPS = ((r"layers/0/.*", "first"), (r"layers/(mlp|up).*", "mlp"), (r".*", "rest"))


@functools.cache
def model(kind, dtype=jnp.float64):
    """A model and params: scanned layers tied or not, a GPT-NeoX, or the toy."""
    if kind in ("tied", "untied"):
        network, params = layered(kind == "tied")
    elif kind == "toy":
        network = toy_policy(vocab=VOCAB)
        shapes = {"embed": (VOCAB, 5), "mix": (5, 5), "head": (VOCAB, 5)}
        rng = np.random.default_rng(0)
        params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    else:
        config = {**SMALL, "tie_word_embeddings": True}
        network, params = ntkrl.build("GPTNeoXForCausalLM", config, jax.random.key(0), jnp.float32)
        rng = np.random.default_rng(0)  # biases and norms start at 0 and 1, which hides mistakes
        params = jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape), params)
    return network, jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


@functools.cache
def brute(kind, part, padded):
    """The oracle, in float64."""
    groups = () if kind == "toy" else GROUPS
    return kernel_by_gradients(ntk.kernel(*model(kind), *contexts(padded), groups=groups), part)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("algorithm", ntk.ALGORITHMS)
@pytest.mark.parametrize("kind", ["untied", "tied", "neox"])
def test_algorithms_agree_with_brute_force(kind, algorithm, padded):
    """oracle: algorithm × part × head × mask, float64 to 1e-10."""
    kernel = ntk.kernel(*model(kind), *contexts(padded), groups=GROUPS, algorithm=algorithm)
    for part in ("full", "body", "mlp", "first"):
        close(kernel.dense(part), brute(kind, part, padded))


class Groups:
    """A scan's operand counts by kind, as JAX 0.11 stores them."""

    def __init__(self, *counts):
        self.counts = counts

    def unpack(self):
        return [range(count) for count in self.counts]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["untied", "neox"])
def test_scans_as_newer_jax_tells_them(kind, monkeypatch):
    """law: a scan that groups its operands instead of counting them gives the same matrix."""
    scans = []

    def newer(eqn, *slots):
        params = dict(eqn.params)
        if "num_carry" in params:
            counts = params.pop("num_consts"), params.pop("num_carry")
            params["ft_in"] = Groups(*counts, len(eqn.invars) - sum(counts))
            eqn = eqn.replace(params=params)
            scans.append(counts)
        return step(eqn, *slots)

    step = jaxpr.Operation
    monkeypatch.setattr(jaxpr, "Operation", newer)
    expected = brute(kind, "body", True)  # cross terms run scans as JAX wrote them
    feature_functions._trace_features.cache_clear()  # what was traced before is kept
    kernel = ntk.kernel(*model(kind), *contexts(True), groups=GROUPS, algorithm="layerwise")
    close(kernel.dense("body"), expected)
    feature_functions._trace_features.cache_clear()
    assert scans


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("algorithm", ntk.ALGORITHMS)
def test_chunks_change_nothing(algorithm):
    """law: any chunk size, full sequences or parts of one, symmetric or not."""
    observed, updated = contexts(False)
    for other in (updated, None):
        kernel = ntk.kernel(*model("untied"), observed, other, algorithm=algorithm)
        full = kernel.body(chunk=100)
        for chunk in (3, 8):
            close(kernel.body(chunk=chunk), full, 1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("algorithm", ntk.ALGORITHMS)
def test_algorithms_under_jit(algorithm):
    """law: with params traced, and with contexts traced too, the same numbers come out."""
    network, params = model("tied")
    observed, updated = contexts(True)

    def dense(params, observed, updated):
        return ntk.kernel(network, params, observed, updated, algorithm=algorithm).dense(
            rows=[0, 3, 8]
        )

    expected = brute("tied", "full", True)[:, :, [0, 3, 8]]
    close(jax.jit(lambda p: dense(p, observed, updated))(params), expected)
    close(jax.jit(dense)(params, observed, updated), expected)


@pytest.mark.parametrize("algorithm", ntk.ALGORITHMS)
@pytest.mark.parametrize("kind", ["tied", "toy"])
def test_float32_stays_within_rounding(kind, algorithm):
    """oracle: float32 params against the float64 oracle, 2e-5 relative."""
    with jax.enable_x64(True):
        expected = brute(kind, "full", False)
    result = ntk.kernel(*model(kind, jnp.float32), *contexts(False), algorithm=algorithm).dense()
    assert result.dtype == jnp.float32
    close(result, expected, 2e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("algorithm", ntk.ALGORITHMS)
def test_toy_without_layers(algorithm):
    """oracle: leaves used in a loop over positions are differentiated as they are."""
    kernel = ntk.kernel(*model("toy"), *contexts(True), algorithm=algorithm)
    close(kernel.dense(), brute("toy", "full", True))


@pytest.mark.usefixtures("x64")
def test_layers_that_share_a_leaf():
    """oracle: a leaf that every step of a scan reads is differentiated directly, through all."""
    _, params = layered(False)
    params = {**params, "shared": params["layers"]["query"][0]}

    def features(params, tokens):
        def layer(x, up):
            return x + jnp.tanh(jnp.cumsum(x, axis=1) @ up @ params["shared"]), None

        x, _ = jax.lax.scan(layer, params["embed"][tokens], params["layers"]["up"])
        return x

    network = ntk.Network(features, ntk.Head("head"), stacked=("layers",))
    at = ntk.last_positions(jnp.asarray(TOKENS))
    kernel = ntk.kernel(network, params, at, algorithm="layerwise")
    close(kernel.dense("body"), kernel_by_gradients(kernel, "body"))


@pytest.mark.usefixtures("x64")
def test_groups_of_layers_add_up():
    """law: by layer and by module type, groups sum to full; each uses only its parameters."""
    network, params = model("tied")
    layers, modules = ntk.by_layer(network, params), ntk.by_module(network, params)
    for groups in (layers, modules):
        kernel = ntk.kernel(network, params, *contexts(False), groups=groups)
        total = sum(np.asarray(kernel.dense(name)) for _, name in groups)
        close(total, brute("tied", "full", False))
    assert [name for _, name in layers] == ["embed", "layer 0", "layer 1", "scale"]
    assert [name for _, name in modules] == ["embed", "bias", "gain", "query", "up", "scale"]
    policy, params = model("neox")
    assert dict(ntk.by_module(policy, params))["layers/attention/qkv(/[^/]*)?"] == "attention/qkv"


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("algorithm", ["auto", "jvp_vjp"])
def test_double_vjp_equals_forward_mode(algorithm):
    """law: without forward-mode derivatives the same numbers, from VJPs of VJPs."""
    right = np.random.default_rng(2).normal(size=(4, VOCAB))
    kernel = ntk.kernel(*model("tied"), *contexts(False), algorithm=algorithm, forward_mode=False)
    close(kernel.dense(), brute("tied", "full", False))
    expected = np.einsum("ouvw,uw->ov", brute("tied", "full", False), right)
    close(kernel.apply(right), expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("algorithm", ntk.ALGORITHMS)
def test_batch_order_and_padding_change_nothing(algorithm):
    """law: contexts keep their numbers when shuffled, split and padded otherwise."""
    network, params = model("untied")
    tokens = jnp.asarray(TOKENS)
    every = ntk.every_position(tokens)
    full = np.asarray(ntk.kernel(network, params, every, algorithm=algorithm).trace())
    order = np.random.default_rng(0).permutation(15)
    flipped = jnp.asarray(TOKENS[::-1].copy())
    padded = jnp.pad(flipped, ((0, 0), (1, 2)), constant_values=3)
    mask = jnp.pad(jnp.ones((3, 5), bool), ((0, 0), (1, 2)))
    rows, positions = np.asarray(every.rows)[order], np.asarray(every.positions)[order]
    shuffled = ntk.Contexts(padded, jnp.asarray(positions + 1), jnp.asarray(2 - rows), mask)
    result = np.asarray(ntk.kernel(network, params, shuffled, algorithm=algorithm).trace())
    close(result, full[order][:, order])


def estimates_of(kernel):
    """Estimates of every algorithm that applies to body()."""
    return kernel.problem.estimates(kernel.problem.gram_inputs("body"))


def test_choice_follows_the_estimates():
    """law: the cheapest algorithm that fits is taken, and a small budget makes small chunks."""
    network, params = model("untied", jnp.float32)
    observed, updated = contexts(False)
    kernel = ntk.kernel(network, params, observed, updated)
    estimates = estimates_of(kernel)
    assert set(estimates) == set(ntk.ALGORITHMS)
    cheapest = min(estimates.values(), key=lambda estimate: estimate.flops)
    assert kernel.estimate() == cheapest and cheapest.bytes <= 8 * 2**30
    tight = ntk.kernel(network, params, observed, updated, memory_gib=2e-5).estimate()
    assert tight.chunk < cheapest.chunk and tight.bytes < cheapest.bytes
    ones = jax.tree.map(jnp.ones_like, params)
    assert "layerwise" not in estimates_of(ntk.kernel(network, params, observed, precondition=ones))
    with pytest.raises(ValueError, match="algorithm 'layerwise' cannot be used with weights"):
        ntk.kernel(network, params, observed, precondition=ones, algorithm="layerwise").body()
