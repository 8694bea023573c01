"""Configs: an ml_collections file plus `--config.section.field=value` overrides.

Below the assembly floor there is no ConfigDict: each section becomes a frozen dataclass.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from absl import flags
from ml_collections import ConfigDict, config_flags

Settings = TypeVar("Settings")


def read_config(arguments: Sequence[str]) -> ConfigDict:
    """Read `--config=FILE` and its overrides.

    Args:
      arguments: command-line words after the command's name.

    Raises:
      ValueError: no config, a file that does not load, a key that does not exist, a value of the
        wrong type, or words that are no flags.
    """
    found = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "Path of a config file.", flag_values=found)
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # config files import configs.base
    named = [word for word in arguments if word.split("=")[0].lstrip("-") == "config"]
    if not named:
        raise ValueError("--config=FILE is missing, for example --config=configs/rl.py.")
    path = named[-1].partition("=")[2].split(":")[0]
    if "=" in named[-1] and not Path(path).is_file():
        raise ValueError(
            f"--config={path}: no such file; configs/ is read relative to {Path.cwd()}."
        )
    try:
        rest = found(["ntkrl", *arguments])
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(_explain(str(error).strip("\"'"), arguments)) from error
    except SyntaxError as error:
        raise ValueError(f"{path} is not valid Python: {error}.") from error
    if len(rest) > 1:
        raise ValueError(f"{' '.join(rest[1:])} is no flag; write --config.section.field=value.")
    return found.config


def settings(kind: type[Settings], section: ConfigDict, name: str) -> Settings:
    """Turn a config section into its frozen dataclass.

    Args:
      kind: the dataclass.
      section: the ConfigDict.
      name: the section's name in messages.

    Raises:
      ValueError: fields that are missing or unknown (all at once, with the nearest known name),
        or values that the dataclass refuses.
    """
    given = section.to_dict() if isinstance(section, ConfigDict) else dict(section)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    problems = []
    for key in given:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(fields)}"
            problems.append(f"{name}.{key} does not exist{hint}")
    for key, field in fields.items():
        optional = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if key not in given and not optional:
            problems.append(f"{name}.{key} is missing")
    if problems:
        raise ValueError("; ".join(problems) + ".")
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config section {name}: {error}") from error


def to_json(config: ConfigDict) -> dict[str, Any]:
    """Return the config as JSON values (tuples become lists)."""
    return _json(config.to_dict())


def from_json(values: Mapping[str, Any]) -> ConfigDict:
    """Return the ConfigDict that `to_json` came from (lists stay lists)."""
    return ConfigDict(dict(values))


def differences(saved: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List every field in which two configs differ, as `section.field: saved -> given`."""
    found = []
    for key in sorted({*saved, *given}):
        name = f"{prefix}{key}"
        old = saved[key] if key in saved else "(absent)"
        new = given[key] if key in given else "(absent)"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{name}.")
        elif old != new:
            found.append(f"{name}: {old!r} -> {new!r}")
    return found


def _json(value: Any) -> Any:
    if isinstance(value, ConfigDict):
        return _json(value.to_dict())
    if isinstance(value, Mapping):
        return {str(key): _json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    return value


def _explain(message: str, arguments: Sequence[str]) -> str:
    """Name the override a parser's message is about, when the message does not."""
    for word in arguments:
        name = word.split("=")[0].lstrip("-")
        if name.startswith("config.") and name.split(".")[-1] in message:
            return f"--{name}: {message}"
    return message
