"""Every family on every mesh: eight devices initialise, sample, train and probe as one does."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl import models, ntk, rollout, runtime, trees, update
from ntkrl.settings import read_settings
from ntkrl.setup import set_up
from ntkrl.training import loop as training_loop
from ntkrl.training import train
from ntkrl.types import PromptBatch, UpdateBatch
from tests.models.families import CASES, EACH

# meshes of training, and data × tensor parts that sample
MESHES = {
    "8x1": ((8, 1, 1), (8, 1)),
    "4x2": ((4, 2, 1), (1, 8)),
    "2x4": ((2, 4, 1), (2, 4)),
    "1x8": ((1, 8, 1), (2, 4)),
    "2x2x2": ((2, 2, 2), (4, 2)),
}
PROMPTS, COUNT, WIDTH, BUDGET = 8, 4, 5, 6
SETTINGS = rollout.SamplerSettings(
    completions_per_prompt=COUNT,
    max_completion_tokens=BUDGET,
    temperature=1.0,
    end_ids=(0,),
    pad_id=1,
    chunk_steps=5,
)
STAGE = {
    "name": "all",
    "steps": 5,
    "parameters": ((".*", 1e-2),),
    "max_grad_norm": 1.0,
    "epsilon": 0.1,
}
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
RLOO = update.PRESETS["rloo"]


def loss(statistics, batch):
    """Return the RLOO loss with the signature that the step expects."""
    return update.policy_loss(RLOO, BUDGET, statistics, batch)


def prompts():
    """Left-padded prompts, all random."""
    rng = np.random.default_rng(0)
    mask = np.arange(WIDTH)[None] >= rng.integers(0, 4, PROMPTS)[:, None]
    tokens = np.where(mask, rng.integers(2, 31, (PROMPTS, WIDTH)), 1)
    return PromptBatch(
        tokens=tokens,
        mask=mask,
        rows=np.arange(PROMPTS, dtype=np.int32),
        copies=np.zeros(PROMPTS, np.int32),
    )


def made(case, mesh):
    """A random model of a family."""
    _, architecture, settings = CASES[case]
    return models.build(architecture, settings, jax.random.key(0), mesh=mesh)


def everything(case, sizes, parts, devices=None):
    """Draw, take an optimizer step, and compute a kernel; return it all as numpy arrays."""
    mesh = runtime.make_mesh(*sizes, devices)
    policy, params = made(case, mesh)
    place = functools.partial(runtime.place_rows, mesh=mesh)
    rollout_mesh = runtime.make_mesh(parts[0], 1, parts[1], devices)
    sampler = rollout.Sampler(policy, SETTINGS, None, rollout_mesh, mesh)
    drawn = sampler(params, runtime.place_rows(prompts(), rollout_mesh), jax.random.key(1))
    rows = runtime.row_sharding(PROMPTS * COUNT, mesh)
    assert all(leaf.sharding.is_equivalent_to(rows, leaf.ndim) for leaf in jax.tree.leaves(drawn))
    rng = np.random.default_rng(2)
    mask = np.asarray(drawn.completion_mask)
    batch = UpdateBatch(
        tokens=np.asarray(drawn.tokens),
        mask=np.asarray(drawn.mask),
        completion_mask=mask,
        old_log_probs=np.asarray(drawn.sampler_log_probs),
        ref_log_probs=-rng.exponential(size=mask.shape).astype(np.float32),
        advantages=np.repeat(rng.normal(size=(len(mask), 1)), mask.shape[1], 1).astype(np.float32),
    )
    bound_stage = update.bind_stage(update.Stage(**STAGE), policy, params)
    row_shards = trees.blocks(mesh, len(mask))
    objective = update.policy_loss_fn(policy, loss, chunk_tokens=BUDGET, row_shards=row_shards)
    state = update.init_state(bound_stage, params, jax.random.key(0))
    step = jax.jit(update.make_step(bound_stage, objective, microbatches=2))
    state, metrics, _ = step(state, place(batch))
    kernel = ntk.kernel(policy, params, ntk.last_positions(place(prompts()).tokens))
    result = {
        "made": params,
        "drawn": (drawn.tokens, drawn.completion_mask),
        "log_probs": drawn.sampler_log_probs,
        "metrics": metrics,
        "trained": state.params,
        "kernel": (kernel.head, kernel.trace("body")),
    }
    return jax.tree.map(np.asarray, result)


@pytest.fixture(scope="module")
def alone():
    """Return the results of one device, a family at a time."""
    return functools.cache(lambda case: everything(case, (1, 1, 1), (1, 1), jax.devices()[:1]))


def spread_cases():
    """Every family on every mesh; all but two families are slow's but for two meshes."""
    for case in EACH:
        for name, sizes in MESHES.items():
            slow = name in ("8x1", "4x2", "2x4") and case not in ("gpt-neox", "llama 3")
            marks = [pytest.mark.slow] * slow
            yield pytest.param(case, *sizes, id=f"{case}-{name}", marks=marks)


