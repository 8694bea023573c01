"""The compiled programs of a run, with abstract arguments: for planning without its hardware.

One rollout step of a stage is generation (prefill, cache growth, decoding), scoring (reference
policy, reward models) and the update; a probe adds ledgers and evaluation samples. Every program
is the function that the loop itself jits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import attribution, data, ntk, probe, rollout, runtime, trees, update
from ntkrl.evaluation import make_evaluation_sample, prompts_together
from ntkrl.numerics import bucket_length
from ntkrl.reward.networks import rows_together
from ntkrl.scoring import head_of
from ntkrl.settings import RunSettings
from ntkrl.setup import StartingModel
from ntkrl.softmax import OutputHead
from ntkrl.training.batch_sources import supervised_losses
from ntkrl.training.credit import RolloutArrays, without_kl_advantages
from ntkrl.training.probe_hook import make_ledger
from ntkrl.training.rollout_source import RolloutFunctions, update_batch
from ntkrl.training.train_state import TrainStates
from ntkrl.types import Params, PromptBatch, Rollout, Scorer, TrainState, UpdateBatch

GENERATION, SCORING, UPDATE, PROBE = PARTS = ("generation", "scoring", "update", "probe")
STARTING, POLICY, OPTIMIZER = "starting params", "params", "optimizer state"
"""Names of trees that stay on the devices throughout a stage; see AbstractRun.resident."""


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """One jitted function of a run and its abstract arguments.

    name: unique within the run. part: one of PARTS.
    stages: names of the stages it belongs to; none for what no stage needs.
    function: jitted; `function.lower(*arguments, **keywords)` compiles.
    resident: names of the resident trees among the arguments.
    runs_per_step: mean number of runs in a rollout step.
    loop_trips: iterations of a loop whose end depends on data.
    rows_per_device: rows that a device reads at a time.
    extra: trees on the devices while it runs, besides its arguments and the resident trees.
    """

    name: str
    part: str
    stages: tuple[str, ...]
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    resident: frozenset[str]
    runs_per_step: float = 1.0
    loop_trips: int = 1
    rows_per_device: int = 1
    keywords: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    extra: Any = ()


Compiled = Any
Programs = Generator[Program, Compiled | None, None]
"""Yields programs; the caller sends back what each compiled to, or None if it did not compile."""


class AbstractRun:
    """A run described by shapes: its resident trees and the programs that it compiles."""

    def __init__(
        self,
        settings: RunSettings,
        model: StartingModel,
        scorers: Mapping[str, tuple[Scorer, Params]],
    ):
        """Bind stages and functions to a model.

        Args:
          settings: of a run with method rl or sft.
          model: params are shapes with shardings; the tokenizer needs its special tokens alone.
          scorers: reward models by name, their params shapes with shardings.

        Raises:
          ValueError: what a run is refused for, as far as it is known without files.
        """
        # stop strings are searched for on the host
        limits = dataclasses.replace(settings.rollout, stop=())
        self.settings = dataclasses.replace(settings, rollout=limits)
        self.model, self.mesh, self.scorers = model, model.mesh, scorers
        self.width, self.budget = settings.data.max_prompt_tokens, limits.max_completion_tokens
        rollout.check_length(model.policy, self.width, self.budget)
        self.states = TrainStates(self.settings, model)
        self.functions: RolloutFunctions | None = None
        if settings.method == "rl":
            self.functions = RolloutFunctions(self.settings, model)
            self.loss, self.term_losses = self.functions.loss, self.functions.term_losses
        else:
            self.loss, self.term_losses = supervised_losses(self.settings, model)
        # epochs have a length that only the prompts know, and no program depends on
        stages = [stage.in_steps(1 << 20) for stage in settings.stages]
        self.stages = update.stage_programs(
            stages, model.policy, model.params, settings.schedule.updates
        )
        self.stage_names = tuple(program.stage.name for program in self.stages)
        self.key = self.replicated(jax.eval_shape(lambda: jax.random.key(0)))

    def replicated(self, tree: Any) -> Any:
        """Return shapes replicated on every device."""
        sharding = runtime.replicated(self.mesh)
        return jax.tree.map(lambda leaf: leaf.update(sharding=sharding), tree)

    def rows(self, tree: Any) -> Any:
        """Return the shapes of a batch with the sharding of `runtime.place_rows`."""
        sharding = runtime.row_sharding(jax.tree.leaves(tree)[0].shape[0], self.mesh)
        return jax.tree.map(lambda leaf: leaf.update(sharding=sharding), tree)

    def per_device(self, rows: int) -> int:
        """Return the rows of a batch on each device."""
        return runtime.row_sharding(rows, self.mesh).shard_shape((rows,))[0]

    def state(self, stage: update.StageProgram) -> TrainState:
        """Return the state that a stage's steps start from."""
        return self.states.abstract(stage).replace(reference=None)

    def resident(self, stage: update.StageProgram) -> dict[str, Any]:
        """Return the trees that are on the devices throughout a stage, by name."""
        params = self.model.params
        named = {STARTING: params, POLICY: params, OPTIMIZER: self.state(stage).opt_state}
        if self.settings.schedule.reference_sync_steps is not None:
            named["reference params"] = params
        return named | {f"reward {name}": params for name, (_, params) in self.scorers.items()}

    def snapshot_copies(self, stage: update.StageProgram) -> list[Any]:
        """Return the copies that a probed step keeps on the devices; see ProbeHook.snapshot."""
        if not self.settings.probes:
            return []
        state = self.state(stage)
        if self.settings.probe.ledger_every_steps is None:
            return [state.params]
        return [state.params, _on_device(state.opt_state)]

    def rollout(self, keep_features: bool) -> Rollout:
        """Return a rollout with every prompt and completion at its full length."""
        settings, policy = self.settings, self.model.policy
        count = settings.data.prompts_per_step * settings.rollout.completions_per_prompt
        tokens = jax.ShapeDtypeStruct((count, self.width + self.budget), jnp.int32)
        mask = tokens.update(dtype=jnp.bool_)
        log_probs = jax.ShapeDtypeStruct((count, self.budget), jnp.float32)
        features = None
        if keep_features:
            dtype = jax.eval_shape(policy.features, self.model.params, tokens, mask).dtype
            shape = (count, self.budget, policy.feature_size)
            features = jax.ShapeDtypeStruct(shape, dtype)
        return self.rows(
            Rollout(
                tokens=tokens,
                mask=mask,
                completion_mask=log_probs.update(dtype=jnp.bool_),
                sampler_log_probs=log_probs,
                kept_log_mass=log_probs,
                finished=jax.ShapeDtypeStruct((count,), jnp.bool_),
                features=features,
            )
        )

    def minibatch(
        self, stage: update.StageProgram, accounted: bool = False
    ) -> tuple[UpdateBatch, OutputHead | None]:
        """Return the batch and the reference's head that a stage's step is called with.

        Args:
          stage: the stage.
          accounted: whether a ledger is made of the step; by sample it needs no `kl_advantages`
            (see `kl_shares`).
        """
        if self.functions is None:
            return self.rows(self._supervised_batch()), None
        functions, drawn = self.functions, self.rollout(keep_features=stage.head_alone)
        log_probs = drawn.sampler_log_probs
        exact_kl = functions.needs_reference and functions.objective.needs_distribution
        arrays = RolloutArrays(
            rewards=drawn.finished.update(dtype=jnp.float32),
            old_log_probs=log_probs,
            ref_log_probs=log_probs,
            behaviour_log_probs=log_probs,
            mask=drawn.completion_mask,
            finished=drawn.finished,
            kl=log_probs if exact_kl else None,
        )
        weights = jax.eval_shape(functions.token_weights, arrays, self.key)
        reference_in_loss = functions.reference_in_loss
        ref_features = self.rollout(True).features if reference_in_loss else None
        batch = update_batch(drawn, arrays, weights, ref_features)
        if not accounted or self.settings.probe.ledger_by != "group":
            batch = without_kl_advantages(batch)
        count = batch.tokens.shape[0] // self.settings.schedule.minibatches
        batch = jax.tree.map(lambda leaf: leaf.update(shape=(count, *leaf.shape[1:])), batch)
        head = head_of(self.model.policy, self.model.params) if reference_in_loss else None
        return self.rows(batch), head

    def _supervised_batch(self) -> UpdateBatch:
        """Return a supervised minibatch; packed, as if every example filled a row."""
        settings, schedule = self.settings.data, self.settings.schedule
        count = settings.prompts_per_step // schedule.minibatches
        prompts, completions, rows = [[0] * self.width], [[0] * self.budget], [0] * count

        def batch() -> UpdateBatch:
            if not settings.packing:
                return data.supervised_batch(prompts, completions, rows, 0, self.width, self.budget)
            multiple = trees.row_parts(self.mesh) * schedule.microbatches
            length = self.width + self.budget
            return data.packed_batches(prompts, completions, [rows], 0, length, multiple)[0]

        return jax.eval_shape(batch)

    def programs(self, probes: bool = True) -> Programs:
        """Yield every program of the run.

        Args:
          probes: include what most steps do without: snapshots, ledgers, evaluation samples.
        """
        settings = self.settings
        if self.functions is not None:
            # features are kept for a stage that needs them, and cost a little memory in others
            keep_features = any(stage.head_alone for stage in self.stages)
            sampler = self.functions.samplers[keep_features]
            yield from generation(self, sampler, settings.data.prompts_per_step, GENERATION)
            yield from reference_readings(self)
            yield from reward_models(self)
        yield from updates(self, probes)
        if probes and settings.probes and settings.probe.ledger_every_steps is not None:
            yield from ledgers(self)
        if probes and settings.evaluates:
            sampler = make_evaluation_sample(settings, self.model)
            yield from generation(self, sampler, prompts_together(settings, self.mesh), PROBE)


