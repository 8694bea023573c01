"""Abstract programs of a run against the run itself and arithmetic by hand."""

import dataclasses
import functools
import itertools
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntkrl import attribution, data, jaxpr, models, probe, reward, runtime, update
from ntkrl.generate import RewardedRollout
from ntkrl.plan import abstract_models, hardware
from ntkrl.plan.abstract_models import PUBLISHED_MODELS
from ntkrl.plan.candidate import abstract_run, candidate_programs
from ntkrl.plan.chips import Chip
from ntkrl.plan.measure import measure
from ntkrl.settings import read_settings
from ntkrl.setup import RunSetup
from ntkrl.training import (
    BATCH_SOURCES,
    GENERATION,
    PROBE,
    UPDATE,
    ProbeHook,
    Program,
    StepContext,
    device_bytes,
)
from ntkrl.training.batch_sources import split
from ntkrl.training.probe_hook import make_ledger
from ntkrl.training.programs import ledgers, reference_readings, updates
from ntkrl.training.train_state import TrainStates
from ntkrl.types import ProbeSet
from tests.toys import TINY

MODEL = {**TINY, "architectures": ["GPTNeoXForCausalLM"], "vocab_size": 24}
WORDS = [
    "--config.data.prompts_per_step=4",
    "--config.data.max_prompt_tokens=8",
    "--config.rollout.completions_per_prompt=2",
    "--config.rollout.max_completion_tokens=24",
    "--config.schedule.minibatches=2",
    "--config.mesh.data=1",
    "--config.mesh.fsdp=-1",
]


@pytest.fixture
def settings(tmp_path):
    """Read the settings of a tiny run; its model directory holds nothing but config.json."""
    assert len(jax.devices()) == 8  # made before a plan asks for fewer
    (tmp_path / "config.json").write_text(json.dumps(MODEL))

    def read(config="cfrl", *more):
        arguments = [
            f"--config=configs/{config}.py",
            f"--config.model.path={tmp_path}",
            *WORDS,
            *more,
        ]
        if config != "sft":
            arguments.append("--config.reward.function=exact_match")
        return read_settings(runtime.read_config(arguments))

    return read


def run_of(settings, count=8):
    """Return an abstract run on virtual devices."""
    return abstract_run(settings, hardware.machine(f"cpu:{count}"))


def compiled(run, part, steps=None):
    """Return the costs of a part's programs by name; others are not compiled."""
    steps = candidate_programs(run, probe=False) if steps is None else steps
    return {step.name: measure(run, step, Chip()) for step in steps if step.part == part}


def first(steps):
    """Return an iterator over the first of some programs."""
    return itertools.islice(steps, 1)


def bytes_of(params):
    """Return the bytes of a tree over all devices."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def test_flops_of_an_update(settings):
    """oracle: 6 N T of the layers, 3 products of T² in attention, 6 V D of the head's rows."""
    width, inner, layers = MODEL["hidden_size"], MODEL["intermediate_size"], 2
    run = settings("rl", "--config.model.remat=none")
    rows, length, budget = 4, 32, 24
    per_layer = 4 * width * width + 2 * width * inner
    body = 6 * layers * per_layer * rows * length
    attention = 3 * layers * 2 * (2 * length * length * width) * rows
    head = 6 * MODEL["vocab_size"] * width * rows * budget
    result = compiled(run_of(run, 1), UPDATE)["update all"]
    assert result.flops == body + attention + head


def test_stage_one_has_no_body(settings):
    """by hand: logits and dW of the minibatch's rows, and their remaking nowhere."""
    result = compiled(run_of(settings(), 1), UPDATE)["update classifier"]
    assert result.flops == 2 * 2 * MODEL["vocab_size"] * MODEL["hidden_size"] * 4 * 24


def test_decoding_reads_every_token(settings):
    """by hand: six chunks of 4 of 23 tokens; each token multiplies 8 rows by every weight."""
    width, inner, layers, rows = MODEL["hidden_size"], MODEL["intermediate_size"], 2, 8
    result = compiled(run_of(settings("rl"), 1), GENERATION)
    assert result["decoding"].runs == 6 and result["cache growth"].runs == 1
    products = layers * (4 * width * width + 2 * width * inner) + MODEL["vocab_size"] * width
    attention = layers * 2 * (8 + 23) * width
    assert result["decoding"].flops == 4 * rows * 2 * (products + attention)


