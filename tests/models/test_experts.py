"""Mixtures of experts: grouped products under every transformation, files, kernels, mistakes."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntkrl
from ntkrl import jaxpr, models, ntk, runtime
from ntkrl.models.grouped import grouped_product
from ntkrl.plan import hlo
from ntkrl.plan.abstract_models import read_entries
from tests.models.families import CASES, tokens_and_mask, torch_model
from tests.models.test_families import equal_trees

ROWS, WIDTH, INNER, COUNT, MAPPED = 37, 5, 7, 4, 3


def reference(rows, kernels, groups):
    """The product with a matrix gathered for every row."""
    return jnp.einsum("mk,mkn->mn", rows, kernels[groups])


def derivatives(product):
    """Return a gradient's change along a direction, and its VJP."""

    def second(rows, kernels, groups, direction, cotangent):
        def gradient(r, k):
            pull = jax.vjp(lambda r, k: jnp.sin(product(r, k, groups)), r, k)[1]
            return pull(cotangent)

        forward = jax.jvp(gradient, (rows, kernels), direction)
        return forward, jax.vjp(gradient, rows, kernels)[1](direction)

    return second


@pytest.mark.parametrize("mapped", [*itertools.product((None, 0), repeat=3)])
def test_products_under_vmap_and_derivatives(x64, mapped):
    """oracle: gathered matrices in float64; mapped rows, matrices, groups, and directions."""
    rng = np.random.default_rng(0)
    shapes = ((ROWS, WIDTH), (COUNT, WIDTH, INNER), (ROWS, INNER))
    rows, kernels, cotangents = (rng.normal(size=(MAPPED, *shape)) for shape in shapes)
    groups = rng.integers(0, COUNT - 1, (MAPPED, ROWS))  # the last group is empty
    operands = (
        x if axis == 0 else x[1] for x, axis in zip((rows, kernels, groups), mapped, strict=True)
    )
    operands = (*operands, (rows[::-1], kernels[::-1]), cotangents)
    actual, expected = (
        jax.jit(jax.vmap(derivatives(product), (*mapped, 0, 0)))(*operands)
        for product in (grouped_product, reference)
    )
    for value, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(value, other, rtol=0, atol=1e-12)


def test_only_active_experts_are_multiplied():
    """by hand: 6 M K N FLOPs for a product and its gradient, whatever X; all experts would be X."""
    shapes = [(64, WIDTH), (COUNT, WIDTH, INNER)]
    rows, kernels = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    groups = jax.ShapeDtypeStruct((64,), jnp.int32)

    def total(rows, kernels, groups):
        return jnp.sum(jnp.square(grouped_product(rows, kernels, groups)))

    traced = jaxpr.trace(jax.grad(total, (0, 1)), rows, kernels, groups)
    assert jaxpr.flops(traced) == 3 * 2 * 64 * WIDTH * INNER


def test_a_published_mixture_counts_its_active_experts():
    """by hand: Qwen3-30B-A3B's products by layer; all 128 experts would be 12 times as much."""
    raw = read_entries("Qwen/Qwen3-30B-A3B")
    policy, shapes = models.describe(raw["architectures"][0], raw)
    length = 64
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    heads, mixture = 32 * 128, 2048 * 128 + 8 * 3 * 2048 * 768
    per_token = 2 * 2048 * heads + 2 * 2048 * 512 + mixture + 2 * heads * length
    traced = jaxpr.trace(policy.features, shapes, tokens)
    angles = 2 * length * 64
    assert jaxpr.flops(traced) == 2 * 48 * length * per_token + angles


