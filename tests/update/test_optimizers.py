"""Optimizers: optax layer by layer; decay, schedules, hand-over and rounding losses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ntkrl import trees, update
from ntkrl.update.optimizers import rate_schedule, rounding_loss
from tests.toys import toy_params, toy_policy
from tests.update.test_train_step import make_batch, rloo

LAYERED = dataclasses.replace(toy_policy(), stacked=("layers",))
SHAPES = {
    "embed": {"embedding": (6, 4)},
    "layers": {"norm": {"scale": (3, 4)}, "mlp": {"kernel": (3, 130, 129)}},
}


def draw(seed, dtype=jnp.float32):
    """A tree of normal numbers in SHAPES."""
    rng = np.random.default_rng(seed)
    is_shape = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), dtype), SHAPES, is_leaf=is_shape)


def gradient(count, dtype=jnp.float32):
    """Gradients of a step; the first layer's matrix grows, which must not affect other layers."""
    tree = draw(10 + count, dtype)
    growth_L = jnp.asarray([100.0 if count else 1.0, 1.0, 1.0], dtype)
    tree["layers"]["mlp"]["kernel"] *= growth_L[:, None, None]
    return tree


def program_of(params, network=LAYERED, **fields):
    """A stage of one group, bound."""
    fields = {"name": "x", "steps": 4, "parameters": ((".*", 0.1),), **fields}
    return update.bind_stage(update.Stage(**fields), network, params)


def follow(optimizer, params, count=3):
    """Take steps along drawn gradients; return params and state."""
    state = optimizer.init(params)
    step = jax.jit(optimizer.update)
    for number in range(count):
        gradients = gradient(number, jax.tree.leaves(params)[0].dtype)
        updates, state = step(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


CASES = {
    "adam": ({"b1": 0.8, "b2": 0.9, "epsilon": 1e-3}, optax.adam(0.1, 0.8, 0.9, 1e-3)),
    "adamw": ({"weight_decay": 0.3}, optax.adamw(0.1, weight_decay=0.3)),
    "sgd": ({"momentum": 0.7}, optax.sgd(0.1, 0.7)),
}


@pytest.mark.parametrize("name", CASES)
def test_optimizers_are_optax(name):
    """oracle: three steps of optax's alias on the full tree, at each group's rate."""
    options, theirs = CASES[name]
    params = draw(0)
    result, _ = follow(program_of(params, optimizer=name, **options).optimizer, params)
    expected, _ = follow(theirs, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), result, expected)


LAYER_CASES = {
    "muon": (
        {"weight_decay": 0.3, "momentum": 0.9},
        optax.contrib.muon(0.1, beta=0.9, weight_decay=0.3, consistent_rms=0.2),
        optax.adamw(0.1, weight_decay=0.3),
    ),
    "adafactor": (
        {"weight_decay": 0.3},
        # optax does not multiply this decay by the rate
        optax.adafactor(0.1, multiply_by_parameter_scale=False, weight_decay_rate=0.03),
        optax.adafactor(0.1, multiply_by_parameter_scale=False, weight_decay_rate=0.03),
    ),
}


@pytest.mark.parametrize("name", LAYER_CASES)
def test_layers_are_matrices_of_their_own(name):
    """oracle: a stacked matrix is optimised as its layers one by one; others as they are."""
    options, of_matrices, of_rest = LAYER_CASES[name]
    params = draw(0)
    result, _ = follow(program_of(params, optimizer=name, **options).optimizer, params)
    rest, _ = follow(of_rest, params)
    for layer in range(3):
        alone, state = params["layers"]["mlp"]["kernel"][layer], None
        for number in range(3):
            matrix = gradient(number)["layers"]["mlp"]["kernel"][layer]
            state = of_matrices.init(alone) if state is None else state
            updates, state = of_matrices.update(matrix, state, alone)
            alone = optax.apply_updates(alone, updates)
        stacked = result["layers"]["mlp"]["kernel"][layer]
        np.testing.assert_allclose(stacked, alone, atol=2e-5)
    # as one array the three layers would share their norms
    assert np.abs(result["layers"]["mlp"]["kernel"] - rest["layers"]["mlp"]["kernel"]).max() > 1e-3
    np.testing.assert_allclose(result["embed"]["embedding"], rest["embed"]["embedding"], atol=1e-6)
    if name == "muon":
        np.testing.assert_allclose(
            result["layers"]["norm"]["scale"], rest["layers"]["norm"]["scale"], atol=1e-6
        )


