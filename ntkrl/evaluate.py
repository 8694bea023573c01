"""Score a model on held-out prompts, and take a checkpoint of a run as a Hugging Face directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from ntkrl import assembly, reward, runtime

EVALUATE_STREAM = 3


def evaluate(config: ConfigDict) -> dict[str, float]:
    """Sample and reward completions of the held-out prompts; print and save what was found.

    Writes `evaluations/NAME.json` (metrics), `evaluations/NAME.jsonl` (every sample with its
    reward) and `evaluations/NAME.rewards.json` (rewards by function, before weights and
    normalisation: what `reward.normalisation` reads) under the run directory, NAME being the model
    directory's name.

    Args:
      config: see configs/base.py; `model.path`, `data`, `reward`, `rollout` and `eval` count.

    Returns:
      The `eval/…` metrics.

    Raises:
      ValueError: a mistake in the config or the files it names, or nothing to evaluate on.
    """
    settings = assembly.read_settings(config)
    if settings.method == "reward":
        raise ValueError("evaluate samples completions; a reward model's accuracy is in its run.")
    if settings.model.path is None:
        raise ValueError("evaluate needs --config.model.path=DIR, the model to score.")
    directory = Path(config.run_dir)
    setup = assembly.assemble(settings, directory)
    if setup.held_out is None:
        raise ValueError(
            "there is nothing to evaluate on: set eval.every_steps, reward.function and either "
            "data.eval_path or data.held_out."
        )
    sample = assembly.make_evaluation_sample(setup)
    key = jax.random.fold_in(jax.random.key(settings.seed), EVALUATE_STREAM)
    shown = runtime.is_writer()
    metrics, evaluated = assembly.evaluate(setup, sample, setup.params, key, progress=shown)
    if runtime.is_writer():
        _write(
            setup,
            directory / "evaluations" / f"{_label(settings.model.path)}.json",
            metrics,
            evaluated.collected,
        )
    return metrics


def _write(
    setup: assembly.Setup,
    path: Path,
    metrics: dict[str, float],
    collected: list[assembly.Collected],
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
    path.write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name, value in metrics.items():
        print(f"{name:28s} {value:.4f}")
    print(f"samples: {path.with_suffix('.jsonl')}, rewards: {path.with_suffix('.rewards.json')}")


def export(run: str, out: str, step: int | str | None = None) -> None:
    """Write a checkpoint of a run as a full Hugging Face directory.

    Args:
      run: run directory.
      out: directory to write.
      step: rollout step of a checkpoint that was kept, "best", or None for the newest.

    Raises:
      ValueError: no run there, no such checkpoint, or a damaged one.
    """
    directory = Path(run)
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{run} is no run directory: it has no config.json.")
    config = runtime.from_json(json.loads(path.read_text(encoding="utf-8")))
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}  # of the devices here, not the run's
    settings = assembly.read_settings(config)
    best = assembly.best_of(settings.checkpoint, assembly.SOURCES[settings.method].headline)
    if step == "best" and best is None:
        raise ValueError(f"{run} ranks no checkpoints; train with --config.checkpoint.keep_best=1.")
    start = assembly.assemble_model(settings, directory)
    given = directory / "checkpoints", settings.checkpoint.keep, best
    checkpoints = runtime.Checkpoints(*given, reading=True)
    held = checkpoints.steps()
    chosen = step
    if step is None or step == "best":
        chosen = checkpoints.latest() if step is None else checkpoints.best_step()
    listed = f"kept are: {', '.join(map(str, held)) if held else 'none'}."
    if chosen not in held:
        raise ValueError(f"{run} has no checkpoint of step {chosen}; {listed}")
    try:
        start.export(Path(out), checkpoints.restore_params(chosen, start.params))
    except runtime.DamagedError as error:
        raise ValueError(f"step {chosen} of {run} is damaged ({error}); {listed}") from error
    checkpoints.close()
    tqdm.write(f"step {chosen} of {run} written to {out}")


def _samples(setup: assembly.Setup, found: assembly.Collected, repeat: int) -> list[dict[str, Any]]:
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