def test_a_cache_is_read_as_far_as_it_has_grown(settings):
    """by hand: of six chunks of 4 tokens four read 24 columns and two 31, not all 31."""
    run = run_of(settings("rl"), 1)
    for program in candidate_programs(run, probe=False):
        if program.part == GENERATION:
            measure(run, program, Chip())
        if program.name == "decoding":
            break
    column = 2 * 2 * MODEL["hidden_size"] * 4 * 8  # keys and values of two layers, float32, 8 rows
    assert program.unread == pytest.approx(4 * (31 - (4 * 24 + 2 * 31) / 6) * column)


def test_no_tokens_are_scored_twice(settings):
    """law: the reading for a KL in the reward has the correction's log-probs; one in the loss is
    computed by the update, so that the policy is not read for it."""
    costs = {}
    for place in ("reward", "loss"):
        more = (
            "correction=truncate",
            "kl_estimator=full",
            "kl_coefficient=0.1",
            f"kl_place={place}",
        )
        run = run_of(settings("rl", *(f"--config.objective.{word}" for word in more)), 1)
        for program in reference_readings(run, run.functions):
            reading = functools.partial(program.function, **program.keywords)
            costs[place, program.name] = jaxpr.flops(jaxpr.trace(reading, *program.arguments))
    once = costs["loss", "log-probs"]
    assert costs.keys() == {("loss", "log-probs"), ("loss", "reference"), ("reward", "reference")}
    assert costs["loss", "reference"] == once
    assert costs["reward", "reference"] == 2 * once  # bodies; a head's FLOPs are not counted here


def test_shapes_are_those_of_a_run(settings):
    """law: the batch, the state and their shardings are those that the loop passes to its step."""
    planned = settings("cfrl")
    run = run_of(planned)
    policy, params = models.build("GPTNeoXForCausalLM", MODEL, jax.random.key(0), mesh=run.mesh)
    model = dataclasses.replace(run.model, network=policy, params=params)
    setup = RunSetup(run.settings, model, None, None, None, None)
    source = BATCH_SOURCES["rl"](setup)
    for stage in run.stages:
        batch, reference = run.minibatch(stage)
        made = _minibatch(source, setup, stage).replace(kl_advantages=None)
        expected = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), batch) == expected
        placed = runtime.place_rows(made, run.mesh)
        same = jax.tree.map(
            lambda a, b: a.sharding.is_equivalent_to(b.sharding, b.ndim), batch, placed
        )
        assert all(jax.tree.leaves(same))
        assert reference is None


def _minibatch(source, setup, stage):
    """Draw completions at full length and make the first minibatch of them."""
    rows = np.arange(4)
    sample = source.functions.samplers[stage.head_alone]
    prompts = data.prompt_batch([[1] * 8] * 4, rows, 0, 8)
    rollout = sample(
        setup.model.params, runtime.place_rows(prompts, setup.model.mesh), jax.random.key(1)
    )
    features = rollout.features
    rollout = runtime.fetch(rollout.replace(features=None)).replace(features=features)
    result = RewardedRollout(
        rollout=rollout,
        texts=["x"] * 8,
        result=reward.RewardResult(np.arange(8.0), {}, {}, {}, frozenset()),
        rows=np.repeat(rows, 2),
    )
    params, key = setup.model.params, jax.random.key(2)
    context = StepContext(params, params, stage, True, 1, key, lambda name: None)
    batch, _ = source._batch(context, result)
    return split(batch, 2)[0]


def test_what_lies_beside_a_program(settings):
    """by hand: two copies of the params all through, Adam's moments of the head in stage one."""
    run = run_of(settings(), 1)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(run.model.params))
    rows = compiled(run, UPDATE)
    moments = 4 * 2 * MODEL["vocab_size"] * MODEL["hidden_size"]
    assert rows["update classifier"].resident_gib * 2**30 == 4 * count
    argument_bytes = rows["update classifier"].argument_gib * 2**30
    batch = jax.tree.leaves(run.minibatch(run.stages[0])[0])
    inputs = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in batch)
    assert argument_bytes == pytest.approx(4 * count + moments + inputs, abs=16)  # and counters


