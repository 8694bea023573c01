"""Every compiled program of a run, as functions of placed shapes: the run's own functions.

One rollout step of a stage is generation (prefill, cache growth, decoding), scoring (reference
policy, reward models) and the update; the product with a kernel is what a probe's cost is like.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ntkrl import data, rollout, runtime, trees, update
from ntkrl.evaluation import make_evaluation_sample, prompts_together
from ntkrl.numerics import bucket_length
from ntkrl.plan import kernel, ledgers, networks
from ntkrl.plan.batches import drawn, minibatch
from ntkrl.reward import padded_batch_size
from ntkrl.settings import RunSettings
from ntkrl.setup import Setup
from ntkrl.training import BATCH_SOURCES, States, jitted_step
from ntkrl.types import PromptBatch, TrainState

GENERATION, SCORING, UPDATE, PROBE = PARTS = ("generation", "scoring", "update", "probe")
START, POLICY, OPTIMIZER = "starting params", "params", "optimizer state"

Compiled = Any
Steps = Generator["Program", Compiled | None, None]


class Ends(NamedTuple):
    """The tokens that a sampler needs of a tokenizer."""

    eos_token_id: int = 0
    pad_token_id: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """One jitted function and what it is called with.

    name, part: what it is; part is one of PARTS.
    stages: names of the stages it belongs to.
    call, arguments, keywords: for `call.lower`.
    held: names of the Run's trees among the arguments.
    runs: how often it runs in a rollout step.
    trips: of a loop that ends by data.
    rows: that a device reads at a time.
    kept: trees that lie there while it runs, beside its arguments and the Run's trees.
    """

    name: str
    part: str
    stages: tuple[str, ...]
    call: Any
    arguments: tuple[Any, ...]
    held: frozenset[str]
    runs: float = 1.0
    trips: int = 1
    rows: int = 1
    keywords: dict[str, Any] = dataclasses.field(default_factory=dict)
    kept: Any = ()


class Run:
    """A run described by shapes: what its loop holds, and the programs it compiles."""

    def __init__(self, settings: RunSettings, mesh: Mesh):
        """Describe networks and stages.

        Raises:
          ValueError: what a run would be refused for, of what can be known without its files.
        """
        if settings.method == "reward":
            raise ValueError("plan knows methods rl and sft; a reward model has no plan yet.")
        limits = dataclasses.replace(settings.rollout, stop=())  # found on the host
        self.settings, self.mesh = dataclasses.replace(settings, rollout=limits), mesh
        self.policy, self.params = networks.describe_policy(settings.model, mesh)
        self.rewards = networks.describe_rewards(settings, mesh)
        width, budget = settings.data.max_prompt_tokens, settings.rollout.max_completion_tokens
        rollout.check_length(self.policy, width, budget)
        self.setup = Setup(
            policy=self.policy,
            params=self.params,
            tokenizer=Ends(),
            tokenizer_source="",
            mesh=mesh,
            scorer=None,
            settings=self.settings,
            train=None,
            held_out=None,
            rewards=None,
            base=None,
        )
        self.source = BATCH_SOURCES[settings.method](self.setup)
        self.states = States(self.setup)
        # epochs are of a length that only the prompts know, and no program depends on
        stages = [stage.in_steps(1 << 20) for stage in settings.stages]
        self.stages = update.stage_programs(
            stages, self.policy, self.params, settings.schedule.updates
        )
        self.names = tuple(stage.stage.name for stage in self.stages)
        self.key = self.whole(jax.eval_shape(lambda: jax.random.key(0)))

    def whole(self, tree: Any) -> Any:
        """Put shapes on every device."""
        where = runtime.replicated(self.mesh)
        return jax.tree.map(lambda leaf: leaf.update(sharding=where), tree)

    def rows(self, tree: Any) -> Any:
        """Put a batch where `runtime.place_rows` would."""
        where = runtime.row_sharding(jax.tree.leaves(tree)[0].shape[0], self.mesh)
        return jax.tree.map(lambda leaf: leaf.update(sharding=where), tree)

    def per_device(self, rows: int) -> int:
        """Return how many of a batch's rows a device holds."""
        return runtime.row_sharding(rows, self.mesh).shard_shape((rows,))[0]

    def state(self, stage: update.StageProgram) -> TrainState:
        """Describe the state a stage's steps start from."""
        step = self.whole(jax.ShapeDtypeStruct((), jnp.int32))
        bare = TrainState(step=step, params=self.params, opt_state=None, key=self.key)
        return bare.replace(opt_state=self.states.moments(stage, bare))

    def trees(self, stage: update.StageProgram) -> dict[str, Any]:
        """Return what lies on the devices all through a stage, by name."""
        found = {START: self.params, POLICY: self.params}
        found[OPTIMIZER] = self.state(stage).opt_state
        if self.settings.schedule.reference_sync_steps is not None:
            found["reference params"] = self.params
        return found | {f"reward {name}": params for name, (_, params) in self.rewards.items()}

    @property
    def evaluates(self) -> bool:
        """Whether held-out completions are sampled and scored."""
        settings = self.settings
        return settings.evaluation.every_steps is not None and bool(settings.reward.functions)

    @property
    def watches(self) -> bool:
        """Whether steps are looked at, which needs held-out prompts (see ProbeHook)."""
        files = self.settings.data
        held_out = files.path is None or files.eval_path is not None or files.held_out > 0
        return self.settings.probe.enabled and self.evaluates and held_out

    def kept(self, stage: update.StageProgram) -> list[Any]:
        """Return the copies that lie there during a step that is looked at."""
        return ledgers.kept(self.settings.probe, self.state(stage)) if self.watches else []

    def programs(self, probe: bool = True) -> Steps:
        """Yield every program; sent back is what it was compiled to, or None where it was not.

        Args:
          probe: with what is no part of most steps: copies for a look at one, ledgers,
            evaluation's samples, the product with a kernel.
        """
        settings = self.settings
        if settings.method == "rl":
            # features are kept for a stage that needs them, and cost a little memory in others
            keep = any(stage.head_alone for stage in self.stages)
            sampler, prompts = self.source.samplers[keep], settings.data.prompts_per_step
            yield from generation(self, sampler, prompts, GENERATION)
            yield from references(self)
            yield from reward_models(self)
        yield from updates(self, probe)
        if probe and self.watches and settings.probe.ledger_every_steps is not None:
            yield from accounts(self)
        if probe and self.evaluates:
            sampler = make_evaluation_sample(self.setup)
            yield from generation(self, sampler, prompts_together(self.setup), PROBE)
        if probe:
            s = kernel.setting(
                self.policy, self.params, self.mesh, self.settings.data.max_prompt_tokens
            )
            call, arguments = kernel.apply_call(s)
            held = frozenset({POLICY})
            yield Program("kernel apply", PROBE, (), call, arguments, held, runs=0.0)


