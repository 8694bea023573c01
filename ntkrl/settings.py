"""A config read once into one frozen RunSettings: below here there is no ConfigDict.

Each room owns the dataclass of its section; checks that need two sections are made here.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ntkrl import data, models, probe, report, reward, rollout, runtime, trees, update
from ntkrl.messages import not_among
from ntkrl.numerics import DTYPES

NAME = re.compile(r"\w[\w.-]*")


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train; `training.BATCH_SOURCES` has its batch source.

    name: value of config.method.
    headline: metric that a run shows and ranks checkpoints by.
    columns: names of the columns of the training prompts.
    required: keys of the config that must not be None, each with an entry in MISSING.
    samples: completions are sampled and rewarded, `rollout.completions_per_prompt` of each prompt.
    reward_model: a Scorer is trained; else a Policy, which evaluations and probes sample from.
    """

    name: str
    headline: str
    columns: tuple[str, ...]
    required: tuple[str, ...]
    samples: bool = False
    reward_model: bool = False


METHODS = {
    "rl": Method("rl", "reward", ("prompt",), ("model.path", "reward.function"), samples=True),
    "sft": Method("sft", "loss", ("prompt", "completion"), ()),
    "reward": Method(
        name="reward",
        headline="accuracy",
        columns=("prompt", "chosen", "rejected"),
        required=("data.path", "model.path"),
        reward_model=True,
    ),
}
MOST_SEEDS = 2**32
"""Seeds of a PRNG key: one of more digits would be cut to its last 32 bits."""
MISSING = {
    "data.path": "the preferences to learn from",
    "model.path": "the Hugging Face directory to start from",
    "reward.function": "one, such as my_rewards.py:score",
}


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    """Held-out evaluation; configs/base.py describes the other keys.

    every_steps: rollout steps between evaluations.
    prompts: held-out prompts read (at most; all if fewer).
    samples_per_prompt: k of pass@k and of the distinct counts.
    repeats: independent samplings; their spread is the noise of the measurement.
    success_threshold: a completion with at least this reward counts as solved.
    base: evaluations/NAME.jsonl, with NAME.rewards.json beside it.
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
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            problems.append(f"eval.temperature must be finite, ≥ 0 or None, not {self.temperature}")
        if problems:
            raise ValueError("; ".join(problems) + ".")


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Every section of a config, read and checked."""

    name: str
    seed: int
    method: Method
    model: models.ModelSettings
    data: data.DataSettings
    rollout: rollout.RolloutSettings
    reward: reward.RewardSettings
    preference: update.PreferenceSettings
    objective: update.Objective
    schedule: update.ScheduleSettings
    stages: tuple[update.Stage, ...]
    mesh: dict[str, int]
    checkpoint: runtime.CheckpointSettings
    evaluation: EvalSettings
    probe: probe.ProbeSettings
    logging: report.LoggingSettings

    @property
    def minibatch_rows(self) -> int:
        """Completions, examples or pairs of an optimizer step."""
        group = self.rollout.completions_per_prompt if self.method.samples else 1
        return self.data.prompts_per_step // self.schedule.minibatches * group

    @property
    def network_dtypes(self) -> tuple[str, str]:
        """Dtypes of the network and of the sampler's cache."""
        compute = self.model.compute_dtype or self.model.dtype
        return compute, self.rollout.cache_dtype or compute

    @property
    def log_ratio_tolerance(self) -> float:
        """Largest difference of the sampler's and the trainer's log-probs (nats)."""
        if self.rollout.exact:
            return 0.0
        if self.schedule.log_ratio_tolerance is not None:
            return self.schedule.log_ratio_tolerance
        return max(update.LOG_RATIO_TOLERANCES[dtype] for dtype in self.network_dtypes)

    @property
    def evaluates(self) -> bool:
        """True if held-out prompts are evaluated during the run."""
        scored = self.method.reward_model or bool(self.reward.functions)
        return self.evaluation.every_steps is not None and scored

    @property
    def holds_out(self) -> bool:
        """True if prompts are held out, for evaluations and probes."""
        return self.probes or (self.evaluates and self._can_hold_out)

    @property
    def probes(self) -> bool:
        """True if steps are probed, which needs held-out prompts but no evaluation."""
        return self.probe.enabled and self._can_hold_out and not self.method.reward_model

    @property
    def _can_hold_out(self) -> bool:
        files = self.data
        return files.path is None or files.eval_path is not None or files.held_out > 0

    def make_mesh(self, devices: list[jax.Device] | None = None) -> Mesh:
        """Arrange devices, or all of them, in the mesh of the config.

        Raises:
          ValueError: see `runtime.make_mesh`.
        """
        sizes = self.mesh
        return runtime.make_mesh(sizes["data"], sizes["fsdp"], sizes["tensor"], devices)

    def row_shards(self, mesh: Mesh) -> int:
        """Return the shards that the rows of a microbatch are divided into."""
        if self.data.packing:  # rows are padded to a multiple
            return trees.row_parts(mesh)
        return trees.blocks(mesh, self.minibatch_rows // self.microbatches)

    @property
    def microbatches(self) -> int:
        """Parts of a minibatch; 1 until they are chosen by memory."""
        return 1 if self.schedule.microbatches is None else self.schedule.microbatches

    def microbatch_counts(self, mesh: Mesh) -> list[int]:
        """Return the numbers of microbatches to choose from, rising.

        They divide the minibatch in parts that the mesh divides, where there are any.
        """
        if self.schedule.microbatches is not None:
            return [self.schedule.microbatches]
        rows, parts = self.minibatch_rows, trees.row_parts(mesh)
        divisors = [count for count in range(1, rows + 1) if rows % count == 0]
        return [count for count in divisors if rows // count % parts == 0] or divisors

    def with_microbatches(self, count: int) -> Self:
        """Return the settings with a chosen number of microbatches."""
        schedule = dataclasses.replace(self.schedule, microbatches=count)
        return dataclasses.replace(self, schedule=schedule)


def read_settings(config: ConfigDict) -> RunSettings:
    """Read every section.

    Args:
      config: the entire config (see configs/base.py).

    Raises:
      ValueError: everything that is wrong in any section, in one message.
    """
    errors = runtime.ErrorCollector()

    def read(function: Callable[..., Any], *args: Any) -> Any:
        return errors.call(function, *args)  # None after an error, which `finish` raises

    def section(kind: Any, name: str) -> Any:
        return read(runtime.parse_section, kind, config[name], name)

    settings = RunSettings(
        name=config.name,
        seed=config.seed,
        method=read(_read_method, config.method),
        model=section(models.ModelSettings, "model"),
        data=section(data.DataSettings, "data"),
        rollout=section(rollout.RolloutSettings, "rollout"),
        reward=read(_read_reward, config),
        preference=section(update.PreferenceSettings, "preference"),
        objective=read(_read_objective, config),
        schedule=section(update.ScheduleSettings, "schedule"),
        stages=read(update.read_stages, config.stages),
        mesh=config.mesh.to_dict(),
        checkpoint=section(runtime.CheckpointSettings, "checkpoint"),
        evaluation=section(EvalSettings, "eval"),
        probe=section(probe.ProbeSettings, "probe"),
        logging=section(report.LoggingSettings, "logging"),
    )
    errors.call(_check_metric, config.checkpoint.best_metric)
    if settings.method is not None:
        errors.messages.extend(_method_problems(config, settings))
    if not errors.messages:
        errors.messages.extend(_joint_problems(settings))
    errors.finish()
    return settings


def _read_method(name: str) -> Method:
    if name not in METHODS:
        preset = isinstance(name, str) and name.lower() in update.PRESETS
        hint = f"; {name} is an objective: set objective.preset, with method rl" if preset else ""
        raise ValueError(f"{not_among('method', name, METHODS)}{hint}.")
    return METHODS[name]


def _method_problems(config: ConfigDict, settings: RunSettings) -> Iterator[str]:
    method, stages = settings.method, settings.stages or ()  # None where a stage is wrong
    for key in method.required:
        section, name = key.split(".")
        if config[section][name] is None:
            yield f"{key} is missing; name {MISSING[key]}."
    if "completion" not in method.columns and config.data.packing:
        yield (
            "data.packing is for given completions (method sft); set it to False for "
            f"{method.name}."
        )
    if config.objective.entropy_budget is not None and not method.samples:
        yield (
            "objective.entropy_budget weighs the samples of RL; leave it out of method "
            f"{method.name}."
        )
    ruled = [s.name for s in stages if (s.plateau_window, s.kl_budget) != (None, None)]
    if ruled and not method.samples:
        yield (
            f"plateau_window and kl_budget need a reward and a reference: method {method.name!r} "
            f"has neither; remove them from stages {', '.join(ruled)}."
        )


def _joint_problems(settings: RunSettings) -> Iterator[str]:
    """List values of no section, and those that do not fit another section's."""
    if not 0 <= settings.seed < MOST_SEEDS:
        yield f"seed must be ≥ 0 and below 2^32 = {MOST_SEEDS}, not {settings.seed}."
    prompts, schedule = settings.data.prompts_per_step, settings.schedule
    if prompts % schedule.minibatches:
        yield (
            f"schedule.minibatches = {schedule.minibatches} must divide "
            f"data.prompts_per_step = {prompts}."
        )
    elif settings.minibatch_rows % settings.microbatches:
        yield (
            f"schedule.microbatches = {schedule.microbatches} must divide the "
            f"{settings.minibatch_rows} rows of a minibatch."
        )
    if settings.rollout.engine and settings.objective.correction == "off":
        yield (
            "rollout.engine draws with another program's arithmetic: set objective.correction to "
            "truncate or mask."
        )
    if settings.rollout.exact:
        yield from _exact_problems(settings)
    metric, ranked = settings.checkpoint.best_metric, settings.checkpoint.keep_best is not None
    evaluated = metric is not None and metric.startswith("eval/")
    if ranked and evaluated and settings.evaluation.every_steps is None:
        yield f"checkpoint.best_metric {metric!r} is never measured: set eval.every_steps."


def _exact_problems(settings: RunSettings) -> Iterator[str]:
    """List settings with which sampler and update do not read the same rows by the same program."""
    schedule, objective, rollouts = settings.schedule, settings.objective, settings.rollout
    budget, dtype = rollouts.max_completion_tokens, settings.network_dtypes[0]
    if rollouts.engine is not None:
        yield "rollout.exact samples by the update's forward pass: leave rollout.engine out"
    if dtype != "float32":
        yield f"rollout.exact is for a network in float32, not {dtype}"
    if schedule.microbatches is None:
        yield "rollout.exact needs a number as schedule.microbatches, such as 1"
    if schedule.log_ratio_tolerance is not None:
        yield "rollout.exact allows no difference: leave schedule.log_ratio_tolerance out"
    if schedule.chunk_tokens < budget:
        yield (
            f"rollout.exact needs the logits of complete completions: set schedule.chunk_tokens, "
            f"{schedule.chunk_tokens}, to at least rollout.max_completion_tokens = {budget}"
        )
    if objective.group_filter == "resample":
        yield 'rollout.exact reads rows in the order they are sampled: not group_filter "resample"'
    if objective.kl_place == "loss" and objective.needs_distribution:
        yield "rollout.exact goes with a KL estimated from samples, not of full distributions"
    if settings.probes and settings.probe.ledger_every_steps is not None:
        yield (
            "rollout.exact needs probe.ledger_every_steps=None: steps with a ledger are another "
            "program"
        )


def _check_metric(name: str | None) -> None:
    if name is not None and not report.is_known(name):
        raise ValueError(
            f"checkpoint.best_metric {name!r} is not a metric; `ntkrl report --glossary` lists "
            "them."
        )


def _read_reward(config: ConfigDict) -> reward.RewardSettings:
    section = config.reward.to_dict()
    section["functions"] = _weighted_functions(section.pop("function"), section.pop("weights"))
    names = [name for name, _ in section["functions"]]
    budget = config.rollout.max_completion_tokens
    if budget is not None:  # else the section rollout is refused
        section["options"] = reward.fit_budget(section["options"], names, budget)
    settings = runtime.parse_section(reward.RewardSettings, section, "reward")
    if settings.dtype not in DTYPES:  # the reward room is imported without JAX
        raise ValueError(
            f"config section reward: {not_among('reward.dtype', settings.dtype, DTYPES)}."
        )
    return settings


def _weighted_functions(
    function: str | None, weights: tuple[float, ...] | None
) -> tuple[tuple[str, float], ...]:
    if function is None:
        return ()
    specs = data.split_names(function)
    weights = (1.0,) * len(specs) if weights is None else tuple(weights)
    if len(weights) != len(specs):
        raise ValueError(
            f"reward.weights has {len(weights)} entries for {len(specs)} reward functions; give "
            "one each, or None for 1.0 each."
        )
    return tuple(zip(specs, weights, strict=True))


def _read_objective(config: ConfigDict) -> update.Objective:
    """Return the preset with the axes that the config sets (None keeps the preset's value)."""
    section = config.objective.to_dict()
    preset = section.pop("preset")
    if preset not in update.PRESETS:
        raise ValueError(f"{not_among('objective.preset', preset, sorted(update.PRESETS))}.")
    changes = {name: value for name, value in section.items() if value is not None}
    axes = dataclasses.asdict(update.PRESETS[preset]) | changes
    return runtime.parse_section(update.Objective, axes, "objective")