def test_a_copy_to_sample_from(settings):
    """by hand: the params replicated on each device while sampling, and gathered only once."""
    run = run_of(settings("rl", "--config.rollout.mesh.data=8"))
    rows, param_bytes = compiled(run, GENERATION), bytes_of(run.model.params)
    assert rows["copy of params"].scratch_gib * 2**30 >= param_bytes
    assert rows["copy of params"].collectives["all-gather"][1] > param_bytes / 2
    assert rows["cache growth"].copies_gib * 2**30 == param_bytes
    for name in ("prefill", "decoding"):
        assert rows[name].copies_gib == 0 and rows[name].argument_gib * 2**30 > param_bytes
        # beside the copy lie the starting params, the policy's and its moments, in eight parts
        resident = [run.model.params, run.model.params, run.state(run.stages[0]).opt_state]
        assert rows[name].resident_gib * 2**30 == sum(map(device_bytes, resident))
    assert rows["decoding"].received < 100 < param_bytes  # flags and places of rows


def test_a_ledger_by_hand(settings):
    """by hand: params before and after and the moments before are read; kept while it steps."""
    planned = settings("cfrl", "--config.probe.ledger_by=group", "--config.probe.prompts=2")
    run = run_of(planned, 1)
    param_bytes, moments = (
        bytes_of(run.model.params),
        4 * 2 * MODEL["vocab_size"] * MODEL["hidden_size"],
    )
    (row,) = compiled(run, PROBE, first(ledgers(run))).values()
    assert row.name == "ledger classifier" and row.stages == ("classifier",)
    assert row.runs == 1 / 50 and row.flops > 0
    batch = bytes_of(run.minibatch(run.stages[0], with_ledger=True)[0])
    tokens, gradients, measured = 2 * 2 * 32 * (4 + 1), 2 * moments // 2, 4 * 2 * 96
    other_bytes = (
        row.argument_gib * 2**30 - 2 * param_bytes - moments - batch - gradients - measured
    )
    assert 2 * tokens <= other_bytes < 2 * tokens + 30 * 96  # and places of 96 probe tokens
    assert row.resident_gib * 2**30 == pytest.approx(param_bytes + moments, abs=16)
    kept = [device_bytes(run.snapshot_copies(stage)) for stage in run.stages]
    assert kept == [
        pytest.approx(param_bytes + moments, abs=16),
        pytest.approx(3 * param_bytes, abs=100),
    ]
    watched, alone = (
        compiled(run, UPDATE, first(updates(run, looked)))["update classifier"]
        for looked in (True, False)
    )
    assert watched.copies_gib * 2**30 == kept[0] and alone.copies_gib == 0
    assert watched.peak_gib - alone.peak_gib == pytest.approx(watched.copies_gib)


@pytest.mark.parametrize("change", ["every_steps", "held_out"])
def test_no_looks_no_copies(settings, change):
    """by hand: without probes, or held-out prompts for them, no copy is made and no ledger."""
    words = {
        "every_steps": [
            "--config.probe.every_steps=None",
            "--config.probe.ledger_every_steps=None",
        ],
        "held_out": ["--config.data.path=x.jsonl", "--config.data.held_out=0.0"],
    }
    run = run_of(settings("rl", *words[change]), 1)
    assert run.snapshot_copies(run.stages[0]) == []
    names = [program.name for program in updates(run, True)]
    assert names == ["update all"] and not run.settings.probes


