"""Lines about a run for its terminal: before the first step, and after the last."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ntkrl import report, runtime, trees, update
from ntkrl.setup import RunSetup

COMPILED_PARTS = {
    "init": "the new model",
    "make": "the optimizer's state",
    "constrained": "the update",
    "_log_probs": "the scoring of completions",
    "_statistics": "the scoring of completions",
    "score": "the reward model",
    "loss": "the evaluation",
} | dict.fromkeys(
    (
        *("decode_params", "prefill", "decode_chunk", "compact", "grow_cache", "truncate"),
        *("longest", "rollout"),
    ),
    "the sampler",
)
"""Parts of a run by the name of the jitted function; all other functions are the probe's."""
OTHER_PART = "the probe"
HEADLINES = (
    *("eval/reward", "eval/pass@1", "eval/pass@k", "eval/distinct_solutions"),
    *("eval/distinct_completions", "eval/accuracy", "eval/margin"),
    *("probe/entropy", "probe/confidence"),
)
"""Metrics that a run is judged by, as far as it has them."""


def compile_notices() -> runtime.CompileNotices:
    """Return a context that announces the long compilations of a run."""
    return runtime.CompileNotices(COMPILED_PARTS, OTHER_PART)


def describe_start(setup: RunSetup, directory: Path) -> str:
    """Return the lines that say what a run will do, and where it writes.

    Raises:
      ValueError: stages that do not fit the model.
    """
    settings, model = setup.settings, setup.model
    bound_stages = update.bind_stages(
        setup.stages, model.network, model.params, settings.schedule.updates
    )
    rows = {"model": _model(setup), "data": _data(setup)}
    if settings.reward.functions:
        names = [
            name if weight == 1.0 else f"{weight:g} × {name}"
            for name, weight in settings.reward.functions
        ]
        rows["rewards"] = " + ".join(names)
    if settings.method.samples:
        rows["objective"] = update.describe(settings.objective)
    lines = [f"{name:10}{text}" for name, text in rows.items()]
    for number, stage in enumerate(bound_stages):
        label = "" if number else "stages"
        lines.append(f"{label:10}{_stage(stage, setup)}")
    lines.append(f"{'devices':10}{_devices(model.mesh)}")
    if settings.method.samples and dict(model.rollout_mesh.shape) != dict(model.mesh.shape):
        if model.mesh.size > 1:
            lines.append(f"{'':10}sampling on mesh {_mesh(model.rollout_mesh)}")
    lines.append(f"{'writes':10}{directory}")
    return "\n".join(lines)


def start_facts(setup: RunSetup) -> dict[str, str]:
    """Return the facts of a run that its report names and its config does not hold."""
    facts = {"model": _model(setup), "data": _data(setup)}
    if setup.settings.method.samples:
        facts["objective"] = update.describe(setup.settings.objective)
    return facts


def describe_end(setup: RunSetup, directory: Path) -> str:
    """Return the lines that say what a finished run has reached, and the next commands."""
    lines = [f"exported to {directory / 'export'}"]
    changes = [*_changes(setup, directory)]
    if changes:
        width = max(len(name) for name, _ in changes)
        lines += ["first and last:", *(f"  {name:{width}}  {text}" for name, text in changes)]
    lines += ["next:", f"  ntkrl report {directory}"]
    if setup.settings.method.reward_model:
        lines.append(f"  ntkrl train --config=rl --model=DIR --reward={directory / 'export'} …")
    elif setup.held_out is not None:
        lines.append(f"  ntkrl evaluate --run={directory}")
    return "\n".join(lines)


def _changes(setup: RunSetup, directory: Path) -> Iterator[tuple[str, str]]:
    """Yield metrics with their first and last values."""
    lines = report.read_metrics(directory)
    for name in (setup.settings.method.headline, *HEADLINES):
        values = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if len(values) > 1:
            (first, start), (last, end) = values[0], values[-1]
            yield name, f"{start:.4g} → {end:.4g} (steps {first} and {last})"


def _model(setup: RunSetup) -> str:
    settings, model = setup.settings, setup.model
    path = settings.model.path
    name = f"new {settings.model.architecture}" if path is None else path
    dtype, compute = settings.model.dtype, settings.network_dtypes[0]
    computed = "" if compute == dtype else f", computed in {compute}"
    return f"{name}: {_count(_sizes(model.params))} parameters in {dtype}{computed}"


def _data(setup: RunSetup) -> str:
    settings, kind = setup.settings, "prompts"
    if not settings.method.samples:
        kind = "pairs" if settings.method.reward_model else "examples"
    name = "built-in task" if settings.data.path is None else settings.data.path
    held_out = "none" if setup.held_out is None else f"{setup.held_out.size:,}"
    text = f"{name}: {setup.train.size:,} {kind}, {held_out} held out; "
    text += f"{settings.data.prompts_per_step} a step"
    if settings.method.samples:
        rollouts = settings.rollout
        text += f" × {rollouts.completions_per_prompt} completions"
        text += f" of ≤ {rollouts.max_completion_tokens} tokens"
    return text


def _stage(bound_stage: update.BoundStage, setup: RunSetup) -> str:
    """Return the length, the optimizer and the trained parameters of a stage."""
    stage, params = bound_stage.stage, setup.model.params
    rows = trees.match([(pattern, i) for i, (pattern, _) in enumerate(stage.parameters)], params)
    leaves = jax.tree.leaves(params)
    total = _sizes(params)
    parts = []
    for number, (pattern, _) in enumerate(stage.parameters):
        trained = [i for i, row in enumerate(rows) if row == number and bound_stage.trained[i]]
        if trained:
            size = sum(leaves[i].size for i in trained)
            name = "all parameters" if size == total else f"{pattern} ({_count(size)})"
            parts.append(f"{name} at {bound_stage.rates[trained[0]]:g}")
    return f"{stage.name}: {stage.max_steps} steps of {stage.optimizer}, {'; '.join(parts)}"


def _devices(mesh: Mesh) -> str:
    kind = mesh.devices.flat[0].device_kind
    return f"{mesh.size} × {kind}" + (f", mesh {_mesh(mesh)}" if mesh.size > 1 else "")


def _mesh(mesh: Mesh) -> str:
    return " × ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1) or "of 1"


def _sizes(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _count(number: int) -> str:
    """Return a number of parameters in thousands, millions or billions."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
