"""Arguments of a call as the config and the inputs of a run."""

import dataclasses
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ntkrl import data, runtime, shorthands
from ntkrl.api import functions, model_files, overrides, rows
from ntkrl.messages import quoted
from ntkrl.setup import Inputs
from ntkrl.types import Params, Policy


@dataclasses.dataclass(frozen=True, eq=False)
class Arguments:
    """Arguments of `train` and `Steps`; None leaves a setting to the config."""

    model: Any = None
    prompts: Any = None
    rewards: Any = None
    method: str = overrides.METHODS[0]
    learning_rate: float | None = None
    steps: int | None = None
    seed: int | None = None
    run_dir: Any = None
    eval_prompts: Any = None
    on_step: Callable[[int, dict[str, Any]], Any] | None = None
    config: Any = None


BY_ARGUMENT = {
    "model.path": "model",
    "data.path": "prompts",
    "data.eval_path": "eval_prompts",
    "reward.function": "rewards",
    "seed": "seed",
    "run_dir": "run_dir",
}
"""Arguments by the setting that they are."""


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A config and the values in memory that it names.

    start: the model in memory, which `save_start` writes; or None.
    """

    config: ConfigDict
    inputs: Inputs
    start: tuple[Policy, Params] | None

    def save_start(self) -> None:
        """Name the files of a model in memory in the config, written if they do not exist.

        Raises:
          ValueError: params that are not finite, or the run directory is another run's.
        """
        if self.start is None:
            return
        directory = Path(self.config.run_dir)
        if not (directory / "config.json").exists():
            runtime.check_run_dir(directory, {})
        self.config.model.path = model_files.export_start(*self.start, self.config.run_dir)


def read_call(arguments: Arguments) -> Call:
    """Check the arguments and return the config and the inputs of a run.

    Raises:
      ValueError: everything that is wrong with them, in one message.
    """
    errors = runtime.ErrorCollector()
    config = errors.call(overrides.read_config, arguments.method, arguments.config)
    values = {
        name: getattr(arguments, name)
        for name in ("learning_rate", "steps", "seed")
        if getattr(arguments, name) is not None
    }
    if arguments.run_dir is not None:
        values["run_dir"] = errors.call(_directory, arguments.run_dir)
    if config is not None and not errors.messages:
        errors.call(shorthands.apply_shorthands, config, values)
    if config is not None and not errors.messages:
        errors.call(_directory, config.run_dir)
    start = None
    if arguments.model is not None:
        start = errors.call(model_files.read_model, arguments.model)
    read = {
        setting: errors.call(rows.read_rows, getattr(arguments, name), name)
        for name, setting in (("prompts", "path"), ("eval_prompts", "eval_path"))
        if getattr(arguments, name) is not None
    }
    rewards = None
    if arguments.rewards is not None:
        rewards = errors.call(functions.read_rewards, arguments.rewards)
    if arguments.on_step is not None:
        errors.call(_check_on_step, arguments.on_step)
    if isinstance(arguments.config, Mapping) and not isinstance(arguments.config, ConfigDict):
        errors.call(_check_once, arguments)
    errors.finish()
    assert config is not None  # else its error was raised
    if isinstance(start, str):
        config.model.path, start = start, None
    named = name_rows(config, {name: values for name, values in read.items() if values is not None})
    if rewards is not None:
        config.reward.function = rewards[0]
    inputs = Inputs(named, {} if rewards is None else rewards[1], arguments.on_step)
    return Call(config, inputs, start)


def name_rows(
    config: ConfigDict, read: Mapping[str, str | data.RowFile]
) -> dict[str, data.RowFile]:
    """Name prompts in the config's section data; return those in memory by their paths.

    Args:
      config: changed in place.
      read: setting to a path or rows in memory.

    Raises:
      ValueError: as `rows.path_in_run`.
    """
    named = {}
    for setting, values in read.items():
        path = values if isinstance(values, str) else rows.path_in_run(values, config.run_dir)
        config.data[setting] = path
        if isinstance(values, data.RowFile):
            named[path] = values
    return named


def _check_on_step(function: Any) -> None:
    """Refuse what cannot be called with a step and its metrics.

    Raises:
      ValueError: no function, or one of other arguments.
    """
    fix = "pass a function of the step and its metrics, as in def on_step(step, metrics)"
    if not callable(function):
        kind = type(function).__name__
        raise ValueError(f"on_step is {quoted(function)} ({kind}); {fix}.")
    try:
        inspect.signature(function).bind(0, {})
    except TypeError as error:
        raise ValueError(f"on_step cannot be called with two values ({error}); {fix}.") from error
    except ValueError:  # a built-in function without a signature
        return


def _check_once(arguments: Arguments) -> None:
    """Refuse settings that `config` changes and an argument sets.

    Raises:
      ValueError: any of them.
    """
    names = dict(overrides.flat(arguments.config))
    both = [
        f"{argument} and config {setting!r} set the same; leave out one."
        for setting, argument in BY_ARGUMENT.items()
        if setting in names and getattr(arguments, argument) is not None
    ]
    if both:
        raise ValueError("\n".join(both))


def _directory(path: Any) -> str:
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(
            f"run_dir is {quoted(path)} ({type(path).__name__}); pass the name of a directory, "
            "such as 'runs/first'."
        )
    for place in (Path(path), *Path(path).parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"run_dir {os.fspath(path)}: {place} is a file; name a directory.")
    return os.fspath(path)
