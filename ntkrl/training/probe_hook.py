"""What a run looks at while it trains: the probe set, and accounts of single optimizer steps."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import attribution, data, ntk, probe, runtime, trees, update
from ntkrl.probe import CADENCES
from ntkrl.setup.assemble import Setup
from ntkrl.softmax import OutputHead
from ntkrl.training.history import History, direction_arrays
from ntkrl.training.probe_set import (
    FORMAT,
    make_probes,
    prompt_ids,
    prompt_texts,
    rows_of,
    save_probes,
)
from ntkrl.types import Array, Params, TrainState, UpdateBatch
from ntkrl.update.settings import due

COPIES = 20
"""Of the trained params that a ledger holds: what the compiler counts at Pythia-2.8B's size."""


class Seen(NamedTuple):
    """An optimizer step that is looked at.

    before: copies of what the step began with. batch: what it sees, on the host. reference: the
    OutputHead it compares with, or None. shares: `[B]` of the KL in the reward in the samples'
    advantages, where it is one number each and the batch therefore does not tell; or None.
    after: the state it ended with. gradients: by term of the loss, where a ledger is made of it.
    """

    before: TrainState
    batch: UpdateBatch
    reference: OutputHead | None
    shares: np.ndarray | None
    after: TrainState | None = None
    gradients: update.Gradients | None = None


