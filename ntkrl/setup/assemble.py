"""The pieces of a run, loaded and checked before anything is traced."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ntkrl import data, models, reward, runtime, trees, update
from ntkrl.data import split_names
from ntkrl.settings import DTYPES, ModelSettings, RunSettings
from ntkrl.setup.base_samples import Samples, read_base
from ntkrl.setup.rewards import Problems, reward_set
from ntkrl.setup.whitening import whitened
from ntkrl.types import Params, Policy, Scorer

REQUIRED = {
    "rl": ("prompt",),
    "sft": ("prompt", "completion"),
    "reward": ("prompt", "chosen", "rejected"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """A prompt set with its token ids.

    encoded: of the prompts; empty for preferences, whose texts are read whole. completions: empty
    unless supervised. sizes: rows of each file, which lie one after the other.
    """

    prompt_set: data.PromptSet
    encoded: list[list[int]]
    completions: list[list[int]]
    sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of prompts."""
        return len(self.prompt_set.prompts)

    @property
    def columns(self) -> dict[str, list[Any]]:
        """What reward functions are given besides prompts and completions."""
        held = self.prompt_set.columns
        return {name: values for name, values in held.items() if name != "completion"}


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """The model a run starts from.

    policy, params: params on the mesh. tokenizer: transformers'. tokenizer_source: directory
    whose files export copies. mesh: of all devices. scorer: of a reward model, whose params hold
    its head; policy is None then.
    """

    policy: Policy | None
    params: Params
    tokenizer: Any
    tokenizer_source: str
    mesh: Mesh
    scorer: Scorer | None

    @property
    def sharding(self) -> trees.Patterns:
        """How params and what is like them lie on the mesh."""
        return self.network.sharding

    @property
    def network(self) -> Policy | Scorer:
        """What is trained."""
        return self.scorer if self.policy is None else self.policy

    def export(self, path: Path, params: Params) -> None:
        """Write a Hugging Face directory, and one of the adapters beside it if there are any."""
        if self.policy is None:
            models.export_scorer(path, self.scorer, params, self.tokenizer_source)
            return
        models.export(path, self.policy, params, self.tokenizer_source)
        if self.policy.config.adapters is not None:
            beside = path.with_name("adapter" if path.name == "export" else f"{path.name}-adapter")
            models.export_adapter(beside, self.policy, params, source=self.tokenizer_source)


