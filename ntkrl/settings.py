"""Config sections as frozen dataclasses, checked when read: below here there is no ConfigDict."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from ntkrl import models, report, rollout, runtime, update
from ntkrl.data import DataSettings, split_names
from ntkrl.probe import ProbeSettings
from ntkrl.update.settings import ScheduleSettings, read_stages

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
METHODS = ("rl", "sft", "reward")
HEADLINES = {"rl": "reward", "sft": "loss", "reward": "accuracy"}
"""The metric that a run shows and ranks checkpoints by, by method."""
NAME = re.compile(r"\w[\w.-]*")


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """Where the starting model comes from.

    path: Hugging Face directory, or None for a new model.
    architecture, new: class name and config.json entries of a new model.
    dtype: of the params (masters); float32, bfloat16 or float16.
    compute_dtype: the network runs in, or None for `dtype`.
    untie: give a tied head a copy of its own.
    remat: what the backward pass makes again: "none", "products" (all of a layer but its products
        with weights) or "all" (the whole layer).
    lora: rank (0 for no adapters), alpha and modules of models.Lora.
    template: chat template given to the tokenizer (see data.read_template), or None.
    vocab_size: rows of the vocabulary, or None for what the model and the tokenizer need.
    whiten: JSONL of texts (prompt, completion) on whose tokens features are made diverse
        (see models.whitened), or None.
    """

    path: str | None
    architecture: str
    new: dict[str, Any]
    dtype: str
    compute_dtype: str | None
    untie: bool
    remat: str
    lora: dict[str, Any]
    template: str | None
    vocab_size: int | None
    whiten: str | None

    def __post_init__(self):
        if self.untie and self.lora["rank"]:
            raise ValueError(
                "model.untie and model.lora do not go together; untie and export first."
            )
        if self.remat not in models.REMAT:
            raise ValueError(f"model.remat {self.remat!r} is not among {', '.join(models.REMAT)}.")
        for name in ("dtype", "compute_dtype"):
            value = getattr(self, name)
            if value not in DTYPES and not (value is None and name == "compute_dtype"):
                raise ValueError(f"model.{name} {value!r} is not among {', '.join(DTYPES)}.")


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    """Held-out evaluation.

    every_steps: rollout steps between evaluations, or None for none.
    prompts: held-out prompts read (at most; all if fewer).
    samples_per_prompt: k of pass@k and of the distinct counts.
    repeats: independent samplings; their spread is the noise of the measurement.
    success_threshold: a completion with at least this reward counts as solved.
    temperature: of these samples, ≥ 0 (0: greedy); None for rollout's.
    base: samples of an earlier evaluation on the same prompts that these are compared with
        (evaluations/NAME.jsonl, with NAME.rewards.json beside it), or None.
    name: of what `evaluate` writes, or None for the model directory's.
    """

    every_steps: int | None
    prompts: int
    samples_per_prompt: int
    repeats: int
    success_threshold: float
    temperature: float | None
    base: str | None
    name: str | None

    def __post_init__(self):
        problems = []
        if self.name is not None and not NAME.fullmatch(self.name):
            problems.append(f"eval.name must be letters, digits, - . and _, not {self.name!r}")
        for name in ("every_steps", "prompts", "samples_per_prompt", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"eval.{name} must be ≥ 1, not {value}")
        if self.temperature is not None and not self.temperature >= 0:
            problems.append(f"eval.temperature must be ≥ 0 or None, not {self.temperature}")
        if problems:
            raise ValueError("; ".join(problems) + ".")


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
    """How completions are drawn in training (see rollout.SamplerSettings).

    stop: strings that end a completion; they are part of it.
    cache_dtype: of keys and values while sampling, or None for the network's.
    gather_params: sample from a copy of the params that is not spread over fsdp.
    engine: "FILE.py:NAME" of a sampler outside this package (see rollout/external.py), or None.
    """

    completions_per_prompt: int
    max_completion_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    stop: tuple[str, ...]
    cache_dtype: str | None
    gather_params: bool
    engine: str | None

    def __post_init__(self):
        problems = []
        if not self.temperature > 0:
            problems.append(
                f"rollout.temperature must be > 0, not {self.temperature}: a greedy sampler gives "
                "groups of equal completions; for greedy evaluation set eval.temperature=0"
            )
        if self.cache_dtype is not None and self.cache_dtype not in DTYPES:
            problems.append(
                f"rollout.cache_dtype {self.cache_dtype!r} is not among {', '.join(DTYPES)}"
            )
        if not all(self.stop):
            problems.append("rollout.stop holds an empty string")
        checked = dataclasses.asdict(self)
        del checked["stop"], checked["cache_dtype"], checked["engine"]
        try:
            rollout.SamplerSettings(eos_id=0, pad_id=0, **checked)
        except ValueError as error:
            problems.append(str(error).rstrip("."))
        if problems:
            raise ValueError("; ".join(problems) + ".")


@dataclasses.dataclass(frozen=True)
class RewardSettings:
    """Where rewards come from.

    functions: `(specification, weight)` pairs; none for supervised runs without a reward.
    timeout: seconds a call of a user's function may take.
    on_failure: reward of every row of a failed call, or None to stop.
    normalisation: file of precomputed rewards, or None.
    dtype, batch_size: of reward models.
    options: `{built-in function: {argument: value}}`.
    """

    functions: tuple[tuple[str, float], ...]
    timeout: float
    on_failure: float | None
    normalisation: str | None
    dtype: str
    batch_size: int
    options: dict[str, dict[str, Any]]

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"reward.dtype {self.dtype!r} is not among {', '.join(DTYPES)}.")
        if not self.timeout > 0 or self.batch_size < 1:
            raise ValueError("reward.timeout must be positive and reward.batch_size ≥ 1.")


@dataclasses.dataclass(frozen=True)
class PreferenceSettings:
    """centering_coefficient: λ ≥ 0 of λ (r⁺ + r⁻)² beside the Bradley–Terry loss."""

    centering_coefficient: float

    def __post_init__(self):
        if not self.centering_coefficient >= 0:
            raise ValueError(
                f"preference.centering_coefficient must be ≥ 0, not {self.centering_coefficient}."
            )


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """When checkpoints are saved, and which stay.

    every_steps: rollout steps between checkpoints.
    keep: how many of the newest stay.
    keep_best: how many of the best stay beside them, or None.
    best_metric: what they are ranked by, or None for reward, loss or accuracy, by the method.
    best_mode: "max" or "min", what is better; None for "min" of a loss and "max" of the rest.
    failures: a run stops when so many in a row could not be written.
    """

    every_steps: int
    keep: int
    keep_best: int | None
    best_metric: str | None
    best_mode: str | None
    failures: int

    def __post_init__(self):
        problems = []
        for name in ("every_steps", "keep", "keep_best", "failures"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"checkpoint.{name} must be ≥ 1, not {value}")
        if self.best_metric is not None and not report.is_known(self.best_metric):
            problems.append(
                f"checkpoint.best_metric {self.best_metric!r} is no metric; `ntkrl report "
                "--glossary` lists them"
            )
        if self.best_mode not in ("max", "min", None):
            problems.append(f"checkpoint.best_mode must be max, min or None, not {self.best_mode}")
        if problems:
            raise ValueError("; ".join(problems) + ".")


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Every section of a config, read and checked; problems of all sections in one message."""

    name: str
    seed: int
    method: str
    model: ModelSettings
    data: DataSettings
    rollout: RolloutSettings
    reward: RewardSettings
    preference: PreferenceSettings
    objective: update.Objective
    schedule: ScheduleSettings
    stages: tuple[update.Stage, ...]
    mesh: dict[str, int]
    checkpoint: CheckpointSettings
    evaluation: EvalSettings
    probe: ProbeSettings
    logging: report.LoggingSettings

    @property
    def minibatch_rows(self) -> int:
        """Completions, examples or pairs of an optimizer step."""
        each = self.rollout.completions_per_prompt if self.method == "rl" else 1
        return self.data.prompts_per_step // self.schedule.minibatches * each


