"""Reward functions and models of a run, and the rewarded samples of a base policy."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ntkrl import data, models, reward, runtime
from ntkrl.json_values import readable
from ntkrl.numerics import DTYPES
from ntkrl.settings import EvalSettings
from ntkrl.setup.inputs import NO_INPUTS, Inputs


def load_rewards(
    settings: reward.RewardSettings, mesh: Mesh, inputs: Inputs = NO_INPUTS
) -> reward.RewardSet:
    """Load every reward function and reward model.

    Args:
      settings: the config's section.
      mesh: mesh of all devices, for reward models.
      inputs: with the functions of the calling program.

    Raises:
      ValueError: a function, model or file that cannot be loaded, or rewards to normalise that
        no function gives.
    """
    normalisation = {}
    if settings.normalisation is not None:
        normalisation = reward.read_normalisation(settings.normalisation)

    def load(function: tuple[str, float]) -> reward.RewardFunction:
        spec, weight = function
        if spec in inputs.functions:
            name = spec.removeprefix(reward.IN_PROCESS)
            fields = _fields(name, weight, normalisation, settings)
            return reward.open_callable(spec, inputs.functions[spec], settings.timeout, **fields)
        return _load_function(spec, weight, normalisation, settings, mesh)

    functions = runtime.ErrorCollector().map(load, settings.functions)
    names = [function.name for function in functions]
    unused = sorted(normalisation.keys() - {*names})
    if unused:
        raise ValueError(
            f"reward.normalisation {settings.normalisation} holds rewards of {', '.join(unused)}, "
            f"which no function gives; they are called {', '.join(names)}."
        )
    return reward.RewardSet(tuple(functions), runtime.local_slice, runtime.allgather_object)


def is_python_function(spec: str) -> bool:
    """Return True for a reward function (built in or a user's), False for a reward model."""
    in_memory = spec.startswith(reward.IN_PROCESS)
    return spec in reward.BUILT_IN or in_memory or spec.rpartition(":")[0].endswith(".py")


def _load_function(
    spec: str,
    weight: float,
    normalisation: dict[str, tuple[float, float]],
    settings: reward.RewardSettings,
    mesh: Mesh,
) -> reward.RewardFunction:
    if spec.startswith(reward.IN_PROCESS):
        name = spec.removeprefix(reward.IN_PROCESS)
        raise ValueError(
            f"reward {spec} is a function of the Python program that began the run. In Python, "
            "pass it again, as rewards=…; on the command line, name its file, as in "
            f"--config.reward.function=FILE.py:{name}."
        )
    name = spec
    if spec not in reward.BUILT_IN:
        name = spec.rpartition(":")[2] if is_python_function(spec) else Path(spec).name
    fields = _fields(name, weight, normalisation, settings)
    directory = Path(spec) if is_python_function(spec) else models.local_directory(spec)
    if is_python_function(spec) or not directory.is_dir():
        options = settings.options[spec] if spec in settings.options else {}
        return reward.open_function(spec, settings.timeout, options, **fields)
    scorer, params = models.load_scorer(directory, DTYPES[settings.dtype], mesh)
    tokenizer = data.load_tokenizer(directory)
    call = reward.RewardModel(scorer, params, tokenizer, mesh, settings.batch_size)
    return reward.RewardFunction(name, call, source=str(directory), on_mesh=True, **fields)


def _fields(
    name: str,
    weight: float,
    normalisation: dict[str, tuple[float, float]],
    settings: reward.RewardSettings,
) -> dict[str, Any]:
    """Return the fields of a RewardFunction that the config sets."""
    shift, scale = normalisation[name] if name in normalisation else (0.0, 1.0)
    on_failure = settings.on_failure
    return {"weight": weight, "shift": shift, "scale": scale, "on_failure": on_failure}


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """N completions of a policy for each of P prompts.

    texts: P lists of N. rewards: `[P, N]`.
    """

    texts: list[list[str]]
    rewards: np.ndarray


def read_base(
    path: Path, settings: EvalSettings, held_out: data.PromptSet, rewards: reward.RewardSet
) -> Samples:
    """Read as many samples of an earlier evaluation as are drawn for each prompt.

    Its rewards are summed with the weights and the normalisation of this config.

    Args:
      path: file of its samples, `settings.base`.
      settings: settings of the evaluation.
      held_out: its prompts, of which the first `settings.prompts` count.
      rewards: reward functions of the run.

    Raises:
      ValueError: files that are missing or of another form, other prompts, fewer samples or other
        reward functions than this evaluation has; all in one message.
    """
    errors, place = runtime.ErrorCollector(), f"eval.base {path}"
    samples = errors.call(_read_samples, path, place)
    raw = errors.call(reward.read_rewards, path.with_suffix(".rewards.json"), "eval.base")
    rows = None
    if samples is not None:
        rows = errors.call(_rows_by_prompt, settings, place, samples, held_out)
    if raw is not None:
        errors.call(_check_functions, place, raw, rewards)
    if samples is not None and raw is not None:
        errors.call(_check_counts, place, len(samples.prompts), raw)
    errors.finish()
    assert samples is not None and raw is not None and rows is not None  # else an error was raised
    texts = [_text_of(completion) for completion in samples.columns["completion"]]
    rewards_B = rewards.total(raw, texts)
    return Samples([[texts[i] for i in group] for group in rows], rewards_B[np.array(rows)])


def _read_samples(path: Path, place: str) -> data.PromptSet:
    if path.suffix != ".jsonl":
        raise ValueError(
            f"{place} is not a file of samples; name a .jsonl that `ntkrl evaluate` wrote, such as "
            "runs/sft/evaluations/sft.jsonl."
        )
    samples = data.read_set(path)
    completions = samples.columns["completion"] if "completion" in samples.columns else [None]
    if not all(isinstance(_text_of(completion), str) for completion in completions):
        raise ValueError(f"{place}: every row needs a 'completion': text, or one message.")
    return samples


def _text_of(completion: Any) -> Any:
    """Return the text of a completion, of a conversation too; None where there is none."""
    match completion:
        case str():
            return completion
        case [{"content": text}]:
            return text
    return None


def _rows_by_prompt(
    settings: EvalSettings, place: str, samples: data.PromptSet, held_out: data.PromptSet
) -> list[list[int]]:
    """Return the base's rows that answer each prompt."""
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(samples.prompts):
        rows.setdefault(_key(prompt), []).append(row)
    prompts = held_out.prompts[: settings.prompts]
    unknown = [prompt for prompt in prompts if _key(prompt) not in rows]
    if unknown:
        raise ValueError(
            f"{place} is of other prompts: {len(unknown)} of the {len(prompts)} used here are not "
            f"in it, such as {unknown[0]!r:.60}. Evaluate the base on the same data.eval_path, or "
            "data.path and data.held_out, and on as many eval.prompts."
        )
    needed = settings.samples_per_prompt * settings.repeats
    fewest = min(len(rows[_key(prompt)]) for prompt in prompts)
    if fewest < needed:
        raise ValueError(
            f"{place} holds {fewest} samples of a prompt, and {needed} are drawn here "
            "(eval.samples_per_prompt × eval.repeats); draw fewer, or evaluate the base with as "
            "many."
        )
    return [rows[_key(prompt)][:needed] for prompt in prompts]


def _check_functions(place: str, raw: dict[str, np.ndarray], rewards: reward.RewardSet) -> None:
    names = [function.name for function in rewards.functions]
    if set(names) != set(raw):
        raise ValueError(
            f"{place} has rewards of {', '.join(raw)}, this config of {', '.join(names)}; evaluate "
            "the base with the same reward.function."
        )


def _check_counts(place: str, rows: int, raw: dict[str, np.ndarray]) -> None:
    wrong = [f"{len(values)} of {name}" for name, values in raw.items() if len(values) != rows]
    if wrong:
        raise ValueError(
            f"{place} has {rows} samples, and rewards beside it are {', '.join(wrong)}; evaluate "
            "the base again."
        )


def _key(prompt: Any) -> str:
    return json.dumps(readable(prompt), sort_keys=True)