def test_shapes_are_those_of_a_ledger(settings):
    """law: a real ledger is made in the way, and of the shapes and places, that were planned."""
    families = "--config.probe.families=('own', 'reference')"
    small = settings("rl", families, "--config.probe.memory_gib=1.1e-4", "--config.probe.prompts=4")
    run = run_of(small)
    policy, params = models.build("GPTNeoXForCausalLM", MODEL, jax.random.key(0), mesh=run.mesh)
    model = dataclasses.replace(run.model, network=policy, params=params)
    setup = RunSetup(run.settings, model, None, None, None, None)
    source, stage = BATCH_SOURCES["rl"](setup), run.stages[0]
    # the parts of a ProbeHook but for the held-out prompts
    hook = types.SimpleNamespace(settings=small.probe, bound_stages=run.stages)
    hook._ledger_fits = lambda *arguments: True
    made = make_ledger(run.settings, model, source.term_losses, stage)
    state = TrainStates(run.settings, model).initial_state(stage)
    # see test_shapes_are_those_of_a_run
    planned, _ = run.minibatch(run.stages[0], with_ledger=True)
    batch = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), planned)
    due = small.probe.ledger_every_steps
    before = ProbeHook.snapshot(hook, state, batch, None, 0, due).before
    step = jax.jit(update.make_step_with_term_gradients(stage, source.term_losses))
    _, _, gradients = step(before, batch)
    prompts = data.supervised_batch([[1] * 8] * 12, [[1] * 24] * 12, range(12), 0, 8, 24)
    probe_set = ProbeSet(
        tokens=prompts.tokens,
        mask=prompts.mask,
        completion_mask=prompts.completion_mask,
        groups=jnp.arange(12),
    )
    prober = probe.Prober(policy, probe_set, params, memory_gib=small.probe.memory_gib)
    calls = []

    def read(*probed):
        taken = attribution.OptimizerStep(before, state.params, batch, gradients=gradients)
        calls.append(made.bind(taken, *probed, jnp.zeros((2, len(probed[1]))))[1])
        raise StopIteration

    with pytest.raises(StopIteration):
        prober.map_blocks(read)
    # the program of the plan's own network has other functions of the same names
    (spec, inputs), (planned,) = calls[0], ledgers(run)
    bound = {"policy": None, "terms": None, "optimizer": None}
    assert dataclasses.replace(planned.arguments[0], **bound) == dataclasses.replace(spec, **bound)
    assert (
        planned.name == "ledger all" and planned.runs_per_step == len(prober.blocks) / 50 == 3 / 50
    )
    assert planned.rows_per_device == prober.blocks[0][0].tokens.shape[0] == 4
    expected = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), planned.arguments[1])
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), inputs) == expected
    kept = run.snapshot_copies(stage)
    for real, shapes in zip((before.params, before.opt_state), kept, strict=True):
        same = jax.tree.map(
            lambda a, b: a.sharding.is_equivalent_to(b.sharding, b.ndim), shapes, real
        )
        assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("name", [name for name in PUBLISHED_MODELS if "ArmoRM" not in name])
def test_published_shapes(name):
    """by hand: parameters as published, to a thousandth."""
    billions = {
        "EleutherAI/pythia-1b": 1.011781632,
        "EleutherAI/pythia-2.8b": 2.775208960,
        "meta-llama/Meta-Llama-3-8B": 8.030261248,
        "meta-llama/Llama-3.2-1B": 1.235814400,
        "Qwen/Qwen3-8B": 8.190735360,
        "Qwen/Qwen3-30B-A3B": 30.532122624,
        "mistralai/Mistral-7B-v0.3": 7.248023552,
        "allenai/OLMo-2-1124-7B": 7.298617344,
        "allenai/Olmo-3-1025-7B": 7.298011136,
        "HuggingFaceTB/SmolLM3-3B": 3.075098624,
        "microsoft/Phi-3-mini-4k-instruct": 3.821079552,
        "microsoft/Phi-4-mini-instruct": 3.836021760,
    }
    raw = abstract_models.read_entries(name)
    _, shapes = models.describe(raw["architectures"][0], raw)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert count == round(billions[name] * 1e9)


def test_armorm_has_its_published_size():
    """by hand: 7.51 billion parameters, heads in float32."""
    raw = abstract_models.read_entries("RLHFlow/ArmoRM-Llama3-8B-v0.1")
    scorer, shapes = models.describe_scorer(raw, jax.numpy.bfloat16)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert round(count / 1e9, 2) == 7.51
    assert len(scorer.names) == 20 and shapes["reward"]["weight"].dtype == "float32"


@pytest.fixture
def v5e():
    """Return sixteen abstract chips."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'ntkrl[tpu-plan]'")
    return hardware.machine("v5e-16")


@pytest.mark.slow
def test_a_program_that_does_not_fit_a_tpu(settings, v5e):
    """story: 40 GiB doubled give a row with the memory needed, not a crash."""
    run = abstract_run(settings("rl"), v5e)
    array = run.replicated(jax.ShapeDtypeStruct((40, 1 << 28), np.float32))
    call = jax.jit(lambda x: 2 * x + x[::-1])
    big = Program("big", UPDATE, ("all",), call, (array,), frozenset())
    row = measure(run, big, v5e.chip)
    assert big.compiled is None and not row.fits(v5e.chip)
    assert row.failed.startswith("does not fit: needs ") and row.peak_gib > 80


@pytest.mark.slow
def test_a_tpu_compiles_it(settings, v5e):
    """story: a tiny run for 16 chips of v5e, by the TPU's compiler: all programs fit."""
    machine = v5e
    run = abstract_run(settings(), machine)
    names = []
    for program in candidate_programs(run, probe=True):
        row = measure(run, program, machine.chip)
        names.append(row.name)
        assert row.fits(machine.chip), row
        assert row.seconds > 0
    assert {"prefill", "decoding", "update classifier", "update all", "kernel apply"} <= {*names}
