"""Score a model on held-out prompts, and take a checkpoint of a run as a Hugging Face directory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from ntkrl import reward, runtime
from ntkrl.evaluation import evaluate_policy, make_evaluation_sample, mean_interval
from ntkrl.generate import Collected
from ntkrl.settings import HEADLINES, RunSettings, best_of, read_settings
from ntkrl.setup import Setup, assemble, assemble_model
from ntkrl.types import Params

EVALUATE_STREAM = 3


def evaluate(
    config: ConfigDict, run: str | None = None, step: int | str | None = None
) -> dict[str, float]:
    """Sample and reward completions of the held-out prompts; print and save what was found.

    Writes `evaluations/NAME.json` (metrics), `evaluations/NAME.jsonl` (every sample with its
    reward) and `evaluations/NAME.rewards.json` (rewards by function, before weights and
    normalisation: what `reward.normalisation` reads) under the run directory, NAME being
    `eval.name`, else the model directory's name, or the run's with the step.

    Args:
      config: see configs/base.py; `model.path`, `data`, `reward`, `rollout` and `eval` count.
      run: run directory whose checkpoint is scored, or None for the model of `model.path`.
      step: of the checkpoint, as in `export`.

    Returns:
      The `eval/…` and `diversity/…` metrics, with `_low` and `_high` ends of intervals.

    Raises:
      ValueError: a mistake in the config or the files it names, nothing to evaluate on, or what
        `export` raises.
    """
    settings = read_settings(config)
    if settings.method == "reward":
        raise ValueError("evaluate samples completions; a reward model's accuracy is in its run.")
    if run is None and settings.model.path is None:
        raise ValueError("evaluate needs --config.model.path=DIR or --run=RUN, the model to score.")
    directory = Path(config.run_dir)
    held = None if run is None else _Held(run, settings, step)
    setup = assemble(settings, directory)
    if setup.held_out is None:
        raise ValueError(
            "there is nothing to evaluate on: set eval.every_steps, reward.function and either "
            "data.eval_path or data.held_out."
        )
    sample = make_evaluation_sample(setup)
    key = jax.random.fold_in(jax.random.key(settings.seed), EVALUATE_STREAM)
    params = setup.params if held is None else held.restore(setup.params)
    shown = runtime.is_writer()
    metrics, evaluated = evaluate_policy(setup, sample, params, key, progress=shown)
    for name, values in evaluated.by_prompt.items():
        metrics |= mean_interval(name, values)
    if runtime.is_writer():
        name = settings.evaluation.name
        if name is None:
            name = _label(settings.model.path) if held is None else held.name
        path = directory / "evaluations" / f"{name}.json"
        _write(setup, path, metrics, evaluated.collected)
    return metrics


def _write(
    setup: Setup,
    path: Path,
    metrics: dict[str, float],
    collected: list[Collected],
) -> None:
    """Write the files of an evaluation, and print its metrics."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".jsonl").open("w", encoding="utf-8") as file:
        for repeat, found in enumerate(collected):
            for row in _samples(setup, found, repeat):
                file.write(json.dumps(row) + "\n")
    functions = collected[0].result.per_function
    by_function = {
        name: np.concatenate([found.result.per_function[name] for found in collected])
        for name in functions
    }
    reward.write_rewards(path.with_suffix(".rewards.json"), by_function)
    # JSON has neither NaN nor infinity
    plain = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    # last, and whole: an evaluation that is there is finished
    runtime.save_text(path, json.dumps(plain, indent=2, sort_keys=True) + "\n")
    settings = setup.settings.evaluation
    print(_table(metrics))
    drawn = settings.samples_per_prompt * settings.repeats
    prompts = len(collected[0].texts) // settings.samples_per_prompt
    against = "" if settings.base is None else f" against {settings.base}"
    print(f"{prompts} prompts × {drawn} samples{against}; intervals: 95 %, bootstrap over prompts")
    print(f"samples: {path.with_suffix('.jsonl')}, rewards: {path.with_suffix('.rewards.json')}")


def _table(metrics: dict[str, float]) -> str:
    """Lay metrics out with their intervals."""
    lines = []
    for name, value in metrics.items():
        line = f"{name:28s} {value:10.4f}"
        if f"{name}_low" in metrics:
            low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
            line += f"    {low:.4f} to {high:.4f}"
        if not name.endswith(("_low", "_high")):
            lines.append(line)
    return "\n".join(lines)


def export(run: str, out: str, step: int | str | None = None) -> None:
    """Write a checkpoint of a run as a full Hugging Face directory.

    Args:
      run: run directory.
      out: directory to write.
      step: rollout step of a checkpoint that was kept, "best", or None for the newest.

    Raises:
      ValueError: no run there, no such checkpoint, or a damaged one.
    """
    settings = read_settings(config_of(run))
    held = _Held(run, settings, step)
    start = assemble_model(settings, Path(run))
    start.export(Path(out), held.restore(start.params))
    tqdm.write(f"step {held.step} of {run} written to {out}")


def config_of(run: str) -> ConfigDict:
    """Return the config of a run, for all devices here, which need not be those of the run.

    Raises:
      ValueError: no run there.
    """
    path = Path(run) / "config.json"
    if not path.is_file():
        raise ValueError(f"{run} is no run directory: it has no config.json.")
    config = runtime.from_json(json.loads(path.read_text(encoding="utf-8")))
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    config.run_dir = run
    return config


class _Held:
    """A checkpoint of a run; step: its rollout step."""

    def __init__(self, run: str, settings: RunSettings, step: int | str | None):
        best = best_of(settings.checkpoint, HEADLINES[settings.method])
        if step == "best" and best is None:
            raise ValueError(
                f"{run} ranks no checkpoints; train with --config.checkpoint.keep_best=1."
            )
        given = Path(run) / "checkpoints", settings.checkpoint.keep, best
        self.run, self.checkpoints = run, runtime.Checkpoints(*given, reading=True)
        held, chosen = self.checkpoints.steps(), step
        if step is None or step == "best":
            chosen = self.checkpoints.latest() if step is None else self.checkpoints.best_step()
        self.listed = f"kept are: {', '.join(map(str, held)) if held else 'none'}."
        if chosen not in held:
            raise ValueError(f"{run} has no checkpoint of step {chosen}; {self.listed}")
        self.step = chosen

    @property
    def name(self) -> str:
        """How its evaluation is called."""
        return f"{Path(self.run).resolve().name}-step-{self.step}"

    def restore(self, like: Params) -> Params:
        """Read the params, once."""
        try:
            return self.checkpoints.restore_params(self.step, like)
        except runtime.CorruptCheckpointError as error:
            raise ValueError(
                f"step {self.step} of {self.run} is damaged ({error}); {self.listed}"
            ) from error
        finally:
            self.checkpoints.close()


def _samples(setup: Setup, found: Collected, repeat: int) -> list[dict[str, Any]]:
    prompts = setup.held_out.prompt_set.prompts
    group = setup.settings.evaluation.samples_per_prompt
    rewards = found.result.rewards
    return [
        {
            "prompt": prompts[i // group],
            "completion": text,
            "reward": float(rewards[i]),
            "repeat": repeat,
        }
        for i, text in enumerate(found.texts)
    ]


def _label(path: str) -> str:
    """Name a model by its directory, `runs/x/export` by its run."""
    place = Path(path).resolve()
    return place.parent.name if place.name == "export" else place.name
