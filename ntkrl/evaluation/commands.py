"""The commands `evaluate` and `export`: score a model or a checkpoint, or write one out."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from ntkrl import data, directory_kinds, durable_files, models, reward, runtime, trees, user_files
from ntkrl.evaluation.comparison import mean_interval
from ntkrl.evaluation.sampling import evaluate_policy, make_evaluation_sampler
from ntkrl.generate import RewardedRollout
from ntkrl.gguf import is_gguf
from ntkrl.json_files import read_object
from ntkrl.json_values import readable
from ntkrl.messages import joined
from ntkrl.settings import RunSettings, read_settings
from ntkrl.setup import (
    NO_INPUTS,
    Inputs,
    RunSetup,
    StartingModel,
    load_starting_model,
    set_up,
    training_facts,
)
from ntkrl.types import Params

EVALUATE_STREAM = 3
"""Stream of keys drawn from a seed, besides those of training."""


def evaluate(
    config: ConfigDict,
    run: str | None = None,
    step: int | str | None = None,
    trusted: bool = False,
    inputs: Inputs = NO_INPUTS,
) -> dict[str, float]:
    """Sample and reward completions of the held-out prompts; print and save the metrics.

    Writes `evaluations/NAME.json` (metrics), `evaluations/NAME.jsonl` (every sample with its
    reward) and `evaluations/NAME.rewards.json` (rewards by function, before weights and
    normalisation: what `reward.normalisation` reads) under the run directory, NAME being
    `eval.name`, else the model directory's name, or the run's with the step.

    Args:
      config: see configs/base.py; `model.path`, `data`, `reward`, `rollout` and `eval` count.
      run: run directory whose checkpoint is scored, or None for the model of `model.path`.
      step: rollout step of the checkpoint, as in `export`.
      trusted: execute the code that the run's config names, whoever wrote it.
      inputs: values of the calling program.

    Returns:
      The `eval/…` and `diversity/…` metrics, with `_low` and `_high` ends of intervals.

    Raises:
      ValueError: a mistake in the config or the files it names, nothing to evaluate on, another
        evaluation of the same name in progress, or what `export` raises.
    """
    settings = read_settings(config) if run is None else _saved_settings(run, config)
    if settings.method.reward_model:
        raise ValueError("evaluate samples completions; a reward model's accuracy is in its run.")
    directory, checkpoint = Path(config.run_dir), None
    if run is not None:
        _check_code(settings, run, trusted)
        checkpoint = SavedParams(run, settings, step)
        label = checkpoint.name
    elif settings.model.path is not None:
        label = _label(settings.model.path)
    else:
        raise ValueError("evaluate needs --config.model.path=DIR or --run=RUN, the model to score.")
    if settings.evaluation.name is not None:
        label = settings.evaluation.name
    _check_replaceable(directory / "evaluations" / f"{label}.json")
    with runtime.locked(directory / "evaluations", "evaluate", name=label):
        setup = set_up(settings, directory, inputs)
        return _evaluate(setup, directory, label, checkpoint)


def _evaluate(
    setup: RunSetup, directory: Path, label: str, checkpoint: "SavedParams | None"
) -> dict[str, float]:
    settings, steps = setup.settings, 0 if checkpoint is None else int(checkpoint.step)
    setup = setup.during(steps * settings.schedule.updates, steps)
    if setup.held_out is None or not settings.evaluates:
        raise ValueError(
            "there is nothing to evaluate on: set eval.every_steps, reward.function and either "
            "data.eval_path or data.held_out."
        )
    sampler = make_evaluation_sampler(settings, setup.model)
    key = jax.random.fold_in(jax.random.key(settings.seed), EVALUATE_STREAM)
    params = setup.model.params
    if checkpoint is not None:
        params = checkpoint.restore(params)
    progress = runtime.is_writer()
    metrics, samples = evaluate_policy(setup, sampler, params, key, progress=progress)
    for name, values in samples.by_prompt.items():
        metrics |= mean_interval(name, values)
    if runtime.is_writer():
        path = directory / "evaluations" / f"{label}.json"
        _write(setup, path, metrics, samples.repeats)
    return metrics


def _check_replaceable(path: Path) -> None:
    """Refuse to replace files of an evaluation that are not those of an earlier one."""

    def is_metrics(text: bytes) -> bool:
        return any(str(name).startswith("eval/") for name in json.loads(text))

    def is_rewards(text: bytes) -> bool:
        return set(json.loads(text)) == {"rewards"}

    def is_samples(text: bytes) -> bool:
        first = text.partition(b"\n")[0]
        return not first or {"prompt", "completion", "reward"} <= set(json.loads(first))

    for suffix, is_ours in (
        (".json", is_metrics),
        (".rewards.json", is_rewards),
        (".jsonl", is_samples),
    ):
        kind = "of an earlier evaluation (eval.name)"
        durable_files.check_replaceable(path.with_suffix(suffix), is_ours, kind)


def export(run: str, out: str, step: int | str | None = None) -> None:
    """Write a checkpoint of a run, or the model of a GGUF file, as a full Hugging Face directory.

    Args:
      run: run directory, or GGUF file.
      out: directory to write.
      step: rollout step of a checkpoint that was kept, "best", or None for the newest.

    Raises:
      ValueError: no run there, no such checkpoint, a damaged one, or an output directory whose
        files would be lost.
    """
    if not directory_kinds.is_run(Path(run)) and directory_kinds.is_run(Path(out)):
        raise ValueError(f"{out} is the run, not {run}: write `ntkrl export {out} {run}`.")
    _check_outside_runs(Path(out))
    if is_gguf(Path(run)):
        if step is not None:
            raise ValueError(f"export: --step names a checkpoint, and {run} is a GGUF file.")
        models.check_target(Path(out), (run,))
        policy, params = models.load(run)
        models.export(out, policy, params)
        tqdm.write(f"{run} written to {out}")
        return
    settings = _saved_settings(run, config_of(run))
    models.check_target(Path(out), (settings.model.path,))
    durable_files.check_place(Path(out).absolute().parent, "the second word of `ntkrl export`")
    model, params, restored = restore(run, step)
    model.export(Path(out), params, training_facts(settings, restored))
    tqdm.write(f"step {restored} of {run} written to {out}")


def restore(run: str, step: int | str | None = None) -> tuple[StartingModel, Params, int]:
    """Return the starting model of a run, the params of a checkpoint and its rollout step.

    Args:
      run: run directory.
      step: as in `export`.

    Raises:
      ValueError: no run there, no such checkpoint, or a damaged one.
    """
    settings = _saved_settings(run, config_of(run))
    checkpoint = SavedParams(run, settings, step)
    model = load_starting_model(settings, Path(run))
    return model, checkpoint.restore(model.params), int(checkpoint.step)


def _check_outside_runs(out: Path) -> None:
    """Refuse to export into a run directory, whose files belong to that run."""
    target = out.resolve()
    for directory in (target, *target.parents):
        if (directory / "config.json").is_file() and (directory / "checkpoints").is_dir():
            raise ValueError(
                f"export: {out} is in the run directory {directory}; give a directory outside of "
                "it."
            )


def config_of(run: str) -> ConfigDict:
    """Return the config of a run, for all devices here, which need not be those of the run.

    Raises:
      ValueError: no run there, or a config.json that is not an object.
    """
    path = Path(run) / "config.json"
    values = read_object(path, finite=False) if path.is_file() else {}
    wrong = directory_kinds.not_a_run(Path(run))
    if wrong is not None:
        raise ValueError(f"{run} {wrong}")
    try:
        config = runtime.from_json(values)
        config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
        config.rollout.mesh = runtime.from_json({"data": None, "tensor": None})
        config.run_dir = run
    except (AttributeError, KeyError, TypeError) as error:  # of ConfigDict
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not the config of a run ({reason}).") from error
    return config


def _check_code(settings: RunSettings, run: str, trusted: bool) -> None:
    """Name the code that a run's own config names, and refuse it if another may have written it."""
    saved = config_of(run)
    named = {*data.split_names(saved.reward.function or ""), saved.rollout.engine}
    used = [*(spec for spec, _ in settings.reward.functions), settings.rollout.engine]
    code = [spec for spec in used if spec in named and spec and ".py:" in spec]
    if code:
        user_files.check_trust(Path(run), code, trusted)
        tqdm.write(f"executing {', '.join(code)}, named by {run}/config.json", file=sys.stderr)


