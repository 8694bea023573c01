"""Probes during training: readings of the probe set, and ledgers of single optimizer steps."""

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import attribution, data, durable_files, ntk, probe, runtime, trees, update
from ntkrl.numerics import GIB
from ntkrl.settings import RunSettings
from ntkrl.setup import RunSetup, StartingModel
from ntkrl.softmax import OutputHead
from ntkrl.training.analysed_step import CompletedStep, StepReading, StepSnapshot
from ntkrl.training.history import History, direction_arrays
from ntkrl.training.probe_set import (
    FORMAT,
    make_probes,
    prompt_ids,
    prompt_texts,
    rows_of,
    save_probes,
)
from ntkrl.types import Array, Params, Total, TrainState, UpdateBatch

LEDGER_COPIES = 20
"""Of the trained params that a ledger holds: what the compiler counts at Pythia-2.8B's size."""


def make_ledger(
    settings: RunSettings,
    model: StartingModel,
    term_losses: update.LossFn[dict[str, Total]],
    bound_stage: update.BoundStage,
) -> attribution.Ledger:
    """Return the ledger of a stage's steps."""
    return attribution.Ledger(
        policy=model.policy,
        terms=term_losses,
        optimizer=bound_stage.optimizer,
        trained=bound_stage.trained,
        groups=settings.probe.ledger_groups,
        by=settings.probe.ledger_by,
        memory_gib=settings.probe.memory_gib,
        microbatches=settings.microbatches,
        mesh=model.mesh,
    )