def test_kernels_of_routers_and_experts(tmp_path, x64):
    """oracle: each group's trace from dense Jacobians; groups add up to the body."""
    torch_model("qwen3 moe", tmp_path)
    policy, params = ntkrl.load(tmp_path, dtype=jnp.float64)
    tokens = jnp.asarray(tokens_and_mask(policy.vocab_size)[0][:2, :4])
    groups = (
        ("layers/mlp/router/.*", "router"),
        ("layers/mlp/experts/.*", "experts"),
        ("head/weight", "classifier"),
        (".*", "rest"),
    )
    kernel = ntk.kernel(policy, params, ntk.last_positions(tokens), groups=groups)
    traces = {
        name: np.asarray(kernel.trace(name)) for name in ("router", "experts", "rest", "body")
    }

    def logits(params):
        return policy.head(params, policy.features(params, tokens)[:, -1])

    jacobian = jax.jacobian(logits)(params)
    mixture = jacobian["layers"]["mlp"]
    for name, leaves in (("router", mixture["router"]), ("experts", mixture["experts"])):
        expected = sum(
            np.einsum("ovp,uvp->ou", flat, flat)
            for flat in (
                np.asarray(leaf).reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(leaves)
            )
        )
        assert np.abs(expected).max() > 1e-2
        np.testing.assert_allclose(traces[name], expected, rtol=1e-9, atol=1e-9)
    parts = traces["router"] + traces["experts"] + traces["rest"]
    np.testing.assert_allclose(parts, traces["body"], rtol=1e-9, atol=1e-9)


def test_a_token_does_not_see_other_tokens_choices(tmp_path):
    """law: rows and padding added to a batch change no feature of the others."""
    torch_model("qwen3 moe", tmp_path)
    policy, params = ntkrl.load(tmp_path)
    tokens, mask = map(jnp.asarray, tokens_and_mask(policy.vocab_size))
    together = policy.features(params, tokens, mask)
    for row in range(3):
        alone = policy.features(params, tokens[row : row + 1], mask[row : row + 1])[0]
        real = np.asarray(mask[row])
        np.testing.assert_allclose(alone[real], together[row][real], rtol=0, atol=1e-5)


def test_rows_stay_on_their_devices():
    """law: eight devices share the products; without local sorting each does all of them.

    Blocks of a single expert are padded, by more where a device has fewer rows.
    """
    _, architecture, settings = CASES["qwen3 moe raw weights"]
    flops = []
    for size in (1, 8):
        mesh = runtime.make_mesh(1, size, 1, jax.devices()[:size])
        policy, params = models.build(architecture, settings, jax.random.key(0), mesh=mesh)
        tokens = runtime.place_rows(np.ones((8, 64), np.int32), mesh)
        mask = runtime.place_rows(np.ones((8, 64), bool), mesh)
        compiled = jax.jit(policy.features).lower(params, tokens, mask).compile()
        flops.append(hlo.count(compiled.as_text()).flops)
    gate = params["layers"]["mlp"]["experts"]["gate"]["kernel"]
    assert gate.addressable_shards[0].data.shape == (3, 1, 24, 12)
    assert flops[0] / 8 < flops[1] < flops[0] / 5


def test_other_names_and_mixed_layers(tmp_path):
    """law: published files' `num_experts` reads the same; plain layers are refused by name."""
    torch_model("qwen3 moe", tmp_path)
    policy, params = ntkrl.load(tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "num_experts": raw["num_local_experts"]}))
    equal_trees(params, ntkrl.load(tmp_path)[1])
    published = {**raw, "num_experts": raw.pop("num_local_experts")}
    path.write_text(json.dumps(published))
    assert ntkrl.load(tmp_path)[0].config == policy.config
    changes = {
        "decoder_sparse_step": (2, "decoder_sparse_step 2 and mlp_only_layers"),
        "mlp_only_layers": ([0], r"mlp_only_layers \[0\] give some layers a plain MLP"),
        "num_experts_per_tok": (6, "num_experts_per_tok 6 exceeds num_experts 5"),
        "num_local_experts": (4, "num_experts 5 is not num_local_experts 4"),
        "moe_intermediate_size": (None, "moe_intermediate_size must be a positive integer"),
    }
    for name, (value, message) in changes.items():
        path.write_text(json.dumps({**published, name: value}))
        with pytest.raises(ValueError, match=message):
            ntkrl.load(tmp_path)
