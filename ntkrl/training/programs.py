"""The compiled programs of a run, with abstract arguments: for planning without its hardware.

One rollout step of a stage is generation (prefill, cache growth, decoding), scoring (reference
policy, reward models) and the update; a probe adds ledgers and evaluation samples. Every program
is the function that the loop itself jits.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import attribution, data, ntk, probe, rollout, runtime, trees, update
from ntkrl.evaluation import make_evaluation_sampler, prompts_together
from ntkrl.generate import SampleFn
from ntkrl.numerics import bucket_length
from ntkrl.reward import padded_batch_size
from ntkrl.training.abstract_run import (
    OPTIMIZER,
    POLICY,
    STARTING,
    AbstractRun,
    device_bytes,
    on_device,
)
from ntkrl.training.probe_hook import make_ledger
from ntkrl.training.rollout_functions import RolloutFunctions
from ntkrl.types import Cache, PromptBatch

GENERATION, SCORING, UPDATE, PROBE = PARTS = ("generation", "scoring", "update", "probe")


@dataclasses.dataclass(eq=False)
class Program:
    """One jitted function of a run and its abstract arguments.

    name: unique within the run. part: one of PARTS.
    stages: names of the stages it belongs to; none for what no stage needs.
    function: jitted; `function.lower(*arguments, **keywords)` compiles.
    resident: names of the resident trees among the arguments.
    runs_per_step: mean number of runs in a rollout step.
    rows_per_device: rows that a device reads at a time.
    extra: trees on the devices while it runs, besides its arguments and the resident trees.
    unread: bytes of a device's cache that a mean run does not read, since it has not grown so far.
    compiled: set by whoever compiles the program, before taking the next one: programs that read
        its results take their shardings from here, and are left out while this is None.
    """

    name: str
    part: str
    stages: tuple[str, ...]
    function: jax.stages.Wrapped
    arguments: tuple[object, ...]
    resident: frozenset[str]
    runs_per_step: float = 1.0
    rows_per_device: int = 1
    keywords: Mapping[str, object] = dataclasses.field(default_factory=dict)
    extra: object = ()
    unread: float = 0.0
    compiled: jax.stages.Compiled | None = None


def resident_bytes(run: AbstractRun, program: Program) -> float:
    """Return the most bytes beside a program's arguments on a device, over its stages."""
    stages = [stage for stage in run.stages if stage.stage.name in program.stages]
    beside = [
        [tree for name, tree in run.resident(stage).items() if name not in program.resident]
        for stage in (stages if stages else run.stages)
    ]
    return max(map(device_bytes, beside)) + device_bytes(program.extra)


def peak_bytes(compiled: jax.stages.Compiled) -> float:
    """Return the most bytes of a compiled program on a device, its arguments included."""
    memory = compiled.memory_analysis()
    assert memory is not None  # every backend of XLA reports it
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes


def run_programs(run: AbstractRun, probes: bool = True) -> Iterator[Program]:
    """Yield every program of the run, those whose results others read first.

    Args:
      run: the run.
      probes: include what most steps do without: snapshots, ledgers, evaluation samples.
    """
    settings = run.settings
    if run.functions is not None:
        # features are kept for a stage that needs them, and cost a little memory in others
        keep_features = any(stage.head_alone for stage in run.stages)
        sampler = run.functions.samplers[keep_features]
        yield from generation(run, sampler, settings.data.prompts_per_step, GENERATION)
        yield from reference_readings(run, run.functions)
        yield from reward_models(run)
    yield from updates(run, probes)
    if probes and settings.probes:
        yield from ledgers(run)
    if probes and settings.evaluates:
        sampler = make_evaluation_sampler(settings, run.model)
        count = prompts_together(settings, run.model.rollout_mesh)
        yield from generation(run, sampler, count, PROBE)


