"""Kernels with params and contexts spread over eight devices equal those of one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import ntkrl
from ntkrl import ntk, runtime, trees
from ntkrl.ntk import jacobian_gram
from tests.ntk.networks import close
from tests.toys import TINY

WIDE = {**TINY, "vocab_size": 24, "hidden_size": 8, "intermediate_size": 32}
MESHES = {"fsdp": (1, 8, 1), "all three": (2, 2, 2)}


def spread(policy, params, contexts, sizes):
    """Place params and contexts on a mesh; rows of contexts over (data, fsdp)."""
    mesh = runtime.make_mesh(*sizes)
    placed = jax.device_put(params, trees.shardings(params, policy.sharding, mesh))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    tokens, mask = (jax.device_put(x, rows) for x in (contexts.tokens, contexts.mask))
    return placed, ntk.Contexts(tokens, contexts.positions, contexts.rows, mask)


def model():
    """A tied GPT-NeoX and eight left-padded sequences."""
    config = {**WIDE, "tie_word_embeddings": True}
    policy, params = ntkrl.build("GPTNeoXForCausalLM", config, jax.random.key(0), jnp.float64)
    rng = np.random.default_rng(0)
    mask = np.arange(6)[None] >= rng.integers(0, 4, (8, 1))
    return policy, params, ntk.last_positions(jnp.asarray(rng.integers(0, 24, (8, 6))), mask)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES.keys())
def test_sharded_equals_one_device(sizes):
    """law: both sharded algorithms and the products, float64 to 1e-10."""
    policy, params, contexts = model()
    placed, there = spread(policy, params, contexts, sizes)
    right = np.random.default_rng(1).normal(size=(8, 24))
    reference = ntk.kernel(policy, params, contexts)
    for algorithm in ("jvp_vjp", "layerwise"):
        kernel = ntk.kernel(policy, placed, there, algorithm=algorithm)
        assert kernel.problem.features.shardings is not None
        close(kernel.body(), reference.body())
    kernel = ntk.kernel(policy, placed, there)
    close(kernel.apply(right), reference.apply(right))
    close(kernel.trace(), reference.trace())
    direction = jax.tree.map(jnp.ones_like, placed)
    result = ntk.predict(policy, placed, direction, there)
    expected = ntk.predict(policy, params, jax.tree.map(jnp.ones_like, params), contexts)
    close(sum(result.values()), sum(expected.values()))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("algorithm", ["jvp_vjp", "jacobian"])
def test_gradients_stay_sharded(algorithm):
    """law: with wide layers, gradients of all leaves are most of the memory, and each device has
    less than a third of the need of one device (an eighth, and the replicated arrays)."""
    config = {**WIDE, "hidden_size": 64, "intermediate_size": 512}
    policy, params = ntkrl.build("GPTNeoXForCausalLM", config, jax.random.key(0), jnp.float64)
    contexts = ntk.Contexts(jnp.ones((1, 2), int), jnp.array([1]), mask=jnp.ones((1, 2), bool))
    placed = jax.device_put(
        params, trees.shardings(params, policy.sharding, runtime.make_mesh(1, 8, 1))
    )
    temporary = []
    for tree in (params, placed):
        kernel = ntk.kernel(policy, tree, contexts)
        features, inputs = kernel.problem.features, kernel.problem.gram_inputs("body")
        if algorithm == "jvp_vjp":
            lowered = jacobian_gram.jvp_vjp.lower(features, inputs, 16, True)
        else:
            lowered = jacobian_gram.jacobian.lower(features, inputs, 16)
        compiled = lowered.compile()
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    assert temporary[1] < temporary[0] / 3
