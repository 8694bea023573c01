"""The parts of a run, loaded and checked before anything is traced."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from ntkrl import data, models, reward, runtime, update
from ntkrl.settings import RunSettings
from ntkrl.setup.inputs import NO_INPUTS, Inputs
from ntkrl.setup.rewards import Samples, load_rewards, read_base
from ntkrl.setup.starting_model import (
    StartingModel,
    check_vocabulary,
    load_network,
    load_tokenizer,
    vocabulary_rows,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """A prompt set with its token ids.

    prompt_set: texts and columns.
    encoded: token ids of the prompts; empty for preferences, whose texts are tokenised in full.
    completions: token ids of the completions; empty unless supervised.
    sizes: rows of each file, in consecutive blocks.
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
        """Columns that reward functions receive besides prompts and completions."""
        columns = self.prompt_set.columns
        return {name: values for name, values in columns.items() if name != "completion"}


@dataclasses.dataclass(frozen=True, eq=False)
class RunSetup:
    """The parts of a run.

    settings: the config, read. model: the starting model. train: prompts.
    held_out: prompts of the evaluation and the probe set, or None for neither.
    rewards: None for a supervised run without rewards.
    base: samples that evaluations are compared with, or None.
    """

    settings: RunSettings
    model: StartingModel
    train: Prompts
    held_out: Prompts | None
    rewards: reward.RewardSet | None
    base: Samples | None

    @property
    def held_out_prompts(self) -> Prompts:
        """The prompts of a run that has an evaluation or a probe set."""
        assert self.held_out is not None
        return self.held_out

    @property
    def stages(self) -> tuple[update.Stage, ...]:
        """The config's stages, their lengths in rollout steps."""
        return tuple(stage.in_steps(self.steps_per_epoch) for stage in self.settings.stages)

    @property
    def steps_per_epoch(self) -> int:
        """Rollout steps of a pass over the training prompts; weighted files may not fill one."""
        return max(self.train.size // self.settings.data.prompts_per_step, 1)

    def during(self, step: int, batches: int, tokens: int = 0) -> Self:
        """Return the run with the progress that reward functions receive.

        Args:
          step: optimizer steps taken.
          batches: batches of prompts drawn.
          tokens: trained on.
        """
        if self.rewards is None:
            return self
        steps = sum(stage.max_steps for stage in self.stages)
        state = reward.TrainerState(
            global_step=step,
            max_steps=steps * self.settings.schedule.updates,
            epoch=batches * self.settings.data.prompts_per_step / self.train.size,
            num_train_epochs=-(-steps // self.steps_per_epoch),
            num_input_tokens_seen=tokens,
        )
        return dataclasses.replace(self, rewards=self.rewards.during(state))


def set_up(settings: RunSettings, run_dir: Path, inputs: Inputs = NO_INPUTS) -> RunSetup:
    """Load the parts of a run, cheapest checks first.

    Args:
      settings: from `read_settings`.
      run_dir: where a new model's tokenizer is written.
      inputs: values of the calling program.

    Raises:
      ValueError: anything wrong with the files the config names, or how they fit.
    """
    errors = runtime.ErrorCollector()
    mesh = settings.make_mesh()
    rewards, stored_rows, tokenizer, train, held_out, base = None, None, None, None, None, None
    with errors:
        if settings.reward.functions:
            rewards = load_rewards(settings.reward, mesh, inputs)
    with errors:
        if settings.model.path is not None:
            check = models.check_scorer if settings.method.reward_model else models.check
            stored_rows = check(settings.model.path)
    with errors:
        tokenizer, tokenizer_dir = load_tokenizer(settings, run_dir)
    if tokenizer is not None:
        with errors:
            train, held_out = _load_prompts(settings, tokenizer, inputs)
        with errors:
            if stored_rows is not None:
                rows = vocabulary_rows(settings, tokenizer, stored_rows)
                check_vocabulary(tokenizer, rows, tokenizer_dir)
    if train is not None and rewards is not None and not settings.method.reward_model:
        scored = (
            held_out if settings.evaluates else None,
            train if settings.method.samples else None,
        )
        for prompts in scored:
            with errors:
                if prompts is not None:
                    rewards.check_columns(prompts.columns)
    base_path = settings.evaluation.base
    if base_path is not None and held_out is not None and rewards is not None:
        with errors:
            base = read_base(Path(base_path), settings.evaluation, held_out.prompt_set, rewards)
    errors.finish()
    assert train is not None  # else its error was raised
    model = load_network(settings, mesh, tokenizer, tokenizer_dir)
    return RunSetup(settings, model, train, held_out, rewards, base)


def _load_prompts(
    settings: RunSettings, tokenizer: Any, inputs: Inputs
) -> tuple[Prompts, Prompts | None]:
    train_sets, held_out_sets = _read_prompt_sets(settings, inputs)
    train_set = data.join(train_sets)
    if len(train_set.prompts) < settings.data.prompts_per_step:
        raise ValueError(
            f"{train_set.source} leaves {len(train_set.prompts)} training prompts, fewer than "
            f"data.prompts_per_step = {settings.data.prompts_per_step}; lower it or add prompts."
        )
    held_out, columns, errors = None, settings.method.columns, runtime.ErrorCollector()
    if held_out_sets:
        encoded = errors.call(_encode, settings, tokenizer, held_out_sets, False)
        held_out = None if encoded is None else _interleaved(encoded)
    parts = errors.call(_encode, settings, tokenizer, train_sets, "completion" in columns)
    errors.finish()
    assert parts is not None  # else its error was raised
    return _joined(parts), held_out


def _read_prompt_sets(
    settings: RunSettings, inputs: Inputs
) -> tuple[list[data.PromptSet], list[data.PromptSet]]:
    """Return the training sets and, for evaluations and probes, held-out ones; one per file."""
    files, method = settings.data, settings.method
    if files.path is None:
        held_out = [data.expression_prompts("test")] if settings.holds_out else []
        if "completion" in method.columns:
            return [data.supervised_set(files.examples, settings.seed)], held_out
        return [data.expression_prompts("train")], held_out
    names = [(name, method.columns) for name in data.split_names(files.path)]
    count, errors = len(names), runtime.ErrorCollector()
    if files.eval_path is not None:
        eval_columns = method.columns if method.reward_model else ("prompt",)
        names += [(name, eval_columns) for name in data.split_names(files.eval_path)]
    sets = errors.map(lambda file: inputs.read_set(*file), names)
    train_sets, held_out = sets[:count], sets[count:]
    if held_out or not settings.holds_out:
        return train_sets, held_out if settings.holds_out else []
    divided = errors.map(lambda prompts: data.hold_out(prompts, files.held_out), train_sets)
    return [train for train, _ in divided], [held_out for _, held_out in divided]


def _encode(
    settings: RunSettings,
    tokenizer: Any,
    prompt_sets: Sequence[data.PromptSet],
    with_completions: bool,
) -> list[Prompts]:
    """Tokenise prompt sets; preferences are tokenised by their source."""

    def encode(prompt_set: data.PromptSet) -> Prompts:
        size, completions = (len(prompt_set.prompts),), []
        if settings.method.reward_model:
            return Prompts(prompt_set, [], [], size)
        with prompt_set.named_rows():
            if with_completions:
                budget = settings.rollout.max_completion_tokens
                completions = data.encode_completions(tokenizer, prompt_set, budget)
            ids = data.encode_prompts(tokenizer, prompt_set, settings.data.max_prompt_tokens)
        return Prompts(prompt_set, ids, completions, size)

    return runtime.ErrorCollector().map(encode, prompt_sets)


def _joined(parts: Sequence[Prompts]) -> Prompts:
    return Prompts(
        data.join([part.prompt_set for part in parts]),
        [ids for part in parts for ids in part.encoded],
        [ids for part in parts for ids in part.completions],
        tuple(part.size for part in parts),
    )


def _interleaved(parts: Sequence[Prompts]) -> Prompts:
    """Join the prompts of several files so that the first rows come from all of them."""
    prompts = _joined(parts)
    rows = data.spread(prompts.sizes)
    encoded = [prompts.encoded[row] for row in rows] if prompts.encoded else []
    return Prompts(data.take(prompts.prompt_set, rows), encoded, [], (prompts.size,))
