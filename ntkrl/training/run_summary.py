"""Lines about a run for its terminal: before the first step, and after the last."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ntkrl import report, trees, update
from ntkrl.setup import RunSetup

PROGRAMS = {
    "init": "the new model",
    "decode_params": "the sampler's copy of the parameters",
    "prefill": "the sampler",
    "decode_chunk": "the sampler",
    "compact": "the sampler",
    "grow_cache": "the sampler",
    "truncate": "the sampler",
    "rollout": "the sampler",
    "_log_probs": "the scoring of completions",
    "_statistics": "the scoring of completions",
    "score": "the reward model",
    "constrained": "the update",
    "make": "the optimizer's state",
    "program": "the probe",
    "loss": "the evaluation",
}
"""The programs of a run, in words, by the name of the jitted function."""
HEADLINES = (
    *("eval/reward", "eval/pass@1", "eval/pass@k", "eval/distinct_solutions"),
    *("eval/distinct_completions", "eval/accuracy", "eval/margin"),
    *("probe/entropy", "probe/confidence"),
)
"""Metrics that a run is judged by, as far as it has them."""


def describe_start(
    setup: RunSetup, bound_stages: Sequence[update.BoundStage], directory: Path
) -> str:
    """Return the lines that say what a run will do.

    Args:
      setup: the run.
      bound_stages: its stages.
      directory: that it writes.
    """
    settings, model = setup.settings, setup.model
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


def describe_end(setup: RunSetup, directory: Path) -> str:
    """Return the lines that say what a finished run has reached, and the next commands."""
    lines = [f"exported to {directory / 'export'}"]
    changes = [*_changes(setup, directory)]
    if changes:
        width = max(len(name) for name, *_ in changes)
        lines += [f"  {name:{width}}  {text}" for name, text in changes]
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
        if not values:
            continue
        (first, start), (last, end) = values[0], values[-1]
        if first == last:
            yield name, f"{end:.4g}"
        else:
            yield name, f"{start:.4g} → {end:.4g}   (steps {first} and {last})"


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
