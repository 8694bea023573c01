"""Configs: an ml_collections file plus `--config.section.field=value` overrides.

Below the assembly floor there is no ConfigDict: each section becomes a frozen dataclass.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder
from ml_collections.config_flags import config_path

Settings = TypeVar("Settings")
EMPTIED = re.compile(r"--config\.[^.=]+\.[^.=]+=None")
MINIATURE = re.compile(r"--(no)?config\.miniature(=|$)")


def read_config(arguments: Sequence[str], saved: ConfigDict | None = None) -> ConfigDict:
    """Read `--config=FILE` and its overrides, or overrides of a saved config alone.

    A config may hold a table `in_miniature` of (field, value): with `--config.miniature=true` these
    values take the place of the file's, and overrides that of either. No table is left in what is
    returned.

    Args:
      arguments: command-line words after the command's name.
      saved: from `from_json`; takes the file's place.

    Raises:
      ValueError: no config or two, a file that does not load, a key that does not exist, a value
        of the wrong type, or words that are no flags.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # config files import configs.base
    arguments = joined(arguments)
    named = [word for word in arguments if word.startswith("--config=")]
    if saved is not None:
        if named:
            raise ValueError(f"{named[-1]}: a run has a config of its own; leave out one of both.")
        return _overridden(arguments, saved, "config.json", saved)
    if not named:
        raise ValueError("--config=FILE is missing, for example --config=configs/base.py.")
    path = named[-1].removeprefix("--config=").split(":")[0]
    if not Path(path).is_file():
        raise ValueError(
            f"--config={path}: no such file; configs/ is read relative to {Path.cwd()}."
        )
    plain, _ = _parse(named[-1:], path)
    if "in_miniature" not in plain:
        return _overridden(arguments, plain, path, None)
    asked, _ = _parse([*named[-1:], *(word for word in arguments if MINIATURE.match(word))], path)
    with plain.unlocked(), plain.ignore_type():
        table = plain.in_miniature
        del plain.in_miniature
        for name, value in table if asked.miniature else ():
            config_path.set_value(name, plain, value)
    return _overridden([word for word in arguments if word not in named], plain, path, plain)


def joined(arguments: Sequence[str]) -> list[str]:
    """Return words with `--config FILE` written as `--config=FILE`."""
    words = list(arguments)
    if "--config" in words[:-1]:
        at = words.index("--config")
        words[at : at + 2] = [f"--config={words[at + 1]}"]
    return words


def _overridden(
    arguments: Sequence[str], plain: ConfigDict, path: str, saved: ConfigDict | None
) -> ConfigDict:
    problems = [problem for word in arguments if (problem := _unknown_key(word, plain))]
    if problems:
        raise ValueError("\n".join(problems))
    # None is no value of a typed flag, and what many settings are turned off by
    emptied = [word for word in arguments if EMPTIED.fullmatch(word)]
    config, rest = _parse([word for word in arguments if word not in emptied], path, saved)
    for word in emptied:
        with config.ignore_type():
            config_path.set_value(word[len("--config.") : -len("=None")], config, None)
    if len(rest) > 1:
        raise ValueError(f"{' '.join(rest[1:])} is no flag; write --config.section.field=value.")
    return config


def _parse(
    arguments: Sequence[str], path: str, saved: ConfigDict | None = None
) -> tuple[ConfigDict, list[str]]:
    found = flags.FlagValues()
    words = ["ntkrl", *arguments]
    given = {"flag_values": found, "sys_argv": words}
    if saved is None:
        config_flags.DEFINE_config_file("config", None, "Path of a config file.", **given)
    else:
        config_flags.DEFINE_config_dict("config", saved, **given)
    try:
        rest = found(words)
        return found.config, rest
    except SyntaxError as error:
        raise ValueError(f"{path} is not valid Python: {error}.") from error
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(_text(error)) from error


def _unknown_key(word: str, config: ConfigDict) -> str | None:
    """Say that an override's key does not exist, with the nearest known one."""
    name = word.split("=")[0].lstrip("-")
    if not name.startswith("config."):
        return None
    try:
        config_path.get_value(name.removeprefix("config."), config)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        return f"--{name} does not exist. {_text(error)}"
    return None


def _text(error: Exception) -> str:
    # a KeyError prints its message quoted and escaped
    return " ".join(str(error.args[0]).split()) if error.args else str(error)


def read_section(kind: type[Settings], section: ConfigDict, name: str) -> Settings:
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
        elif key in given and given[key] is None and "None" not in str(field.type):
            problems.append(f"{name}.{key} must not be None")
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
    """Return the ConfigDict that `to_json` came from; what is None may be set to anything."""
    return ConfigDict({name: _typed(value) for name, value in values.items()})


def _typed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _typed(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return tuple(value)
    return placeholder(object) if value is None else value


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