def test_decay_by_pattern():
    """by hand: with gradients 0 AdamW moves θ by −rate · decay · θ, and norms not at all."""
    params = draw(0)
    rows = ((".*norm/.*|.*/bias", 0.0), ("embed/.*", 0.5), (".*", 0.1))
    params["layers"]["mlp"]["bias"] = jnp.ones((3, 4))
    optimizer = program_of(params, optimizer="adamw", decay=rows).optimizer
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    factors = {
        "embed/embedding": 0.1 * 0.5,
        "layers/norm/scale": 0.0,
        "layers/mlp/kernel": 0.1 * 0.1,
        "layers/mlp/bias": 0.0,
    }
    for name, moved in trees.named_leaves(updates).items():
        expected = -factors[name] * trees.named_leaves(params)[name]
        np.testing.assert_allclose(moved, expected, rtol=1e-6, err_msg=name)
    with pytest.raises(ValueError, match="stage 'x', decay: no pattern covers layers/mlp/kernel"):
        program_of(params, optimizer="adamw", decay=rows[:2])


@pytest.mark.parametrize(
    ("kind", "warmup", "final", "wanted"),
    [
        ("constant", 0, 0.0, [1, 1, 1, 1, 1, 1]),
        ("constant", 2, 0.0, [0.5, 1, 1, 1, 1, 1]),
        ("linear", 0, 0.0, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("linear", 2, 0.2, [0.5, 1, 1, 0.8, 0.6, 0.4]),
        ("cosine", 2, 0.0, [0.5, 1, 1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5]),
        ("cosine", 6, 0.0, [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1]),
    ],
)
def test_schedules(kind, warmup, final, wanted):
    """by hand: factors of six steps; cos(π/4)/2 = √(1/8)."""
    schedule = rate_schedule(kind, 6, warmup, final)
    np.testing.assert_allclose([float(schedule(n)) for n in range(6)], wanted, atol=1e-6)


def test_rates_follow_the_schedule():
    """law: SGD moves by rate × factor × gradient in each group; the first group's is logged."""
    params, policy = draw(0), LAYERED
    rows = (("embed/.*", None), (".*norm.*", 0.4), (".*", 0.2))
    stage = update.Stage("x", 3, rows, optimizer="sgd", schedule="linear", warmup_steps=2)
    bound_stage = update.bind_stage(stage, policy, params, updates_per_step=2)
    chosen, _ = trees.partition(params, bound_stage.trained)
    state = bound_stage.optimizer.init(chosen)
    ones = jax.tree.map(jnp.ones_like, chosen)
    step = jax.jit(bound_stage.optimizer.update)
    for count, factor in enumerate([0.5, 1, 1, 0.75, 0.5, 0.25]):
        assert bound_stage.learning_rate(count) == pytest.approx(0.4 * factor)
        updates, state = step(ones, state, chosen)
        np.testing.assert_allclose(updates["layers"]["norm"]["scale"], -0.4 * factor, rtol=1e-6)
        np.testing.assert_allclose(updates["layers"]["mlp"]["kernel"], -0.2 * factor, rtol=1e-6)
    assert step._cache_size() == 1


def test_clipping_counts_trained_leaves_only():
    """by hand: the norm that is clipped to 1 is 5 of the trained leaf; the frozen one is larger."""
    params = {"head": jnp.zeros(2), "embed": jnp.zeros(2)}
    gradients = {"head": jnp.array([3.0, 4.0]), "embed": None}
    stage = update.Stage("x", 1, (("head", 1.0), (".*", None)), optimizer="sgd", max_grad_norm=1.0)
    bound_stage = update.bind_stage(stage, toy_policy(), params)
    chosen, _ = trees.partition(params, bound_stage.trained)
    updates, _ = bound_stage.optimizer.update(gradients, bound_stage.optimizer.init(chosen), chosen)
    np.testing.assert_allclose(updates["head"], [-0.6, -0.8], rtol=1e-6)


HEAD = (("head", 1e-2), (".*", None))
# so small a rate that no bit of the body moves: the head must not see the second stage
BOTH = (("head", 1e-2), (".*", 1e-30))


def in_stages(policy, params, *stages):
    """Train through stages, three steps each; return the state."""
    bound_stages = update.bind_stages([update.Stage(**s) for s in stages], policy, params, 1)
    state, seed = update.init_state(bound_stages[0], params, jax.random.key(0)), 0
    for number, bound_stage in enumerate(bound_stages):
        state = update.transfer_state(bound_stage, state) if number else state
        step = jax.jit(update.make_step(bound_stage, update.policy_loss_fn(policy, rloo)))
        for _ in range(bound_stage.stage.steps):
            state, *_ = step(state, make_batch(policy.vocab_size, seed=seed))
            seed += 1
    return state


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_kept_moments_go_on(optimizer):
    """law: a head kept into a stage that trains all goes on bit for bit; the body starts fresh."""
    policy = toy_policy()
    params = toy_params(policy)
    # momentum in both: otherwise SGD has nothing to keep
    common = {"optimizer": optimizer, "steps": 3}
    common |= {"momentum": 0.9} if optimizer == "sgd" else {}
    first = {"name": "head", "parameters": HEAD, **common}
    second = {"name": "all", "parameters": BOTH, **common}
    unbroken = in_stages(policy, params, first | {"steps": 6})
    kept = in_stages(policy, params, first, second | {"optimizer_state": "keep"})
    reset = in_stages(policy, params, first, second)
    np.testing.assert_array_equal(kept.params["head"], unbroken.params["head"])
    assert not np.array_equal(reset.params["head"], unbroken.params["head"])
    for name in ("embed", "mix"):
        np.testing.assert_array_equal(kept.params[name], params[name])
    if optimizer == "adam":
        counts = {
            name: int(jax.tree.leaves(state)[0])
            for name, state in kept.opt_state["parameters"].inner_states.items()
        }
        assert counts == {"head": 6, "embed": 3, "mix": 3}
    assert int(jax.tree.leaves(kept.opt_state["schedule"])[0]) == 3


def test_what_rounding_swallows():
    """by hand: bfloat16 has 2⁻⁷ between neighbours above 1, so 2⁻⁹ moves 0.25 and 0 but not 1."""
    leaf = jnp.array([[1.0, -1.0, 0.25], [0.0, 100.0, -0.25]])
    assert rounding_loss(leaf.astype(jnp.bfloat16), 2.0**-9) == 0.5
    assert rounding_loss(leaf.astype(jnp.bfloat16), 2.0**-7) == pytest.approx(1 / 6)
    assert rounding_loss(leaf, 2.0**-9) == 0.0
    assert rounding_loss(leaf, 1e-7) == pytest.approx(1 / 6)  # half of 2⁻¹⁷ below 100 is larger


def test_warning_names_the_way_out():
    """law: rates below bfloat16's rounding warn; float32, larger rates and SGD do not."""
    row = {"parameters": ((".*", 1e-6),)}
    text = program_of(draw(0), **row).warning(draw(0, jnp.bfloat16))
    for part in ("'x'", "bfloat16 entries cannot move", "(1e-06)", "model.dtype=float32"):
        assert part in text, part
    assert program_of(draw(0), **row).warning(draw(0)) is None
    quiet = (
        {"parameters": ((".*", 0.5),)},
        {"optimizer": "sgd", **row},
        {"parameters": ((".*norm/.*", 0.5), (".*", None))},
    )
    for fields in quiet:
        assert program_of(draw(0), **fields).warning(draw(0, jnp.bfloat16)) is None
    # each group by its own rate: 12 of 50346 entries do not make a tenth
    mixed = program_of(draw(0), parameters=((".*norm/.*", 1e-9), (".*", 0.5)))
    assert mixed.warning(draw(0, jnp.bfloat16)) is None
