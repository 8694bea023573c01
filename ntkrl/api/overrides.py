"""The config of a call: a packaged one, a file's or the caller's, and changes of settings."""

import copy
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_flags import config_path

from ntkrl import runtime
from ntkrl.messages import did_you_mean, quoted

METHODS = ("rl", "cfrl", "sft", "reward")
"""Packaged configs that a call names by its method."""


def read_config(method: Any, config: Any) -> ConfigDict:
    """Return the config of a call.

    Args:
      method: name of a packaged config.
      config: None; changes of the method's config, `{"section.field": value}`; or another config in
        its place: a name, a file or a ConfigDict, which is copied.

    Raises:
      ValueError: an unknown method or setting, a value of another type, no such file.
    """
    if not isinstance(method, str) or method not in METHODS:
        hint = did_you_mean(str(method), METHODS)
        raise ValueError(f"method is {quoted(method)}; it is one of {', '.join(METHODS)}{hint}")
    if config is None or (isinstance(config, Mapping) and not isinstance(config, ConfigDict)):
        values = runtime.read_config([f"--config={method}"])
        override(values, {} if config is None else config)
        return values
    if method != METHODS[0]:
        raise ValueError(
            f"method {method!r} names a packaged config, and config another one; leave out one of "
            "the two, or pass config={'section.field': value} for changes."
        )
    if isinstance(config, ConfigDict):
        return copy.deepcopy(config)
    if isinstance(config, str | os.PathLike):
        return runtime.read_config([f"--config={os.fspath(config)}"])
    raise ValueError(
        f"config is {quoted(config)} ({type(config).__name__}); it is a dict of changes, such as "
        '{"rollout.max_completion_tokens": 64}, the name or file of a config, or a ConfigDict.'
    )


def override(config: ConfigDict, changes: Mapping[str, Any]) -> None:
    """Change settings in place, as `--config.section.field=value` does.

    Args:
      config: the config.
      changes: value by dotted name, or nested by section.

    Raises:
      ValueError: names that do not exist or values of another type, all in one message.
    """
    problems = []
    for name, value in flat(changes):
        try:
            _set(config, name, value)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))


def changes_setting(config: Any, name: str) -> bool:
    """Return whether the `config` of a call is a dict of changes that has a setting."""
    changes = isinstance(config, Mapping) and not isinstance(config, ConfigDict)
    return changes and name in dict(flat(config))


def flat(changes: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of each change."""
    for key, value in changes.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name.count(".") < 2:
            yield from flat(value, f"{name}.")
        else:
            yield name, value


def _set(config: ConfigDict, name: str, value: Any) -> None:
    problem = runtime.name_problem(name, config)
    if problem is not None:
        raise ValueError(f"config {name!r}{problem}")
    before = config_path.get_value(name, config)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(before, float) and type(value) is int:
        value = float(value)
    try:
        if value is None:
            with config.ignore_type():
                config_path.set_value(name, config, None)
        else:
            config_path.set_value(name, config, value)
    except (TypeError, ValueError) as error:
        kind = "another type" if before is None else f"{type(before).__name__}, as {quoted(before)}"
        raise ValueError(
            f"config {name!r} is {quoted(value)} ({type(value).__name__}); expected {kind}."
        ) from error