def _saved_settings(run: str, config: ConfigDict) -> RunSettings:
    """Read the settings of a config.json, which may be edited or of another version.

    Raises:
      ValueError: anything wrong with it.
    """
    try:
        return read_settings(config)
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{Path(run) / 'config.json'} is not the config of a run of this version "
            f"({type(error).__name__}: {error}); train the run again."
        ) from error
    except ValueError as error:
        missing = [line for line in str(error).splitlines() if line.endswith("is missing.")]
        if not missing:
            raise
        raise ValueError(
            f"{Path(run) / 'config.json'} lacks settings of this version of ntkrl: {error} Use the "
            "version that wrote the run, or train it again."
        ) from error


class SavedParams:
    """The params in a checkpoint of a run.

    step: rollout step of the checkpoint. name: label of its evaluation.
    """

    def __init__(self, run: str, settings: RunSettings, step: int | str | None):
        ranking = settings.checkpoint.ranking(settings.method.headline)
        if step == "best" and ranking is None:
            raise ValueError(
                f"{run} ranks no checkpoints; train with --config.checkpoint.keep_best=1."
            )
        self.run = run
        self.checkpoints = runtime.Checkpoints(
            Path(run) / "checkpoints", settings.checkpoint.keep, ranking, reading=True
        )
        steps = self.checkpoints.steps()
        if step == "best":
            step = self.checkpoints.best_step()
        elif step is None:
            step = self.checkpoints.latest()
        self.available = f"kept are: {', '.join(map(str, steps)) if steps else 'none'}."
        if step not in steps:
            raise ValueError(f"{run} has no checkpoint of step {step}; {self.available}")
        self.step = step
        self.name = f"{Path(run).resolve().name}-step-{step}"

    def restore(self, template: Params) -> Params:
        """Restore the params, once.

        Args:
          template: arrays or shapes with the structure, dtypes and shardings to restore.
        """
        try:
            params = self.checkpoints.restore_params(self.step, template)
        except runtime.CorruptCheckpointError as error:
            raise ValueError(
                f"step {self.step} of {self.run} is damaged ({error}); {self.available}"
            ) from error
        finally:
            self.checkpoints.close()
        wrong = trees.not_finite(params)
        if wrong:
            raise ValueError(
                f"step {self.step} of {self.run} holds NaN or infinity in "
                f"{joined(wrong, ', ', most=10)}; {self.available}"
            )
        return params