def read_settings(config: ConfigDict) -> RunSettings:
    """Read every section.

    Args:
      config: the whole config (see configs/base.py).

    Raises:
      ValueError: everything that is wrong in any section, in one message.
    """
    problems: list[str] = []

    def read(call: Any, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except ValueError as error:
            problems.append(str(error))
            return None

    def section(kind: Any, name: str) -> Any:
        return read(runtime.parse_section, kind, config[name], name)

    if config.method not in METHODS:
        problems.append(f"method {config.method!r} is not among {', '.join(METHODS)}.")
    found = RunSettings(
        name=config.name,
        seed=config.seed,
        method=config.method,
        model=section(ModelSettings, "model"),
        data=section(DataSettings, "data"),
        rollout=section(RolloutSettings, "rollout"),
        reward=read(_rewards, config),
        preference=section(PreferenceSettings, "preference"),
        objective=read(_objective, config),
        schedule=section(ScheduleSettings, "schedule"),
        stages=read(read_stages, config),
        mesh=config.mesh.to_dict(),
        checkpoint=section(CheckpointSettings, "checkpoint"),
        evaluation=section(EvalSettings, "eval"),
        probe=section(ProbeSettings, "probe"),
        logging=section(report.LoggingSettings, "logging"),
    )
    if config.method == "reward" and config.data.path is None:
        problems.append("data.path is missing; name the preferences to learn from.")
    if config.method in ("rl", "reward") and config.model.path is None:
        problems.append("model.path is missing; name the Hugging Face directory to start from.")
    if config.method != "sft" and config.data.packing:
        problems.append(
            "data.packing is for given completions (method sft); set it to False for "
            f"{config.method}."
        )
    if not problems:
        problems += _division_problems(found)
    if not problems:
        problems += _missing_beside(found)
    if problems:
        raise ValueError("\n".join(problems))
    return found


def _division_problems(found: RunSettings) -> list[str]:
    prompts, schedule = found.data.prompts_per_step, found.schedule
    if prompts % schedule.minibatches:
        return [
            f"schedule.minibatches = {schedule.minibatches} must divide "
            f"data.prompts_per_step = {prompts}."
        ]
    rows = found.minibatch_rows
    if rows % schedule.microbatches:
        return [
            f"schedule.microbatches = {schedule.microbatches} must divide the {rows} rows of a "
            "minibatch."
        ]
    return []


def _missing_beside(found: RunSettings) -> list[str]:
    """List settings that need another one."""
    problems, kept = [], found.checkpoint
    if found.rollout.engine and found.objective.correction == "off":
        problems.append(
            "rollout.engine draws with another program's arithmetic: set objective.correction to "
            "truncate or mask."
        )
    evaluated = kept.best_metric is not None and kept.best_metric.startswith("eval/")
    if kept.keep_best is not None and evaluated and found.evaluation.every_steps is None:
        problems.append(
            f"checkpoint.best_metric {kept.best_metric!r} is never measured: set eval.every_steps."
        )
    return problems


def _rewards(config: ConfigDict) -> RewardSettings:
    given = config.reward.to_dict()
    functions = _functions(config, given.pop("function"), given.pop("weights"))
    return runtime.parse_section(RewardSettings, {"functions": functions, **given}, "reward")


def _functions(
    config: ConfigDict, given: str | None, weights: Any
) -> tuple[tuple[str, float], ...]:
    if given is None:
        if config.method == "rl":
            raise ValueError("reward.function is missing; name one, such as my_rewards.py:score.")
        return ()
    specs = split_names(given)
    weights = (1.0,) * len(specs) if weights is None else tuple(weights)
    if len(weights) != len(specs):
        raise ValueError(
            f"reward.weights has {len(weights)} entries for {len(specs)} reward functions; give "
            "one each, or None for 1.0 each."
        )
    return tuple(zip(specs, weights, strict=True))


def _objective(config: ConfigDict) -> update.Objective:
    """Take the preset's row and replace what the config sets (None keeps the preset's value)."""
    given = config.objective.to_dict()
    preset = given.pop("preset")
    if preset not in update.PRESETS:
        raise ValueError(
            f"objective.preset {preset!r} is not among {', '.join(sorted(update.PRESETS))}."
        )
    set_here = {name: value for name, value in given.items() if value is not None}
    whole = dataclasses.asdict(update.PRESETS[preset]) | set_here
    return runtime.parse_section(update.Objective, whole, "objective")


def best_of(settings: CheckpointSettings, headline: str) -> runtime.Best | None:
    """Return how checkpoints are ranked, or None where only the newest are kept.

    Args:
      settings: the config's section.
      headline: the metric where it names none.
    """
    if settings.keep_best is None:
        return None
    metric = headline if settings.best_metric is None else settings.best_metric
    mode = settings.best_mode
    if mode is None:
        mode = "min" if metric.split("/")[-1] == "loss" else "max"
    return runtime.Best(settings.keep_best, metric, mode)
