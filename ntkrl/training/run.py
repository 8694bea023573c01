"""A training run: checks of its directory, its parts, the loop, and the exported models."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ntkrl import report, runtime, update
from ntkrl.runtime import PreemptionNotice
from ntkrl.settings import RunSettings, read_settings
from ntkrl.setup import (
    NO_INPUTS,
    Inputs,
    RunSetup,
    describe_adapters,
    set_up,
    training_facts,
    warn_of_prompts,
)
from ntkrl.training import device_memory, run_summary
from ntkrl.training.checkpointing import is_finished
from ntkrl.training.loop import Loop
from ntkrl.training.step_functions import StepFunctions

EXPORTS = ("export", "adapter", "export_reference", "export_reference-adapter")
"""Directories of exported models, as far as a run has them."""
FINISHED = "finished"
"""File of a run directory that says that the run is finished."""


def train(config: ConfigDict, inputs: Inputs | None = None) -> Path:
    """Run or resume a training run; return its directory.

    Args:
      config: see configs/base.py.
      inputs: values of a program that calls this and goes on afterwards; None for the command
        line, where a second signal ends the process.

    Raises:
      ValueError: a mistake in the config or its files, a reward that fails, a loss not finite, or
        another process that writes into the directory.
      OSError: the disk is full.
      PreemptedError: a signal was received, or `on_step` returned "stop"; the run was saved
        after the current rollout step.
    """
    settings, directory = read_settings(config), Path(config.run_dir)
    values, alone = runtime.to_json(config), inputs is None or runtime.is_distributed()
    done = None if runtime.is_longer(directory, values) else FINISHED
    lock = runtime.locked(directory, "train", done)
    with PreemptionNotice(alone) as notice, lock, run_summary.compile_notices():
        runtime.check_consistent("config", values)
        if runtime.is_writer():
            runtime.clear_untrained(directory, values)
        runtime.allgather_object("the run directory as it is", None)
        with runtime.unclaimed(directory):
            loop = _prepare(values, settings, NO_INPUTS if inputs is None else inputs, notice)
        return directory if loop is None else _run(loop)


def _prepare(
    values: dict[str, Any], settings: RunSettings, inputs: Inputs, notice: PreemptionNotice
) -> Loop | None:
    """Check the run directory, set up the run and claim its directory; None if it is finished."""
    directory = Path(values["run_dir"])
    changes = runtime.check_run_dir(directory, values)
    longer = runtime.is_longer(directory, values)
    if is_finished(directory, changes is not None, longer):
        runtime.log(f"{directory} is finished; give it more steps, or remove it to run again.")
        return None
    for change in changes or ():
        runtime.log(f"the config has changed: {change}")
    for warning in update.rate_warnings(settings.stages):
        runtime.log(warning)
    report.check_loggers(settings.logging)
    setup = _load(settings, directory, inputs)
    setup.model.check_exports(directory / "export", directory / "export_reference")
    runtime.log(run_summary.describe_start(setup, directory))
    loop = Loop(setup, directory, values, notice, inputs.on_step)
    if runtime.is_writer():
        if longer:
            (directory / FINISHED).unlink(missing_ok=True)
        runtime.claim_run_dir(directory, values)
        inputs.save()
        runtime.record_start(directory, run_summary.start_facts(setup))
    device_memory.save_layout(setup, directory)
    runtime.check_shared(directory)
    return loop


def _load(settings: RunSettings, directory: Path, inputs: Inputs) -> RunSetup:
    """Load the parts of a run, in microbatches that fit the devices."""
    setup = set_up(settings, directory, inputs)
    warn_of_prompts(setup)
    return device_memory.fit(setup, directory)


def _run(loop: Loop) -> Path:
    """Train to the end, and export."""
    setup, settings, directory = loop.setup, loop.setup.settings, loop.directory
    for sentence in describe_adapters(setup.model, loop.steps.bound_stages):
        runtime.log(sentence)
    rollout_steps = loop.run()
    facts = training_facts(settings, rollout_steps)
    setup.model.export(directory / "export", loop.at.state.params, facts)
    setup.model.export(directory / "export_reference", loop.at.reference, facts)
    if loop.lines is not None:
        report.mark_finished(directory, rollout_steps, loop.lines, EXPORTS)
        runtime.log(run_summary.describe_end(setup, directory))
    return directory


def open_steps(config: ConfigDict, inputs: Inputs) -> StepFunctions:
    """Return the functions of a run's steps, for a loop of the calling program.

    The run directory gets the config, prompts, the probe set, readings of it and ledgers.

    Args:
      config: see configs/base.py.
      inputs: values of the calling program.

    Raises:
      ValueError: a mistake in the config or its files, a method without rollouts, or a directory
        of another run or of one that `train` took steps of.
    """
    settings = read_settings(config)
    if not settings.method.samples:
        raise ValueError(
            f"steps are those of RL: sample, reward, weigh; method {settings.method.name!r} has "
            "none. Use ntkrl.train."
        )
    directory, values = Path(config.run_dir), runtime.to_json(config)
    runtime.check_run_dir(directory, values)
    if (directory / "metrics.jsonl").exists():
        raise ValueError(
            f"{directory} is the run of a training command, whose probes and ledgers a loop of "
            "your own would replace; give it another run_dir."
        )
    setup = _load(settings, directory, inputs)
    steps = StepFunctions(setup, directory)
    if runtime.is_writer():
        runtime.claim_run_dir(directory, values)
        inputs.save()
        runtime.record_start(directory, run_summary.start_facts(setup))
    if steps.probe_hook is not None:
        steps.probe_hook.write_set()
    return steps