def described(settings: RunSettings, devices: list[Any]) -> Run:
    """Describe a run on devices, in its config's mesh.

    Raises:
      ValueError: see Run; or a mesh that does not fit the devices.
    """
    return Run(settings, runtime.make_mesh(**settings.mesh, devices=devices))


def generation(run: Run, sampler: Any, count: int, part: str) -> Steps:
    """Yield a sampler's programs: the cache is grown once more to its full length, and full.

    Args:
      run: the run.
      sampler: rollout.Sampler.
      count: prompts read together.
      part: GENERATION, or PROBE for what is sampled in an evaluation.
    """
    settings, held = run.settings, frozenset({POLICY})
    if settings.rollout.engine is not None:
        return  # drawn by another program
    stages, label = (run.names, "") if part == GENERATION else ((), "evaluation ")
    width = settings.data.max_prompt_tokens
    prompts = run.rows(jax.eval_shape(lambda: _prompts(count, width)))
    chunk, budget = sampler.settings.chunk_steps, settings.rollout.max_completion_tokens
    columns = [width + min(chunk << n, budget - 1) for n in range(budget.bit_length())]
    columns = sorted({*columns, sampler.cache_columns(width, 1 + chunk)})
    columns = [one for one in columns if one <= width + max(budget - 1, chunk)]

    def lowered(name: str, program: str, runs: float, *arguments: Any, rows: int) -> Program:
        call = gather if program == "gather" else getattr(sampler.programs, program)
        trips = chunk if program == "decode_chunk" else 1
        mine = held if any(one is run.params for one in arguments) else frozenset()
        # a gathered copy lies there while the cache grows too
        beside = () if any(params is one for one in (run.params, *arguments)) else params
        given = (part, stages, call, arguments, mine, runs if stages else 0.0, trips, rows)
        return Program(label + name, *given, kept=beside)

    params, gather = run.params, sampler.gather_program(run.params)
    if sampler.settings.gather_params:
        compiled = yield lowered("gathering", "gather", 1, params, rows=1)
        if compiled is None:
            return
        params = _results(gather, compiled, (params,))
    before = columns[-2] if len(columns) > 1 else columns[-1]
    first = (before, params, prompts, run.key)
    compiled = yield lowered("prefill", "prefill", 1, *first, rows=run.per_device(count))
    if compiled is None or budget == 1:
        return
    rows = run.per_device(count * sampler.settings.completions_per_prompt)
    live, written = _results(sampler.programs.prefill, compiled, first)[:2]
    if len(columns) > 1:
        grown = (columns[-1], live)
        runs = len(columns) - 1
        compiled = yield lowered("cache growth", "grow_cache", runs, *grown, rows=rows)
        if compiled is None:
            return
        live = _results(sampler.programs.grow_cache, compiled, grown)
    start = run.whole(jax.ShapeDtypeStruct((), jnp.int32))
    chunks = -(-(budget - 1) // chunk)
    last = (params, live, written, start)
    yield lowered("decoding", "decode_chunk", chunks, *last, rows=rows)


def references(run: Run) -> Steps:
    """Yield how the drawn tokens are read under other params before a step."""
    source, objective = run.source, run.settings.objective
    taken, fixed = drawn(run), True
    beside = run.params if objective.needs_distribution else None
    reads: dict[tuple[str, str, Any], list[str]] = {}
    for stage in run.stages:
        fixed = fixed and stage.head_alone
        if objective.correction != "off":
            reads.setdefault(("log-probs", POLICY, False), []).append(stage.stage.name)
        if source.compares:
            name = "reference from features" if fixed else "reference"
            reads.setdefault((name, START, fixed), []).append(stage.stage.name)
    rows = run.per_device(taken.tokens.shape[0])
    for (name, held, stored), stages in reads.items():
        other = beside if held == START else None
        features = taken.features if stored else None
        arguments = (run.params, other, taken.tokens, taken.mask, features)
        given = {"length": taken.completion_mask.shape[1], "whole": other is not None}
        names = {held, POLICY} if other is not None else {held}
        yield Program(
            *(name, SCORING, tuple(stages), source.read, arguments, frozenset(names)),
            rows=rows,
            keywords=given,
        )


def reward_models(run: Run) -> Steps:
    """Yield the scoring of texts by each reward model: as long as ours, in their batches."""
    settings = run.settings
    texts = settings.data.prompts_per_step * settings.rollout.completions_per_prompt
    batch = padded_batch_size(settings.reward.batch_size, run.mesh)
    length = settings.data.max_prompt_tokens + settings.rollout.max_completion_tokens
    for name, (scorer, params) in run.rewards.items():
        length = bucket_length(min(length, scorer.max_tokens), scorer.max_tokens)
        shape, ints = (batch, length), jax.ShapeDtypeStruct((batch,), jnp.int32)
        tokens, mask = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.bool_))
        arguments = (params, *run.rows((tokens, mask, ints)))
        held, runs = frozenset({f"reward {name}"}), -(-texts // batch)
        given = (SCORING, run.names, jax.jit(scorer.score), arguments, held, runs, 1)
        yield Program(f"reward {name}", *given, run.per_device(batch))


def updates(run: Run, watched: bool = False) -> Steps:
    """Yield each stage's train step; watched: as it is when it is looked at."""
    schedule = run.settings.schedule
    for number, stage in enumerate(run.stages):
        state, (batch, reference) = run.state(stage), minibatch(run, number)
        count = batch.tokens.shape[0]
        step = jitted_step(run.setup, stage, run.source.minimised, state, count, reference)
        rows = run.per_device(count)
        name, kept = f"update {stage.stage.name}", run.kept(stage) if watched else ()
        arguments = (state, batch, reference)
        # a reference's head is counted twice, in the batch's company and with its params
        given = (UPDATE, (stage.stage.name,), step, arguments, frozenset({POLICY, OPTIMIZER}))
        parts = -(-rows // schedule.microbatches)
        yield Program(name, *given, runs=float(schedule.updates), rows=parts, kept=kept)


def accounts(run: Run) -> Steps:
    """Yield each stage's step ledger; the params it ended with are the policy's."""
    every = run.settings.probe.ledger_every_steps
    for number, stage in enumerate(run.stages):
        state, given = run.state(stage), minibatch(run, number, accounted=True)
        call = ledgers.read_call(run.setup, run.source.terms, stage, state, *given)
        own = (PROBE, (stage.stage.name,), call.read, call.arguments, frozenset({POLICY}))
        name, often = f"ledger {stage.stage.name}", call.blocks / every
        yield Program(name, *own, runs=often, rows=call.together)


def crowded(run: Run) -> str | None:
    """Say where a step's rows are too few for the mesh, so that devices read the same ones."""
    rows, parts = minibatch(run, 0)[0].tokens.shape[0], trees.row_parts(run.mesh)
    rows //= run.settings.schedule.microbatches
    if rows % parts == 0:
        return None
    return (
        f"data × fsdp = {parts} does not divide the {rows} rows read together in a step: devices "
        "repeat each other's work; raise data.prompts_per_step or mesh.tensor"
    )


def _prompts(count: int, width: int) -> PromptBatch:
    return data.prompt_batch([[0] * width], [0] * count, 0, width)


def _results(call: Any, compiled: Compiled, arguments: tuple[Any, ...]) -> Any:
    """Return a program's results as shapes, placed where the compiler leaves them."""
    shapes = call.eval_shape(*arguments)
    return jax.tree.map(
        lambda leaf, where: leaf.update(sharding=where), shapes, compiled.output_shardings
    )