@dataclasses.dataclass(frozen=True, eq=False)
class Setup(Start):
    """What both loops need.

    settings: the config, read. train, held_out: prompts. rewards: None for supervised runs
    without. base: samples that evaluations are compared with, or None.
    """

    settings: RunSettings
    train: Prompts
    held_out: Prompts | None
    rewards: reward.RewardSet | None
    base: Samples | None

    @property
    def spread(self) -> int:
        """Blocks of a part of a minibatch that lie on devices of their own."""
        if self.settings.data.packing:  # rows are made a multiple
            return trees.row_parts(self.mesh)
        rows = self.settings.minibatch_rows // self.settings.schedule.microbatches
        return trees.blocks(self.mesh, rows)

    @property
    def stages(self) -> tuple[update.Stage, ...]:
        """The config's stages, their lengths in rollout steps."""
        # weighted files may be smaller than a batch
        steps_per_epoch = max(self.train.size // self.settings.data.prompts_per_step, 1)
        return tuple(stage.in_steps(steps_per_epoch) for stage in self.settings.stages)


def assemble(settings: RunSettings, run_directory: Path) -> Setup:
    """Build the Setup of a run, cheapest checks first.

    Args:
      settings: from `read_settings`.
      run_directory: where a new model's tokenizer is written.

    Raises:
      ValueError: anything wrong with the files the config names, or how they fit.
    """
    problems = Problems()
    mesh = runtime.make_mesh(**settings.mesh)
    rewards, rows, tokenizer, train, held_out, base = None, None, None, None, None, None
    with problems:
        if settings.reward.functions:
            rewards = reward_set(settings.reward, mesh)
    with problems:
        if settings.model.path is not None:
            check = models.check_scorer if settings.method == "reward" else models.check
            rows = check(settings.model.path)
    with problems:
        source, tokenizer = _tokenizer(settings.model, run_directory)
    if tokenizer is not None:
        with problems:
            train, held_out = _prompts(settings, tokenizer)
        with problems:
            if rows is not None:
                check_vocabulary(tokenizer, _rows(settings.model, tokenizer, rows), source)
    if train is not None and rewards is not None and settings.method != "reward":
        for prompts in (held_out, train if settings.method == "rl" else None):
            with problems:
                if prompts is not None:
                    rewards.check_columns(prompts.columns)
    if settings.evaluation.base is not None and held_out is not None and rewards is not None:
        with problems:
            base = read_base(settings.evaluation, held_out.prompt_set, rewards)
    problems.finish()
    start = vars(_start(settings, mesh, source, tokenizer))
    return Setup(
        **start, settings=settings, train=train, held_out=held_out, rewards=rewards, base=base
    )


def assemble_model(settings: RunSettings, run_directory: Path) -> Start:
    """Build the starting model of a run alone; its prompts and rewards may be gone by now.

    Args:
      settings: from `read_settings`.
      run_directory: where a new model's tokenizer is written.

    Raises:
      ValueError: anything wrong with the model directory.
    """
    mesh = runtime.make_mesh(**settings.mesh)
    return _start(settings, mesh, *_tokenizer(settings.model, run_directory))


def check_vocabulary(tokenizer: Any, rows: int, source: str) -> None:
    """Refuse a tokenizer with tokens the model does not have.

    Raises:
      ValueError: it has more entries than the model's vocabulary has rows.
    """
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer of {source} has {len(tokenizer)} entries, the model's vocabulary "
            f"{rows}; use the tokenizer the model was trained with, or set "
            f"model.vocab_size={len(tokenizer)} to add rows."
        )


def _rows(settings: ModelSettings, tokenizer: Any, stored: int) -> int:
    """Return the rows of the vocabulary: as asked for, as a template needs, or as stored."""
    if settings.vocab_size is not None:
        return settings.vocab_size
    return stored if settings.template is None else max(stored, len(tokenizer))


def _tokenizer(settings: ModelSettings, run_directory: Path) -> tuple[str, Any]:
    source = settings.path
    if source is None:
        source = str(run_directory / "tokenizer")
        if runtime.is_writer():
            data.save_tokenizer(source)
        runtime.allgather_object("the new tokenizer")
    else:
        source = models.tokenizer_directory(source)
    tokenizer = data.load_tokenizer(source)
    if settings.template is not None:
        data.apply_template(tokenizer, data.read_template(settings.template))
        source = str(run_directory / "tokenizer")
        if runtime.is_writer():
            tokenizer.save_pretrained(source)
    return source, tokenizer


def _start(settings: RunSettings, mesh: Mesh, source: str, tokenizer: Any) -> Start:
    if settings.method == "reward":
        scorer, params = _scorer(settings, tokenizer, mesh)
        return Start(None, params, tokenizer, source, mesh, scorer)
    policy, params = _model(settings.model, tokenizer, mesh, settings.seed)
    rows = _rows(settings.model, tokenizer, policy.vocab_size)
    if rows != policy.vocab_size:
        policy, params = models.resized(policy, params, rows, mesh)
    check_vocabulary(tokenizer, rows, source)
    if settings.model.whiten is not None:
        policy, params = whitened(settings, policy, params, tokenizer, mesh)
    return Start(policy, params, tokenizer, source, mesh, None)


def _scorer(settings: RunSettings, tokenizer: Any, mesh: Mesh) -> tuple[Scorer, Params]:
    given = settings.model
    unused = [name for name in ("untie", "vocab_size", "whiten") if getattr(given, name)]
    unused += ["remat"] if given.remat != "products" else []
    unused += ["lora"] if given.lora["rank"] else []
    if unused:
        raise ValueError(
            f"reward models are trained without {', '.join(f'model.{name}' for name in unused)}."
        )
    compute = None if given.compute_dtype is None else DTYPES[given.compute_dtype]
    new = models.NewHead(tokenizer.pad_token_id, settings.seed)
    return models.load_scorer(given.path, DTYPES[given.dtype], mesh, compute, new)