def _write(
    setup: RunSetup, path: Path, metrics: dict[str, float], repeats: list[RewardedRollout]
) -> None:
    """Write the files of an evaluation, and print its metrics."""
    samples_path, rewards_path = path.with_suffix(".jsonl"), path.with_suffix(".rewards.json")
    with durable_files.replacing(samples_path) as file:
        for number, repeat in enumerate(repeats):
            for row in _sample_rows(setup, repeat, number):
                file.write((json.dumps(readable(row), allow_nan=False) + "\n").encode())
    by_function = {
        name: np.concatenate([repeat.result.per_function[name] for repeat in repeats])
        for name in repeats[0].result.per_function
    }
    reward.write_rewards(rewards_path, by_function)
    # JSON has neither NaN nor infinity
    values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    # last and atomically: an evaluation that exists is complete
    durable_files.save_text(path, json.dumps(values, indent=2, sort_keys=True) + "\n")
    settings = setup.settings.evaluation
    print(_table(metrics))
    drawn = settings.samples_per_prompt * settings.repeats
    prompts = len(repeats[0].texts) // settings.samples_per_prompt
    against = "" if settings.base is None else f" against {settings.base}"
    print(f"{prompts} prompts × {drawn} samples{against}; intervals: 95 %, bootstrap over prompts")
    print(f"samples: {samples_path}, rewards: {rewards_path}")


def _sample_rows(setup: RunSetup, rewarded: RewardedRollout, repeat: int) -> list[dict[str, Any]]:
    """Return rows in TRL's formats: the completion of a conversation is a list of messages."""
    prompt_set = setup.held_out_prompts.prompt_set
    group = setup.settings.evaluation.samples_per_prompt
    completions = reward.completion_values(rewarded.texts, prompt_set.conversational)
    return [
        {
            "prompt": prompt_set.prompts[i // group],
            "completion": completion,
            "reward": float(rewarded.result.rewards[i]),
            "repeat": repeat,
        }
        for i, completion in enumerate(completions)
    ]


def _table(metrics: dict[str, float]) -> str:
    """Format metrics with their intervals."""
    lines = []
    for name, value in metrics.items():
        line = f"{name:28s} {value:10.4f}"
        if f"{name}_low" in metrics:
            low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
            line += f"    {low:.4f} to {high:.4f}"
        if not name.endswith(("_low", "_high")):
            lines.append(line)
    return "\n".join(lines)


def _label(path: str) -> str:
    """Return a model directory's name, and the run's for `runs/x/export`."""
    resolved = Path(path).resolve()
    return resolved.parent.name if resolved.name == "export" else resolved.name