class ProbeHook:
    """The probe set of a run, read during training.

    A probe compares an optimizer step with its first-order prediction; a ledger attributes one to
    its samples. Both need what the step began with, which the step overwrites: `snapshot` copies
    it before, `analyse` reads it after.
    """

    def __init__(
        self,
        setup: RunSetup,
        term_losses: update.LossFn[dict[str, Total]],
        bound_stages: Sequence[update.BoundStage],
        directory: Path,
        key: Array,
    ):
        """Draw the probe set, or read it from the run directory.

        Args:
          setup: the run, with held-out prompts.
          term_losses: losses by term of its source.
          bound_stages: its stages.
          directory: the run's.
          key: consumed.

        Raises:
          ValueError: what `make_probes` raises, or groups that do not cover the params.
        """
        self.setup, self.model, self.bound_stages = setup, setup.model, bound_stages
        self.settings, self.directory = setup.settings.probe, directory
        self.memory_warned = False
        self.history = History(directory / "probes")
        if self.settings.kernel_every_steps is not None and runtime.is_distributed():
            raise ValueError(
                "probe.kernel_every_steps: exact kernels are for one process; set it to None."
            )
        self.ledgers = [
            make_ledger(setup.settings, setup.model, term_losses, stage) for stage in bound_stages
        ]
        for ledger in self.ledgers:
            ledger.check(self.model.params)
        self.probes = make_probes(setup, directory, key)
        families = rows_of(self.probes.arrays, self.probes.families)
        self.prober = probe.Prober(
            self.model.policy,
            self.probes.arrays,
            self.model.params,
            families,
            memory_gib=self.settings.memory_gib,
        )

    def write_set(self) -> None:
        """Write the probe set, unless the run directory has one."""
        path = self.directory / "probes" / "set.npz"
        if runtime.is_writer() and not path.exists():
            save_probes(self.probes, self.directory)

    def is_due(self, rollout_step: int) -> bool:
        """Return whether the last optimizer step of a rollout step is analysed."""
        return any(
            update.is_due(getattr(self.settings, name), rollout_step) for name in probe.CADENCES
        )

    def snapshot(
        self,
        state: TrainState,
        batch: UpdateBatch,
        reference: OutputHead | None,
        stage: int,
        rollout_step: int,
    ) -> StepSnapshot:
        """Copy what the analysis needs of a state before the step that donates it.

        Where the gradients of the KL term and of the rest of a sample differ by a factor alone,
        the batch is without its `kl_advantages`, which spares step and ledger a term.
        """
        opt_state, shares = None, None
        ledger_due = update.is_due(self.settings.ledger_every_steps, rollout_step)
        if ledger_due and self._ledger_fits(state, self.bound_stages[stage]):
            opt_state = jax.tree.map(
                lambda leaf: jnp.copy(runtime.on_device(leaf)), state.opt_state
            )
            shares = update.kl_shares(batch) if self.settings.ledger_by == "sample" else None
        if opt_state is None or shares is not None:
            batch = dataclasses.replace(batch, kl_advantages=None)
        before = dataclasses.replace(
            state, params=jax.tree.map(jnp.copy, state.params), opt_state=opt_state
        )
        return StepSnapshot(before, batch, reference, stage, shares)

    def analyse(self, step: CompletedStep, rollout_step: int) -> dict[str, float]:
        """Return the metrics of `read` and of `account`."""
        reading = self.read(step, rollout_step)
        _, metrics = self.account(reading)
        return reading.metrics | metrics

    def read(self, step: CompletedStep, rollout_step: int) -> StepReading:
        """Compare an optimizer step with its prediction, and read the probe set after it.

        Args:
          step: the optimizer step.
          rollout_step: that it belongs to.

        Returns:
          The reading; its arrays are written.
        """
        before, after, settings = step.start.before, step.after, self.setup.settings
        metrics, arrays, (old, new) = self.prober.compare(before.params, after.params)
        metrics |= self.measures(after.params, rollout_step, new)
        number = int(after.step)
        if step.start.with_ledger:
            direction_metrics, directions = self._directions(after.params, number)
            metrics, arrays = metrics | direction_metrics, arrays | directions
        arrays["weights"] = trees.gather_to_host(probe.sample_entries(before.params))
        if runtime.is_writer():
            metrics |= self.history.linearity(number, arrays)
            path = self.directory / "probes" / f"step_{number:06d}.npz"
            durable_files.save_arrays(path, arrays)
        batch = step.start.batch
        if not settings.data.packing:
            # the longest prompts and completions there can be: one shape, compiled once
            prompt_length, budget = (
                settings.data.max_prompt_tokens,
                settings.rollout.max_completion_tokens,
            )
            pad_id = self.model.tokenizer.pad_token_id
            batch = data.widened(batch, prompt_length, budget, pad_id)
            step = dataclasses.replace(step, start=dataclasses.replace(step.start, batch=batch))
        placed = runtime.place_rows(batch, self.model.mesh)
        if not settings.data.packing:
            measured = probe.step_measures(
                self.model.policy,
                (before.params, after.params),
                dataclasses.replace(placed, kl_advantages=None),
                settings.rollout.temperature,
                settings.schedule.chunk_tokens * settings.row_shards(self.model.mesh),
                self._group(batch),
            )
            metrics |= jax.tree.map(float, measured)
            if update.is_due(self.settings.kernel_every_steps, rollout_step):
                metrics |= self._alignment(before.params, batch)
        moved = probe.update_sparsity(self.model.params, after.params)
        metrics |= {f"weights/{kind}": float(value) for kind, value in moved.items()}
        entropy = np.asarray(new.statistics.entropy - old.statistics.entropy)
        return StepReading(step, placed, metrics, arrays, entropy)

    def measures(
        self, params: Params, rollout_step: int, reading: probe.ProbeReading | None = None
    ) -> dict[str, float]:
        """Return the measures of the probe set, and of kernels on it where they are due."""
        measures = self.prober.measures(params, reading)
        if not update.is_due(self.settings.kernel_every_steps, rollout_step):
            return measures
        now, start = self._kernel(params), self._start_kernel
        drift = probe.kernel_drift(now, start)
        if self.settings.kernel_layers:
            shares = probe.layer_shares(now["layers"], now["trace_layers"])
            drift |= {f"layer_share/{group}": share for group, share in shares.items()}
        return measures | {f"probe/{name}": value for name, value in drift.items()}

    def _directions(
        self, params: Params, number: int
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Return how far matrices have moved since the start, and their leading directions."""
        ranks, leading = probe.update_ranks(self.model.params, params)
        named = {f"weights/{n}/{kind}": float(v) for n in ranks for kind, v in ranks[n].items()}
        metrics = {name: value for name, value in named.items() if math.isfinite(value)}
        leading = runtime.fetch(leading)
        moved = {name: leaf for name, leaf in leading.items() if np.all(leaf.value > 0)}
        if runtime.is_writer():
            metrics |= self.history.rotation(number, moved)
        return metrics, direction_arrays(moved)

    def _group(self, batch: UpdateBatch) -> int | None:
        """Return the completions per prompt in adjacent rows, where they are compared."""
        group = self.setup.settings.rollout.completions_per_prompt
        if not self.setup.settings.method.samples or group < 2 or len(batch.tokens) % group:
            return None
        return group

    def _alignment(self, params: Params, batch: UpdateBatch) -> dict[str, float]:
        """Return the alignment of the kernel of some of a batch's tokens with advantages."""
        mask, length = np.asarray(batch.completion_mask), batch.completion_mask.shape[1]
        rows, columns = np.nonzero(mask & (np.asarray(batch.advantages) != 0))
        if not len(rows):
            return {}
        count = self.settings.kernel_contexts
        some = np.linspace(0, len(rows) - 1, count).round().astype(int)
        rows, columns = rows[some], columns[some]
        positions = columns + batch.tokens.shape[1] - length
        tokens, mask = np.asarray(batch.tokens)[rows], np.asarray(batch.mask)[rows]
        contexts = ntk.Contexts(
            jnp.asarray(tokens), jnp.asarray(positions - 1), jnp.arange(count), jnp.asarray(mask)
        )
        alignment = probe.batch_alignment(
            self.model.policy,
            params,
            contexts,
            tokens[np.arange(count), positions],
            np.asarray(batch.advantages)[rows, columns],
            self.settings.memory_gib,
        )
        return {"probe/advantage_alignment": alignment}

    @functools.cached_property
    def _start_kernel(self) -> dict[str, np.ndarray]:
        return self._kernel(self.model.params)

    def _kernel(self, params: Params) -> dict[str, np.ndarray]:
        """Return the kernel of some probe contexts, as `probe.kernel_traces` does."""
        settings = self.settings
        contexts = self.prober.subset(settings.kernel_contexts)
        plan = probe.plan_kernel(
            self.model.policy, params, contexts, settings.kernel_layers, settings.memory_gib
        )
        return probe.kernel_traces(plan)

    def account(self, reading: StepReading) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Make and write the ledger of a step; return its arrays and metrics, empty without one."""
        step, placed = reading.step, reading.placed
        if not step.start.with_ledger:
            return {}, {}
        actual = np.stack((reading.arrays["actual"], reading.entropy), axis=1)
        batch, ledger = step.start.batch, self.ledgers[step.start.stage]
        noises: list[probe.GradientNoise] = []
        optimizer_step = attribution.OptimizerStep(
            step.start.before, step.after.params, placed, step.start.reference, step.term_gradients
        )

        def account(contexts: ntk.Contexts, targets: Array, actual_O2: Array) -> dict[str, Any]:
            result = ledger.read(optimizer_step, contexts, targets, actual_O2.T)
            if result.noise is not None:
                noises.append(result.noise)
            return result.arrays

        arrays = self.prober.map_blocks(account, actual)
        if step.start.kl_shares is not None:
            arrays = attribution.split_kl(arrays, step.start.kl_shares)
        counts_B = np.maximum(np.sum(batch.completion_mask, axis=1), 1)
        advantages_BC = np.where(batch.completion_mask, batch.advantages, 0)
        advantages_B = np.sum(advantages_BC, axis=1) / counts_B
        if runtime.is_writer():
            stage = self.bound_stages[step.start.stage].stage.name
            texts = self._ledger_texts(batch, advantages_B, stage)
            durable_files.save_text(
                self.directory / "ledger" / f"{reading.name}.json", json.dumps(texts)
            )
            durable_files.save_arrays(self.directory / "ledger" / f"{reading.name}.npz", arrays)
        if self.settings.ledger_by != "sample":
            return arrays, attribution.ledger_measures(arrays)
        metrics = attribution.ledger_measures(arrays, advantages_B, self._same_prompt(batch))
        noise = {f"signal/{name}": float(v) for name, v in noises[0]._asdict().items()}
        finite = {name: value for name, value in noise.items() if math.isfinite(value)}
        return arrays, metrics | finite

    def _ledger_fits(self, state: TrainState, bound_stage: update.BoundStage) -> bool:
        """Return whether a ledger's copies fit the device; log once if they do not."""
        free = _free_bytes(jax.local_devices()[0])
        trained, _ = trees.partition(state.params, bound_stage.trained)
        bytes_here = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(trained)]
        needed = LEDGER_COPIES * sum(bytes_here) + self.settings.memory_gib * GIB
        fits = free is None or needed < free
        if free is not None and not fits and not self.memory_warned:
            self.memory_warned = True
            runtime.log(
                f"no ledger: it needs about {needed / GIB:.1f} GiB on a device beside training, "
                f"{free / GIB:.1f} are free; lower probe.memory_gib, shard the params "
                "over more devices, or set probe.ledger_every_steps=None."
            )
        return all(runtime.allgather_object("whether a ledger fits", fits))

    def _same_prompt(self, batch: UpdateBatch) -> np.ndarray | None:
        """Return `[O, B]`, True where a sample answers a probe token's prompt; None if nowhere."""
        probe_prompts, prompts = (
            prompt_ids(rows.tokens, rows.mask, rows.completion_mask.shape[1])
            for rows in (self.probes.arrays, batch)
        )
        same_SB = np.asarray([[a == b for b in prompts] for a in probe_prompts], bool)
        same_OB = same_SB[np.asarray(self.prober.rows)]
        return same_OB if same_OB.any() else None

    def _ledger_texts(
        self, batch: UpdateBatch, advantages: np.ndarray, stage: str
    ) -> dict[str, Any]:
        tokenizer, length = self.model.tokenizer, batch.completion_mask.shape[1]
        ends = self.model.end_ids
        texts, _ = data.decode_completions(tokenizer, batch.tokens, batch.completion_mask, ends)
        prompts = prompt_texts(tokenizer, batch.tokens, batch.mask, length)
        return {
            "format": FORMAT,
            "by": self.settings.ledger_by,
            "digest": self.probes.digest,
            "stage": stage,
            "samples": [
                {"prompt": prompt, "completion": text, "advantage": float(value), "row": None}
                for prompt, text, value in zip(prompts, texts, advantages, strict=True)
            ],
        }


def _free_bytes(device: jax.Device) -> int | None:
    """Return the free memory of a device, or None if it does not report any."""
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats["bytes_in_use"]