def _model(settings: ModelSettings, tokenizer: Any, mesh: Mesh, seed: int) -> tuple[Policy, Params]:
    compute = None if settings.compute_dtype is None else DTYPES[settings.compute_dtype]
    dtype = DTYPES[settings.dtype]
    if settings.path is not None:
        lora = models.Lora(**settings.lora, seed=seed) if settings.lora["rank"] else None
        options = models.ModelOptions(compute, settings.remat, settings.untie, lora)
        return models.load(settings.path, dtype, mesh, options)
    raw = {
        **settings.new,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    options = models.ModelOptions(compute, settings.remat)
    return models.build(settings.architecture, raw, jax.random.key(seed), dtype, mesh, options)


def _prompts(settings: RunSettings, tokenizer: Any) -> tuple[Prompts, Prompts | None]:
    supervised, paired = settings.method == "sft", settings.method == "reward"
    scored = settings.evaluation.every_steps is not None
    scored = scored and (paired or bool(settings.reward.functions))
    train_sets, held_sets = _prompt_sets(settings, supervised, scored)
    train_set = data.join(train_sets)
    if len(train_set.prompts) < settings.data.prompts_per_step:
        raise ValueError(
            f"{train_set.source} leaves {len(train_set.prompts)} training prompts, fewer than "
            f"data.prompts_per_step = {settings.data.prompts_per_step}; lower it or add prompts."
        )

    def encoded(prompt_set: data.PromptSet, with_completions: bool) -> Prompts:
        size = (len(prompt_set.prompts),)
        if paired:
            return Prompts(prompt_set, [], [], size)
        budget = settings.rollout.max_completion_tokens
        completions = []
        if with_completions:
            completions = data.encode_completions(tokenizer, prompt_set, budget)
        ids = data.encode_prompts(tokenizer, prompt_set, settings.data.max_prompt_tokens)
        return Prompts(prompt_set, ids, completions, size)

    held_out = None
    if scored and held_sets:
        held_out = _spread(_joined(_each(lambda one: encoded(one, False), held_sets)))
    return _joined(_each(lambda one: encoded(one, supervised), train_sets)), held_out


def _prompt_sets(
    settings: RunSettings, supervised: bool, scored: bool
) -> tuple[list[data.PromptSet], list[data.PromptSet]]:
    """Return the sets to train on and the held-out ones, a set for each file."""
    files = settings.data
    if files.path is None:
        held_set = data.expression_prompts("test")
        if supervised:
            return [data.supervised_set(files.examples, settings.seed)], [held_set]
        return [data.expression_prompts("train")], [held_set]
    required = REQUIRED[settings.method]
    held = required if settings.method == "reward" else ("prompt",)
    wanted = [(name, required) for name in split_names(files.path)]
    count = len(wanted)
    if files.eval_path is not None:
        wanted += [(name, held) for name in split_names(files.eval_path)]
    found = _each(lambda one: data.read_set(*one), wanted)
    train_sets, held_sets = found[:count], found[count:]
    if held_sets or not scored or files.held_out == 0:
        return train_sets, held_sets
    divided = _each(lambda one: data.hold_out(one, files.held_out), train_sets)
    return [train for train, _ in divided], [held for _, held in divided]


def _each(call: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Call on each; one ValueError tells the problems of all."""
    results, problems = [], Problems()
    for item in items:
        with problems:
            results.append(call(item))
    problems.finish()
    return results


def _joined(parts: Sequence[Prompts]) -> Prompts:
    return Prompts(
        data.join([part.prompt_set for part in parts]),
        [ids for part in parts for ids in part.encoded],
        [ids for part in parts for ids in part.completions],
        tuple(part.size for part in parts),
    )


def _spread(prompts: Prompts) -> Prompts:
    """Reorder the rows of several files, so that the first few are of all."""
    rows = data.spread(prompts.sizes)
    encoded = [prompts.encoded[row] for row in rows] if prompts.encoded else []
    return Prompts(data.take(prompts.prompt_set, rows), encoded, [], (prompts.size,))
