"""A run described by shapes: what is on its devices, and the arguments of its programs."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ntkrl import data, rollout, runtime, trees, update
from ntkrl.scoring import head_of
from ntkrl.settings import RunSettings
from ntkrl.setup import StartingModel
from ntkrl.softmax import OutputHead
from ntkrl.training.batch_sources import supervised_losses
from ntkrl.training.rollout_functions import RolloutFunctions
from ntkrl.training.rollout_source import update_batch
from ntkrl.training.train_state import TrainStates
from ntkrl.types import Params, Rollout, Scorer, TrainState, UpdateBatch

STARTING, POLICY, OPTIMIZER = "starting params", "params", "optimizer state"
"""Names of trees that stay on the devices throughout a stage; see AbstractRun.resident."""


class AbstractRun:
    """A run described by shapes: its resident trees, batches and states."""

    def __init__(
        self,
        settings: RunSettings,
        model: StartingModel,
        scorers: Mapping[str, tuple[Scorer, Params]],
    ):
        """Bind stages and functions to a model.

        Args:
          settings: settings of a run with method rl or sft.
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
        if settings.method.samples:
            self.functions = RolloutFunctions(self.settings, model)
            self.loss, self.term_losses = self.functions.loss, self.functions.term_losses
        else:
            self.loss, self.term_losses = supervised_losses(self.settings, model)
        # epochs have a length that only the prompts know, and no program depends on
        stages = [stage.in_steps(1 << 20) for stage in settings.stages]
        self.stages = update.bind_stages(
            stages, model.policy, model.params, settings.schedule.updates
        )
        self.stage_names = tuple(stage.stage.name for stage in self.stages)
        self.key = self.replicated(jax.eval_shape(lambda: jax.random.key(0)))

    def replicated(self, tree: Any, mesh: Mesh | None = None) -> Any:
        """Return shapes replicated on every device; on the mesh of training by default."""
        sharding = runtime.replicated(self.mesh if mesh is None else mesh)
        return jax.tree.map(lambda leaf: leaf.update(sharding=sharding), tree)

    def rows(self, tree: Any, mesh: Mesh | None = None) -> Any:
        """Return the shapes of a batch with the sharding of `runtime.place_rows`.

        Args:
          tree: shapes.
          mesh: None for the mesh of training.
        """
        mesh = self.mesh if mesh is None else mesh
        sharding = runtime.row_sharding(jax.tree.leaves(tree)[0].shape[0], mesh)
        return jax.tree.map(lambda leaf: leaf.update(sharding=sharding), tree)

    def per_device(self, rows: int, mesh: Mesh | None = None) -> int:
        """Return the rows of a batch on each device; of the mesh of training by default."""
        mesh = self.mesh if mesh is None else mesh
        return runtime.row_sharding(rows, mesh).shard_shape((rows,))[0]

    def state(self, stage: update.BoundStage) -> TrainState:
        """Return the state that a stage's steps start from."""
        return dataclasses.replace(self.states.abstract_state(stage), reference=None)

    def resident(self, stage: update.BoundStage) -> dict[str, Any]:
        """Return the trees that are on the devices throughout a stage, by name."""
        params = self.model.params
        named = {STARTING: params, POLICY: params, OPTIMIZER: self.state(stage).opt_state}
        if self.settings.schedule.reference_sync_steps is not None:
            named["reference params"] = params
        return named | {f"reward {name}": params for name, (_, params) in self.scorers.items()}

    def snapshot_copies(self, stage: update.BoundStage) -> list[Any]:
        """Return the copies that a probed step keeps on the devices; see ProbeHook.snapshot."""
        if not self.settings.probes:
            return []
        state = self.state(stage)
        if self.settings.probe.ledger_every_steps is None:
            return [state.params]
        return [state.params, on_device(state.opt_state)]

    def rollout(self, keep_features: bool) -> Rollout:
        """Return a rollout with every prompt and completion at its full length."""
        settings, policy = self.settings, self.model.policy
        count = settings.data.prompts_per_step * settings.rollout.completions_per_prompt
        tokens = jax.ShapeDtypeStruct((count, self.width + self.budget), jnp.int32)
        mask = tokens.update(dtype=jnp.bool_)
        features = jax.eval_shape(policy.features, self.model.params, tokens, mask)

        def drawn() -> Rollout:
            shape = (count, self.budget)
            return Rollout(
                tokens=jnp.zeros(tokens.shape, tokens.dtype),
                mask=jnp.zeros(mask.shape, mask.dtype),
                completion_mask=jnp.zeros(shape, jnp.bool_),
                sampler_log_probs=jnp.zeros(shape, jnp.float32),
                kept_log_mass=jnp.zeros(shape, jnp.float32),
                finished=jnp.zeros(count, jnp.bool_),
                features=jnp.zeros((*shape, policy.feature_size), features.dtype)
                if keep_features
                else None,
                entropy=jnp.zeros(shape, jnp.float32),
            )

        return self.rows(jax.eval_shape(drawn))

    def minibatch(
        self, stage: update.BoundStage, with_ledger: bool = False
    ) -> tuple[UpdateBatch, OutputHead | None]:
        """Return the batch and the reference's head that a stage's step is called with.

        Args:
          stage: the stage.
          with_ledger: whether a ledger is made of the step; by sample it needs no `kl_advantages`
            (see `kl_shares`).
        """
        if self.functions is None:
            return self.rows(self._supervised_batch()), None
        functions, drawn = self.functions, self.rollout(keep_features=stage.head_alone)
        log_probs = drawn.sampler_log_probs
        exact_kl = functions.needs_reference and functions.objective.needs_distribution
        arrays = update.RolloutArrays(
            rewards=jax.eval_shape(lambda leaf: leaf.astype(jnp.float32), drawn.finished),
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
        if not with_ledger or self.settings.probe.ledger_by != "group":
            batch = dataclasses.replace(batch, kl_advantages=None)
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
            multiple = trees.row_parts(self.mesh) * self.settings.microbatches
            length = self.width + self.budget
            return data.packed_batches(prompts, completions, [rows], 0, length, multiple)[0]

        return jax.eval_shape(batch)


def device_bytes(tree: Any) -> float:
    """Return the bytes of placed shapes in one device's memory."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.ShapeDtypeStruct)
        and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        and leaf.sharding.memory_kind != "pinned_host"
    )


def on_device(opt_state: Any) -> Any:
    """Return the shapes of an optimizer state in device memory."""
    return jax.tree.map(
        lambda leaf: leaf.update(sharding=leaf.sharding.with_memory_kind("device")), opt_state
    )