def generation(run: AbstractRun, sampler: Any, count: int, part: str) -> Programs:
    """Yield a sampler's programs, with a cache that has grown to its full length.

    Args:
      run: the run.
      sampler: rollout.Sampler.
      count: prompts sampled together.
      part: GENERATION, or PROBE for the samples of an evaluation.
    """
    if run.settings.rollout.engine is not None:
        return  # sampled by another program
    stages, label = (run.stage_names, "") if part == GENERATION else ((), "evaluation ")
    prompts = run.rows(jax.eval_shape(lambda: _prompt_batch(count, run.width)))
    chunk, budget = sampler.settings.chunk_steps, run.budget
    columns = [run.width + min(chunk << n, budget - 1) for n in range(budget.bit_length())]
    columns = sorted({*columns, sampler.cache_columns(run.width, 1 + chunk)})
    columns = [c for c in columns if c <= run.width + max(budget - 1, chunk)]
    params, gather = run.model.params, sampler.gather_program(run.model.params)

    def program(name: str, key: str, arguments: tuple[Any, ...], runs: float, rows: int) -> Program:
        takes_params = any(argument is params for argument in arguments)
        is_policy = any(argument is run.model.params for argument in arguments)
        # a gathered copy of the params stays on the devices while the cache grows
        gathered = params is not run.model.params and not takes_params
        return Program(
            name=label + name,
            part=part,
            stages=stages,
            function=gather if key == "gather" else getattr(sampler.programs, key),
            arguments=arguments,
            resident=frozenset({POLICY} if is_policy else ()),
            runs_per_step=runs if stages else 0.0,
            loop_trips=chunk if key == "decode_chunk" else 1,
            rows_per_device=rows,
            extra=params if gathered else (),
        )

    if sampler.settings.gather_params:
        compiled = yield program("gathering", "gather", (params,), 1, 1)
        if compiled is None:
            return
        params = _results(gather, compiled, (params,))
    before = columns[-2] if len(columns) > 1 else columns[-1]
    arguments = (before, params, prompts, run.key)
    compiled = yield program("prefill", "prefill", arguments, 1, run.per_device(count))
    if compiled is None or budget == 1:
        return
    rows = run.per_device(count * sampler.settings.completions_per_prompt)
    live, written = _results(sampler.programs.prefill, compiled, arguments)[:2]
    if len(columns) > 1:
        arguments = (columns[-1], live)
        compiled = yield program("cache growth", "grow_cache", arguments, len(columns) - 1, rows)
        if compiled is None:
            return
        live = _results(sampler.programs.grow_cache, compiled, arguments)
    start = run.replicated(jax.ShapeDtypeStruct((), jnp.int32))
    chunks = -(-(budget - 1) // chunk)
    yield program("decoding", "decode_chunk", (params, live, written, start), chunks, rows)


def reference_readings(run: AbstractRun) -> Programs:
    """Yield the readings of sampled tokens under other params before a step."""
    functions, params = run.functions, run.model.params
    drawn, length = run.rollout(keep_features=True), {"length": run.budget}
    exact = functions.objective.needs_distribution
    stages: dict[str, list[str]] = {}
    features_fixed = True
    for stage in run.stages:
        features_fixed = features_fixed and stage.head_alone
        if functions.objective.correction != "off":
            stages.setdefault("log-probs", []).append(stage.stage.name)
        if functions.needs_reference:
            name = "reference from features" if features_fixed else "reference"
            stages.setdefault(name, []).append(stage.stage.name)
    for name, names in stages.items():
        features = drawn.features if name == "reference from features" else None
        function, arguments = functions.log_probs, (params, drawn.tokens, drawn.mask, features)
        resident = {POLICY if name == "log-probs" else STARTING}
        if exact and name != "log-probs":
            function, arguments = functions.statistics, (params, *arguments)
            resident.add(POLICY)
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


def reward_models(run: AbstractRun) -> Programs:
    """Yield the scoring of full-length texts by each reward model, in its batches."""
    settings = run.settings
    texts = settings.data.prompts_per_step * settings.rollout.completions_per_prompt
    count = rows_together(settings.reward.batch_size, run.mesh)
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


def updates(run: AbstractRun, probes: bool) -> Programs:
    """Yield each stage's train step; with `probes`, beside the copies of a probed one."""
    schedule = run.settings.schedule
    for stage in run.stages:
        state, (batch, reference) = run.state(stage), run.minibatch(stage)
        step = update.make_step(stage, run.loss, schedule.microbatches)
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
            rows_per_device=-(-rows // schedule.microbatches),
            extra=run.snapshot_copies(stage) if probes else (),
        )


def ledgers(run: AbstractRun) -> Programs:
    """Yield each stage's ledger; the params after the step are the policy's."""
    contexts, targets, blocks = probe_block(run)
    replicated = runtime.replicated(run.mesh)

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=replicated)

    for stage in run.stages:
        state, (batch, reference) = run.state(stage), run.minibatch(stage, accounted=True)
        ledger = make_ledger(run.settings, run.model, run.term_losses, stage)
        step = update.make_step_with_term_gradients(
            stage, run.term_losses, run.settings.schedule.microbatches
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
        before = state.replace(opt_state=_on_device(state.opt_state))
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
            runs_per_step=blocks / run.settings.probe.ledger_every_steps,
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
        np.zeros((count, length), np.int32),
        np.tile(run.width - 1 + np.arange(run.budget), count),
        np.repeat(np.arange(count), run.budget),
        np.ones((count, length), bool),
    )
    return contexts, jnp.zeros(count * run.budget, jnp.int32), -(-total // count)


def _on_device(opt_state: Any) -> Any:
    return jax.tree.map(
        lambda leaf: leaf.update(sharding=leaf.sharding.with_memory_kind("device")), opt_state
    )


def _prompt_batch(count: int, width: int) -> PromptBatch:
    return data.prompt_batch([[0] * width], [0] * count, 0, width)


def _results(function: Any, compiled: Compiled, arguments: tuple[Any, ...]) -> Any:
    """Return a program's results as shapes, with the shardings of its compiled form."""
    shapes = function.eval_shape(*arguments)
    return jax.tree.map(
        lambda leaf, where: leaf.update(sharding=where), shapes, compiled.output_shardings
    )
