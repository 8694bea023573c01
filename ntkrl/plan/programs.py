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

from ntkrl import assembly, data, rollout, runtime, trees, update
from ntkrl.assembly.settings import RunSettings
from ntkrl.numerics import bucket_length
from ntkrl.plan import kernel, networks
from ntkrl.reward.networks import rows_together
from ntkrl.scoring import head_of
from ntkrl.types import PromptBatch, TrainState, UpdateBatch

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
        self.setup = assembly.Setup(
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
        self.source = assembly.SOURCES[settings.method](self.setup)
        self.states = assembly.States(self.setup)
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

    def programs(self, probe: bool = True) -> Steps:
        """Yield every program; sent back is what it was compiled to, or None where it was not.

        Args:
          probe: with what is no part of a step: evaluation's samples, the product with a kernel.
        """
        settings = self.settings
        if settings.method == "rl":
            # features are kept for a stage that needs them, and cost a little memory in others
            keep = any(stage.head_alone for stage in self.stages)
            sampler, prompts = self.source.samplers[keep], settings.data.prompts_per_step
            yield from generation(self, sampler, prompts, GENERATION)
            yield from references(self)
            yield from reward_models(self)
        yield from updates(self)
        scored = settings.evaluation.every_steps is not None and settings.reward.functions
        if probe and scored:
            sampler = assembly.make_evaluation_sample(self.setup)
            yield from generation(self, sampler, assembly.prompts_together(self.setup), PROBE)
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
    columns = sorted({*columns, sampler.columns(width, 1 + chunk)})
    columns = [one for one in columns if one <= width + max(budget - 1, chunk)]

    def lowered(name: str, program: str, runs: float, *arguments: Any, rows: int) -> Program:
        call = sampler.programs[program]
        trips = chunk if program == "read_on" else 1
        mine = held if any(one is run.params for one in arguments) else frozenset()
        often = runs if stages else 0.0
        return Program(label + name, part, stages, call, arguments, mine, often, trips, rows)

    params = run.params
    if sampler.settings.gather_params:
        gather = sampler.gathering(params)
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
    live, written = _results(sampler.programs["prefill"], compiled, first)[:2]
    if len(columns) > 1:
        grown = (columns[-1], live)
        runs = len(columns) - 1
        compiled = yield lowered("cache growth", "longer", runs, *grown, rows=rows)
        if compiled is None:
            return
        live = _results(sampler.programs["longer"], compiled, grown)
    start = run.whole(jax.ShapeDtypeStruct((), jnp.int32))
    chunks = -(-(budget - 1) // chunk)
    last = (params, live, written, start)
    yield lowered("decoding", "read_on", chunks, *last, rows=rows)


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
    batch = rows_together(settings.reward.batch_size, run.mesh)
    length = settings.data.max_prompt_tokens + settings.rollout.max_completion_tokens
    for name, (scorer, params) in run.rewards.items():
        length = bucket_length(min(length, scorer.max_tokens), scorer.max_tokens)
        shape, ints = (batch, length), jax.ShapeDtypeStruct((batch,), jnp.int32)
        tokens, mask = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.bool_))
        arguments = (params, *run.rows((tokens, mask, ints)))
        held, runs = frozenset({f"reward {name}"}), -(-texts // batch)
        given = (SCORING, run.names, jax.jit(scorer.score), arguments, held, runs, 1)
        yield Program(f"reward {name}", *given, run.per_device(batch))


def updates(run: Run) -> Steps:
    """Yield each stage's train step."""
    schedule = run.settings.schedule
    for number, stage in enumerate(run.stages):
        state, (batch, reference) = run.state(stage), minibatch(run, number)
        count = batch.tokens.shape[0]
        step = assembly.jitted_step(run.setup, stage, run.source.minimised, state, count, reference)
        rows = run.per_device(count)
        held = {POLICY, OPTIMIZER} | ({START} if reference is not None else set())
        name = f"update {stage.stage.name}"
        arguments = (state, batch, reference)
        given = (UPDATE, (stage.stage.name,), step, arguments, frozenset(held))
        parts = -(-rows // schedule.microbatches)
        yield Program(name, *given, runs=float(schedule.updates), rows=parts)


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


class Drawn(NamedTuple):
    """Shapes of a rollout as the loop has it: see types.Rollout."""

    tokens: Any
    mask: Any
    completion_mask: Any
    features: Any


def drawn(run: Run) -> Drawn:
    """Describe a whole rollout, every prompt and completion at its full length."""
    settings = run.settings
    rows = settings.data.prompts_per_step * settings.rollout.completions_per_prompt
    budget = settings.rollout.max_completion_tokens
    width = settings.data.max_prompt_tokens + budget
    tokens = jax.ShapeDtypeStruct((rows, width), jnp.int32)
    mask = jax.ShapeDtypeStruct((rows, width), jnp.bool_)
    dtype = jax.eval_shape(run.policy.features, run.params, tokens, mask).dtype
    features = jax.ShapeDtypeStruct((rows, budget, run.policy.feature_size), dtype)
    return Drawn(*run.rows((tokens, mask, mask.update(shape=(rows, budget)), features)))


def minibatch(run: Run, number: int) -> tuple[UpdateBatch, Any]:
    """Describe the batch and the reference's head that a stage's step is given."""
    settings, parts = run.settings, run.settings.schedule.minibatches
    if settings.method == "sft":
        return run.rows(_supervised(run)), None
    whole, objective = drawn(run), settings.objective
    rows, budget = whole.completion_mask.shape
    each = rows // parts
    log_probs = jax.ShapeDtypeStruct((rows, budget), jnp.float32)
    rewards, finished = (jax.ShapeDtypeStruct((rows,), d) for d in (jnp.float32, jnp.bool_))
    kl = log_probs if objective.needs_distribution and run.source.compares else None
    log = (log_probs,) * 3
    weights = jax.eval_shape(
        run.source.weigh, rewards, *log, whole.completion_mask, finished, kl, run.key
    )
    beside = objective.kl_place == "loss" and objective.needs_distribution
    batch = UpdateBatch(
        tokens=whole.tokens,
        mask=whole.mask,
        completion_mask=weights["mask"],
        old_log_probs=log_probs,
        ref_log_probs=log_probs,
        advantages=weights["advantages"],
        penalties=weights["penalties"],
        features=whole.features if run.stages[number].head_alone else None,
        ref_features=whole.features if beside else None,
    )
    batch = jax.tree.map(lambda leaf: leaf.update(shape=(each, *leaf.shape[1:])), batch)
    return run.rows(batch), head_of(run.policy, run.params) if beside else None


def _supervised(run: Run) -> Any:
    """Describe a supervised minibatch; packed, as if every example filled a row."""
    settings = run.settings
    count = settings.data.prompts_per_step // settings.schedule.minibatches
    prompt, budget = settings.data.max_prompt_tokens, settings.rollout.max_completion_tokens
    prompts, completions, rows = [[0] * prompt], [[0] * budget], [0] * count

    def batch() -> UpdateBatch:
        if not settings.data.packing:
            return data.supervised_batch(prompts, completions, rows, 0, prompt, budget)
        multiple = trees.row_parts(run.mesh) * settings.schedule.microbatches
        return data.packed_batches(prompts, completions, [rows], 0, prompt + budget, multiple)[0]

    return jax.eval_shape(batch)


def _prompts(count: int, width: int) -> PromptBatch:
    return data.prompt_batch([[0] * width], [0] * count, 0, width)


def _results(call: Any, compiled: Compiled, arguments: tuple[Any, ...]) -> Any:
    """Return a program's results as shapes, placed where the compiler leaves them."""
    shapes = call.eval_shape(*arguments)
    return jax.tree.map(
        lambda leaf, where: leaf.update(sharding=where), shapes, compiled.output_shardings
    )