class ProbeHook:
    """The probe set of a run, and what is made of it.

    A probe compares an optimizer step with its first-order prediction; a ledger accounts for one,
    sample by sample. Both need what the step began with, which the step itself overwrites: `keep`
    copies it before, `look` reads it after.
    """

    def __init__(
        self,
        setup: Setup,
        source: Any,
        programs: Sequence[update.StageProgram],
        directory: Path,
        key: Array,
    ):
        """Draw or read the probe set.

        Args:
          setup: the run, with held-out prompts.
          source: of its batches.
          programs: of its stages.
          directory: the run's.
          key: consumed.

        Raises:
          ValueError: what `make_probes` raises, or groups that do not cover the params.
        """
        self.setup, self.source, self.programs = setup, source, programs
        self.directory, self.refused = directory, False
        self.history = History(directory / "probes")
        self.settings = setup.settings.probe
        if self.settings.kernel_every_steps is not None and runtime.is_distributed():
            raise ValueError(
                "probe.kernel_every_steps: exact kernels are for one process; set it to None."
            )
        self.ledgers = [self._ledger(program) for program in programs]
        for ledger in self.ledgers:
            ledger.check(setup.params)
        self.probes = make_probes(setup, directory, key)
        families = rows_of(self.probes.held, self.probes.families)
        self.prober = probe.Prober(
            *(setup.policy, self.probes.held, setup.params, families),
            memory_gib=self.settings.memory_gib,
        )

    def begin(self) -> None:
        """Write the probe set, where the run directory has none yet."""
        path = self.directory / "probes" / "set.npz"
        if runtime.is_writer() and not path.exists():
            save_probes(self.probes, self.directory)

    def due(self, rollout_step: int) -> bool:
        """Tell whether the last optimizer step of a rollout step is looked at."""
        return any(due(getattr(self.settings, name), rollout_step) for name in CADENCES)

    def keep(
        self,
        state: TrainState,
        batch: UpdateBatch,
        reference: OutputHead | None,
        stage: int,
        rollout_step: int,
    ) -> Seen:
        """Copy of a state what is needed of it once the step has been taken; say what it sees.

        Where the gradients of the KL's and the rest's part of a sample are the same but for a
        factor, the step and the ledger by sample are spared a term.
        """
        accounts, moments = due(self.settings.ledger_every_steps, rollout_step), None
        if accounts and self._fits(state, self.programs[stage]):
            moments = jax.tree.map(_on_device, state.opt_state)
        copied = jax.tree.map(jnp.copy, state.params)
        before = state.replace(params=copied, opt_state=jax.tree.map(jnp.copy, moments))
        shares = None
        if moments is not None and self.settings.ledger_by == "sample":
            shares = kl_shares(batch)
        if moments is None or shares is not None:
            batch = bare(batch)
        return Seen(before, batch, reference, shares)

    def look(self, step: Seen, stage: int, rollout_step: int) -> dict[str, float]:
        """Compare and account for one optimizer step, and read the probe set after it.

        Args:
          step: what is looked at.
          stage: number of the stage.
          rollout_step: that it belongs to.

        Returns:
          The `predict/…`, `probe/…`, `signal/…`, `weights/…` and `ledger/…` metrics of the step;
          arrays are written.
        """
        before, after = step.before, step.after
        metrics, arrays, (old, new) = self.prober.compare(before.params, after.params)
        metrics |= self.read(after.params, rollout_step, new)
        number = int(after.step)
        name = f"step_{number:06d}"
        if before.opt_state is not None:
            found, kept = self._directions(after.params, number)
            metrics, arrays = metrics | found, arrays | kept
        arrays["weights"] = trees.whole(probe.sample_entries(before.params))
        if runtime.is_writer():
            metrics |= self.history.straightness(number, arrays)
            runtime.save_arrays(self.directory / "probes" / f"{name}.npz", arrays)
        if not self.setup.settings.data.packing:
            step = step._replace(batch=self._widened(step.batch))
        placed = runtime.place_rows(step.batch, self.setup.mesh)
        if not self.setup.settings.data.packing:
            given = self.setup.settings.rollout.temperature, self._chunk, self._group(step.batch)
            both = before.params, after.params
            found = probe.step_measures(self.setup.policy, both, bare(placed), *given)
            metrics |= jax.tree.map(float, found)
            if due(self.settings.kernel_every_steps, rollout_step):
                metrics |= self._alignment(before.params, step.batch)
        moved, _ = probe.update_sparsity(self.setup.params, after.params)
        metrics |= {f"weights/{kind}": float(value) for kind, value in moved.items()}
        if before.opt_state is not None:
            both = (arrays["actual"], np.asarray(new.statistics.entropy - old.statistics.entropy))
            metrics |= self._account(step, placed, np.stack(both, axis=1), name, stage)
        return metrics

    def read(
        self, params: Params, rollout_step: int, reading: probe.ProbeReading | None = None
    ) -> dict[str, float]:
        """Return the measures of the probe set, and of kernels on it where they are due."""
        measures = self.prober.measures(params, reading)
        if not due(self.settings.kernel_every_steps, rollout_step):
            return measures
        now, start = self._kernel(params), self.start_kernel
        found = probe.kernel_drift(now, start)
        if self.settings.kernel_layers:
            shares = probe.layer_shares(now["layers"], now["trace_layers"])
            found |= {f"layer_share/{group}": share for group, share in shares.items()}
        return measures | {f"probe/{name}": value for name, value in found.items()}

    def _directions(
        self, params: Params, number: int
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Return how matrices have moved since the start, and the directions that are kept."""
        ranks, leading = probe.update_ranks(self.setup.params, params)
        named = {f"weights/{n}/{kind}": float(v) for n in ranks for kind, v in ranks[n].items()}
        metrics = {name: value for name, value in named.items() if math.isfinite(value)}
        leading = runtime.fetch(leading)
        moved = {name: own for name, own in leading.items() if np.all(own.value > 0)}
        if runtime.is_writer():
            metrics |= self.history.turning(number, moved)
        return metrics, direction_arrays(moved)

    def _group(self, batch: UpdateBatch) -> int | None:
        """Return how many adjacent rows answer one prompt, where they are compared."""
        group = self.setup.settings.rollout.completions_per_prompt
        alone = self.setup.settings.method != "rl" or group < 2
        return None if alone or len(batch.tokens) % group else group

    def _alignment(self, params: Params, batch: UpdateBatch) -> dict[str, float]:
        """Return how far the kernel of some of a batch's tokens leads where advantages push."""
        mask, length = np.asarray(batch.completion_mask), batch.completion_mask.shape[1]
        rows, columns = np.nonzero(mask & (np.asarray(batch.advantages) != 0))
        if not len(rows):
            return {}
        count = self.settings.kernel_contexts
        some = np.linspace(0, len(rows) - 1, count).round().astype(int)
        rows, columns = rows[some], columns[some] + batch.tokens.shape[1] - length
        tokens, seen = np.asarray(batch.tokens)[rows], np.asarray(batch.mask)[rows]
        contexts = ntk.Contexts(jnp.asarray(tokens), columns - 1, np.arange(count), seen)
        advantages = np.asarray(batch.advantages)[rows, columns - tokens.shape[1] + length]
        found = probe.batch_alignment(
            *(self.setup.policy, params, contexts, tokens[np.arange(count), columns]),
            *(advantages, self.settings.memory_gib),
        )
        return {"probe/advantage_alignment": found}

    @functools.cached_property
    def start_kernel(self) -> dict[str, np.ndarray]:
        """The kernel of the probe's contexts before training."""
        return self._kernel(self.setup.params)

    def _kernel(self, params: Params) -> dict[str, np.ndarray]:
        contexts, settings = self.prober.subset(self.settings.kernel_contexts), self.settings
        given = self.setup.policy, params, contexts, settings.kernel_layers, settings.memory_gib
        return probe.kernel_traces(probe.plan_kernel(*given))

    @property
    def _chunk(self) -> int:
        return self.setup.settings.schedule.chunk_tokens * self.setup.spread

    def _widened(self, batch: UpdateBatch) -> UpdateBatch:
        """Pad to the longest prompts and completions there can be: one shape, compiled once."""
        settings, length = self.setup.settings, batch.completion_mask.shape[1]
        after = settings.rollout.max_completion_tokens - length
        before = settings.data.max_prompt_tokens - (batch.tokens.shape[1] - length)
        fills = {"tokens": self.setup.tokenizer.pad_token_id}

        def wide(name: str, leaf: Array | None) -> Array | None:
            if leaf is None:
                return None
            left = before if name in ("tokens", "mask") else 0
            sides = [(0, 0), (left, after)] + [(0, 0)] * (leaf.ndim - 2)
            pad = np.pad if isinstance(leaf, np.ndarray) else jnp.pad
            return pad(leaf, sides, constant_values=fills[name] if name in fills else 0)

        return batch.replace(**{name: wide(name, leaf) for name, leaf in batch.items()})

    def _account(
        self, step: Seen, placed: UpdateBatch, actual: np.ndarray, name: str, stage: int
    ) -> dict[str, float]:
        batch, read = step.batch, self.ledgers[stage].read

        taken = attribution.OptimizerStep(
            step.before, step.after.params, placed, step.reference, step.gradients
        )
        noises = []

        def account(*where: Any) -> dict[str, np.ndarray]:
            *probed, actual_O2 = where
            found = read(taken, *probed, actual_O2.T)
            noises.append(found.noise)
            return found.arrays

        arrays = self.prober.map_blocks(account, actual)
        if step.shares is not None:
            arrays = attribution.split_term(arrays, "policy", "kl", step.shares)
        advantages_B = _means(batch.advantages, batch.completion_mask)
        by_sample = self.settings.ledger_by == "sample"
        given = (advantages_B, self._own(batch)) if by_sample else ()
        if runtime.is_writer():
            told = self._told(batch, advantages_B, self.programs[stage].stage.name)
            runtime.save_text(self.directory / "ledger" / f"{name}.json", json.dumps(told))
            runtime.save_arrays(self.directory / "ledger" / f"{name}.npz", arrays)
        metrics = attribution.ledger_measures(arrays, *given)
        if by_sample:
            noise = {f"signal/{name}": float(v) for name, v in noises[0]._asdict().items()}
            metrics |= {name: value for name, value in noise.items() if math.isfinite(value)}
        return metrics

    def _ledger(self, program: update.StageProgram) -> attribution.Ledger:
        return attribution.Ledger(
            *(self.setup.policy, self.source.terms, program.optimizer, program.trained),
            groups=self.settings.ledger_groups,
            by=self.settings.ledger_by,
            memory_gib=self.settings.memory_gib,
            microbatches=self.setup.settings.schedule.microbatches,
            mesh=self.setup.mesh,
        )

    def _fits(self, state: TrainState, program: update.StageProgram) -> bool:
        """Tell whether a ledger's copies fit the device; said once where they do not."""
        free = _free_bytes(jax.local_devices()[0])
        chosen, _ = trees.partition(state.params, program.trained)
        one = sum(_bytes_here(leaf) for leaf in jax.tree.leaves(chosen))
        needed = COPIES * one + self.settings.memory_gib * 2**30
        fits = free is None or needed < free
        if not fits and not self.refused:
            self.refused = True
            runtime.log(
                f"no ledger: it needs about {needed / 2**30:.1f} GiB on a device beside training, "
                f"{free / 2**30:.1f} are free; lower probe.memory_gib, spread the params "
                "over more devices, or set probe.ledger_every_steps=None."
            )
        return all(runtime.allgather_object("whether a ledger fits", fits))

    def _own(self, batch: UpdateBatch) -> np.ndarray | None:
        """Tell which samples answer the probe token's own prompt; None where none does."""
        probes = self.probes.held
        asked_S, asked_B = (
            prompt_ids(one.tokens, one.mask, one.completion_mask.shape[1])
            for one in (probes, batch)
        )
        own_OB = np.asarray([[prompt == other for other in asked_B] for prompt in asked_S], bool)[
            np.asarray(self.prober.rows)
        ]
        return own_OB if own_OB.any() else None

    def _told(self, batch: UpdateBatch, advantages: np.ndarray, stage: str) -> dict[str, Any]:
        tokenizer, length = self.setup.tokenizer, batch.completion_mask.shape[1]
        end = tokenizer.eos_token_id
        texts, _ = data.decode_completions(tokenizer, batch.tokens, batch.completion_mask, end)
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


def bare(batch: Any) -> Any:
    """Return a batch as a step takes it that makes no account: in which the KL is no part apart."""
    return batch.replace(kl_advantages=None) if isinstance(batch, UpdateBatch) else batch


def kl_shares(batch: UpdateBatch) -> np.ndarray | None:
    """Return which share `[B]` of each sample's advantage the KL in the reward has, if it is one.

    A sample without an advantage has a share of 0. None where the batch does not tell the KL's
    part, where advantages differ along a completion, and where they are not all that pulls.
    """
    if batch.kl_advantages is None or batch.penalties is not None:
        return None
    mask, parts_B = np.asarray(batch.completion_mask), []
    for leaf in (batch.advantages, batch.kl_advantages):
        low_B = np.min(leaf, axis=1, where=mask, initial=np.inf)
        high_B = np.max(leaf, axis=1, where=mask, initial=-np.inf)
        if np.any(low_B < high_B):
            return None
        parts_B.append(np.where(mask.any(axis=1), high_B, 0))
    whole_B, part_B = parts_B
    return np.divide(part_B, whole_B, out=np.zeros_like(part_B), where=whole_B != 0)


def _means(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    counts = np.maximum(np.sum(mask, axis=1), 1)
    return np.sum(np.where(mask, values, 0), axis=1) / counts


def _on_device(leaf: Array) -> Array:
    """Return an array that may have waited on the host."""
    return jax.device_put(leaf, leaf.sharding.with_memory_kind("device"))


def _bytes_here(leaf: Array) -> int:
    return leaf.addressable_shards[0].data.nbytes


def _free_bytes(device: jax.Device) -> int | None:
    """Return how much memory a device has left, or None where it does not say."""
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats["bytes_in_use"]
