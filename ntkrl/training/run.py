"""A training run: checks of its directory, its parts, the loop, and the exported models."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ntkrl import report, runtime, trees, update
from ntkrl.runtime import PreemptionNotice
from ntkrl.settings import RunSettings, read_settings
from ntkrl.setup import RunSetup, set_up, training_facts
from ntkrl.training import device_memory
from ntkrl.training.checkpointing import is_finished
from ntkrl.training.loop import Loop

EXPORTS = ("export", "adapter", "export_reference", "export_reference-adapter")
"""Directories of exported models, as far as a run has them."""


def train(config: ConfigDict) -> Path:
    """Run or resume a training run; return its directory.

    Args:
      config: see configs/base.py.

    Raises:
      ValueError: a mistake in the config or its files, a reward that fails, a loss not finite, or
        another process that writes into the directory.
      OSError: the disk is full.
      PreemptedError: a signal was received; the run was saved after the current rollout step.
    """
    settings = read_settings(config)
    with PreemptionNotice() as notice, runtime.locked(Path(config.run_dir), "train", "finished"):
        return _train(config, settings, notice)


def _train(config: ConfigDict, settings: RunSettings, notice: PreemptionNotice) -> Path:
    directory = Path(config.run_dir)
    values = runtime.to_json(config)
    runtime.check_consistent("config", values)
    changes = runtime.check_run_dir(directory, values)
    if is_finished(directory, changes is not None):
        runtime.log(f"{directory} is finished; remove it to run again.")
        return directory
    for change in changes or ():
        runtime.log(f"the config has changed: {change}")
    report.check_loggers(settings.logging)
    setup = device_memory.fit(set_up(settings, directory), directory)
    setup.model.check_exports(directory / "export", directory / "export_reference")
    settings = setup.settings
    loop = Loop(setup, directory, values, notice)
    if runtime.is_writer():
        runtime.claim_run_dir(directory, values)
        runtime.record_start(directory, _start_facts(setup))
    device_memory.save_layout(setup, directory)
    runtime.check_shared(directory)
    if settings.method.samples:
        runtime.log(f"objective: {update.describe(settings.objective)}")
    rollout_steps = loop.run()
    facts = training_facts(settings, rollout_steps)
    setup.model.export(directory / "export", loop.state.params, facts)
    setup.model.export(directory / "export_reference", loop.reference, facts)
    if loop.lines is not None:
        report.mark_finished(directory, rollout_steps, loop.lines, EXPORTS)
    return directory


def _start_facts(setup: RunSetup) -> dict[str, Any]:
    """Return the facts of a run that the report names and its config does not hold."""
    parameters = sum(leaf.size for leaf in trees.named_leaves(setup.model.params).values())
    if not setup.settings.method.samples:
        return {"parameters": parameters}
    return {"parameters": parameters, "objective": update.describe(setup.settings.objective)}