def generation(run: AbstractRun, sampler: SampleFn, count: int, part: str) -> Iterator[Program]:
    """Yield a sampler's programs; decoding with a cache that has grown to its full length.

    Args:
      run: the run.
      sampler: a rollout.Sampler, unless an engine samples.
      count: prompts sampled together.
      part: GENERATION, or PROBE for the samples of an evaluation.
    """
    if run.settings.rollout.engine is not None:
        return  # sampled by another program
    assert isinstance(sampler, rollout.Sampler)
    stages, label = (run.stage_names, "") if part == GENERATION else ((), "evaluation ")
    mesh, budget = run.model.rollout_mesh, run.budget
    prompts = run.rows(jax.eval_shape(lambda: _prompt_batch(count, run.width)), mesh)
    columns, programs = _cache_columns(run, sampler), sampler.programs
    copy = params = run.model.params

    def program(
        name: str, function: Any, arguments: tuple[Any, ...], runs: float, rows: int
    ) -> Program:
        return Program(
            name=label + name,
            part=part,
            stages=stages,
            function=function,
            arguments=arguments,
            resident=frozenset({POLICY} if arguments[0] is params else ()),
            runs_per_step=runs if stages else 0.0,
            rows_per_device=rows,
            # the copy of the params stays on the devices while the cache grows
            extra=() if any(argument is copy for argument in arguments) else copy,
        )

    copying = program("copy of params", sampler.copy_program(params), (params,), 1, 1)
    yield copying
    if copying.compiled is None:
        return
    copy = _results(copying)
    before = columns[-2] if len(columns) > 1 else columns[-1]
    arguments: tuple[Any, ...] = (before, copy, prompts, run.replicated(run.key, mesh))
    prefill = program("prefill", programs.prefill, arguments, 1, run.per_device(count, mesh))
    yield prefill
    if prefill.compiled is None or budget == 1:
        return
    rows = run.per_device(count * sampler.settings.completions_per_prompt, mesh)
    live, written = _results(prefill)[:2]
    if len(columns) > 1:
        arguments = (columns[-1], live)
        growth = program("cache growth", programs.grow_cache, arguments, len(columns) - 1, rows)
        yield growth
        if growth.compiled is None:
            return
        live = _results(growth)
    start = run.replicated(jax.ShapeDtypeStruct((), jnp.int32), mesh)
    chunks = -(-(budget - 1) // sampler.chunk_length)
    arguments = (copy, live, written, start)
    decoding = program("decoding", programs.decode_chunk, arguments, chunks, rows)
    decoding.unread = _unread(run, sampler, live.cache, chunks)
    yield decoding


def reference_readings(run: AbstractRun, functions: RolloutFunctions) -> Iterator[Program]:
    """Yield the readings of sampled tokens under other params before a step."""
    params = run.model.params
    drawn, length = run.rollout(keep_features=True), {"length": run.budget}
    exact = functions.objective.needs_distribution
    # a KL in the reward reads the policy beside the reference; one in the loss, in the update
    policy = None if functions.reference_in_loss else params
    policy_read = exact and policy is not None
    stages: dict[str, list[str]] = {}
    features_fixed = True
    for stage in run.stages:
        features_fixed = features_fixed and stage.head_alone
        if functions.objective.correction != "off" and not policy_read:
            stages.setdefault("log-probs", []).append(stage.stage.name)
        if functions.needs_reference:
            name = "reference from features" if features_fixed else "reference"
            stages.setdefault(name, []).append(stage.stage.name)
    for name, names in stages.items():
        features = drawn.features if name == "reference from features" else None
        function = functions.log_probs
        arguments: tuple[Any, ...] = (params, drawn.tokens, drawn.mask, features)
        resident = {POLICY if name == "log-probs" else STARTING}
        if exact and name != "log-probs":
            placed = (drawn.tokens, drawn.mask, features)
            function, arguments = functions.statistics, (params, policy, *placed)
            resident |= {POLICY} if policy_read else set()
        yield Program(
            name=name,
            part=SCORING,
            stages=tuple(names),
            function=function,
            arguments=arguments,
            resident=frozenset(resident),
            rows_per_device=run.per_device(drawn.tokens.shape[0]),
            keywords=length,
        )


def reward_models(run: AbstractRun) -> Iterator[Program]:
    """Yield the scoring of full-length texts by each reward model, in its batches."""
    settings = run.settings
    texts = settings.data.prompts_per_step * settings.rollout.completions_per_prompt
    count = padded_batch_size(settings.reward.batch_size, run.mesh)
    for name, (scorer, params) in run.scorers.items():
        longest = min(run.width + run.budget, scorer.max_tokens)
        length = bucket_length(longest, scorer.max_tokens)
        tokens = jax.ShapeDtypeStruct((count, length), jnp.int32)
        batch = run.rows((tokens, tokens.update(dtype=jnp.bool_), tokens.update(shape=(count,))))
        yield Program(
            name=f"reward {name}",
            part=SCORING,
            stages=run.stage_names,
            function=jax.jit(scorer.score),
            arguments=(params, *batch),
            resident=frozenset({f"reward {name}"}),
            runs_per_step=-(-texts // count),
            rows_per_device=run.per_device(count),
        )


def updates(run: AbstractRun, probes: bool) -> Iterator[Program]:
    """Yield each stage's train step; with `probes`, beside the copies of a probed one."""
    schedule, microbatches = run.settings.schedule, run.settings.microbatches
    for stage in run.stages:
        state, (batch, reference) = run.state(stage), run.minibatch(stage)
        step = update.make_step(stage, run.loss, microbatches)
        rows = run.per_device(batch.tokens.shape[0])
        yield Program(
            name=f"update {stage.stage.name}",
            part=UPDATE,
            stages=(stage.stage.name,),
            function=run.states.jitted_step(stage, step, state, batch, reference),
            arguments=(state, batch, reference),
            # a reference's head is counted twice, with the batch and with its params
            resident=frozenset({POLICY, OPTIMIZER}),
            runs_per_step=float(schedule.updates),
            rows_per_device=-(-rows // microbatches),
            extra=run.snapshot_copies(stage) if probes else (),
        )


def ledgers(run: AbstractRun) -> Iterator[Program]:
    """Yield each stage's ledger, if the run has any; the params after the step are the policy's."""
    every_steps = run.settings.probe.ledger_every_steps
    if every_steps is None:
        return
    contexts, targets, blocks = probe_block(run)
    replicated = runtime.replicated(run.mesh)

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=replicated)

    for stage in run.stages:
        state, (batch, reference) = run.state(stage), run.minibatch(stage, with_ledger=True)
        ledger = make_ledger(run.settings, run.model, run.term_losses, stage)
        step = update.make_step_with_term_gradients(
            stage, run.term_losses, run.settings.microbatches
        )
        gradients = jax.eval_shape(step, state, batch, reference).term_gradients
        trained, _ = trees.partition(state.params, stage.trained)
        gradients = {
            name: (
                jax.tree.map(
                    lambda grad, leaf: grad.update(sharding=leaf.sharding), grads, trained
                ),
                run.replicated(count),
            )
            for name, (grads, count) in gradients.items()
        }
        before = dataclasses.replace(state, opt_state=on_device(state.opt_state))
        actual = run.replicated(jax.ShapeDtypeStruct((2, len(targets)), jnp.float32))
        optimizer_step = attribution.OptimizerStep(
            before, state.params, batch, reference, gradients
        )
        function, (spec, inputs) = ledger.bind(optimizer_step, contexts, targets, actual)
        yield Program(
            name=f"ledger {stage.stage.name}",
            part=PROBE,
            stages=(stage.stage.name,),
            function=function,
            arguments=(spec, jax.tree.map(placed, inputs)),
            resident=frozenset({POLICY}),
            runs_per_step=blocks / every_steps,
            rows_per_device=contexts.tokens.shape[0],
        )


def probe_block(run: AbstractRun) -> tuple[ntk.Contexts, Any, int]:
    """Return one block of a run's probe set, every completion at its full length.

    Returns:
      contexts, targets: as a Prober cuts them, of tokens that are all zero.
      blocks: the number of them.
    """
    settings = run.settings.probe
    total, vocabulary = settings.completions, run.model.policy.vocab_size
    count = probe.completions_per_block(total, run.budget, vocabulary, settings.memory_gib)
    length = run.width + run.budget
    contexts = ntk.Contexts(
        jnp.zeros((count, length), jnp.int32),
        jnp.asarray(np.tile(run.width - 1 + np.arange(run.budget), count)),
        jnp.asarray(np.repeat(np.arange(count), run.budget)),
        jnp.ones((count, length), bool),
    )
    return contexts, jnp.zeros(count * run.budget, jnp.int32), -(-total // count)


def _cache_columns(run: AbstractRun, sampler: rollout.Sampler) -> list[int]:
    """Return the columns of a sampler's cache before and after each growth, rising."""
    chunk = sampler.chunk_length
    ends = range(1 + chunk, run.budget + chunk, chunk)
    return sorted({sampler.cache_columns(run.width, end) for end in ends})


def _unread(run: AbstractRun, sampler: rollout.Sampler, cache: Cache, chunks: int) -> float:
    """Return the bytes of a full cache that a mean chunk of decoding does not read yet."""
    ends = (1 + sampler.chunk_length * (number + 1) for number in range(chunks))
    mean = sum(sampler.cache_columns(run.width, end) for end in ends) / chunks
    absent = 1 - mean / cache.mask.shape[1]
    return sampler.chunk_length * absent * device_bytes((cache.keys, cache.values))


def _prompt_batch(count: int, width: int) -> PromptBatch:
    return data.prompt_batch([[0] * width], [0] * count, 0, width)


def _results(program: Program) -> Any:
    """Return a compiled program's results as shapes with their shardings."""
    assert program.compiled is not None
    function: Any = program.function  # jax.stages.Wrapped does not declare eval_shape
    shapes = function.eval_shape(*program.arguments)
    shardings = program.compiled.output_shardings
    return jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), shapes, shardings)