@pytest.mark.parametrize(("case", "sizes", "parts"), [*spread_cases()])
def test_a_mesh_finds_what_one_device_finds(alone, case, sizes, parts):
    """law: same params and draws to the bit; a step to 1e-5, kernels to 1e-4 of the largest."""
    expected, result = alone(case), everything(case, sizes, parts)
    jax.tree.map(np.testing.assert_array_equal, result["drawn"], expected["drawn"])
    for name, tolerance in (("made", 0), ("log_probs", 2e-5), ("metrics", 1e-4), ("trained", 1e-5)):
        close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
        jax.tree.map(close, result[name], expected[name])
    for value, other in zip(result["kernel"], expected["kernel"], strict=True):
        np.testing.assert_allclose(value, other, rtol=0, atol=1e-4 * np.abs(other).max())


def test_rows_leave_and_caches_grow_without_moving():
    """law: no collective is in the programs that drop rows or add columns."""
    mesh = runtime.make_mesh(2, 2, 2)
    policy, params = made("llama", mesh)
    sampler = rollout.Sampler(policy, SETTINGS, mesh=mesh)
    placed = runtime.place_rows(prompts(), mesh)
    copy = sampler.copy_program(params)(params)
    live, written, left = sampler.programs.prefill(9, copy, placed, jax.random.key(1))
    assert left.shape == (4,) and left.sharding.is_fully_replicated
    for name, sizes in (("compact", (16, 4)), ("grow_cache", (21,))):
        text = getattr(sampler.programs, name).lower(*sizes, live).compile().as_text()
        moved = [word for word in COLLECTIVES if word in text]
        assert not moved, (name, moved)
    assert any(word in sampler_text(sampler, copy, live, written) for word in COLLECTIVES)


def sampler_text(sampler, copy, live, written):
    """The compiled program that draws tokens."""
    arguments = (copy, live, written, jnp.int32(1))
    return sampler.programs.decode_chunk.lower(*arguments).compile().as_text()


def test_a_copy_to_sample_from():
    """law: it is cast and in tensor parts, its features return as rows of training."""
    mesh, parts = runtime.make_mesh(1, 8, 1), runtime.make_mesh(4, 1, 2)
    _, architecture, settings = CASES["llama"]
    options = {"options": models.ModelOptions(jnp.bfloat16), "mesh": mesh}
    policy, params = models.build(architecture, settings, jax.random.key(0), **options)
    sampling = dataclasses.replace(SETTINGS, keep_features=True)
    sampler = rollout.Sampler(policy, sampling, None, parts, mesh)
    copy = trees.named_leaves(sampler.copy_program(params)(params))
    up = copy["layers/0/mlp/up/kernel"]
    assert up.dtype == jnp.bfloat16
    assert up.addressable_shards[0].data.size * 2 == up.size
    spec = params["layers"]["mlp"]["up"]["kernel"].sharding.spec
    assert tuple(spec) == (None, "fsdp", "tensor")
    drawn = sampler(params, runtime.place_rows(prompts(), parts), jax.random.key(1))
    assert drawn.features.sharding.is_equivalent_to(runtime.row_sharding(32, mesh), 3)
    assert drawn.features.addressable_shards[0].data.shape[0] == 4


def begun(setup, directory, config):
    """A run's loop with its state, started or resumed."""
    loop = training_loop.Loop(setup, directory, runtime.to_json(config), runtime.PreemptionNotice())
    loop._resume()
    return loop


def settings_of(directory, *more):
    """The settings of a small supervised run of a new model."""
    words = [
        "--config=configs/sft.py",
        f"--config.run_dir={directory}",
        "--config.data.prompts_per_step=8",
        "--config.data.examples=64",
        "--config.data.max_prompt_tokens=16",
        "--config.rollout.max_completion_tokens=16",
        *more,
    ]
    return runtime.read_config(words)


def test_no_table_is_ever_whole_on_one_device(tmp_path):
    """law: after the start every array that the mesh divides is sharded, moments included."""
    sizes = ("--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.mesh.tensor=2")
    config = settings_of(tmp_path, *sizes, "--config.stages[0].optimizer=adamw")
    before = {id(array) for array in jax.live_arrays()}
    setup = set_up(read_settings(config), tmp_path)
    loop = begun(setup, tmp_path, config)
    made = [array for array in jax.live_arrays() if id(array) not in before]
    up = loop.at.state.params["layers"]["mlp"]["up"]["kernel"]
    assert tuple(up.sharding.spec) == (None, "fsdp", "tensor")
    large = [array for array in made if array.size > 1500 and array.ndim > 1]
    # embed, head, qkv, out, up, down: params of the setup and of the state, two moments
    assert len(large) >= 6 * 4
    for array in large:
        assert array.addressable_shards[0].data.size * 8 == array.size, array.shape


def test_moments_wait_on_the_host(tmp_path):
    """law: offloaded moments are in host memory between steps, and change no number."""
    result = []
    for offload in ("False", "True"):
        directory = tmp_path / offload
        more = (
            "--config.mesh.data=2",
            "--config.mesh.fsdp=4",
            f"--config.schedule.offload_optimizer={offload}",
            "--config.stages[0].steps=2",
        )
        config = settings_of(directory, *more)
        train(config)
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        result.append([json.loads(line) for line in lines])
        setup = set_up(read_settings(config), directory)
        moments = jax.tree.leaves(begun(setup, directory, config).at.state.opt_state)
        kinds = {leaf.sharding.memory_kind for leaf in moments if leaf.ndim}
        assert kinds == ({"pinned_host"} if offload == "True" else {"device"})
    assert result[0] == result[1] and result[0][-1]["step"] == 2
