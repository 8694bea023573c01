"""Configs (ml_collections) with `--config.section.field=value` overrides.

Rooms below `setup` see frozen dataclasses, one per section, never a ConfigDict.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder
from ml_collections.config_flags import config_path

from ntkrl.messages import did_you_mean
from ntkrl.runtime.config_files import load_config
from ntkrl.runtime.setting_names import name_problem
from ntkrl.runtime.value_types import flag_problem, type_problems
from ntkrl.shorthands import apply_shorthands

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")
SET_TO_NONE = re.compile(r"--config\.([^.=]+\.[^.=]+)=None")


def read_config(
    arguments: Sequence[str],
    saved: ConfigDict | None = None,
    shorthands: Mapping[str, Any] | None = None,
) -> ConfigDict:
    """Read `--config=NAME` and its overrides, or the overrides of a saved config.

    Args:
      arguments: `--config…` words of a command line.
      saved: from `from_json`; replaces the file.
      shorthands: values by name, see `apply_shorthands`; overrides win over them.

    Raises:
      ValueError: no config or two, a file that does not load, an unknown key, a value of the wrong
        type, or arguments that are not flags.
    """
    arguments = join_config_flag(arguments)
    named = [word.removeprefix("--config=") for word in arguments if word.startswith("--config=")]
    overrides = [word for word in arguments if not word.startswith("--config=")]
    if saved is not None and named:
        raise ValueError(
            f"--config={named[-1]}: the run has its own config; leave out one of the two."
        )
    if saved is None and not (named and named[-1]):
        raise ValueError("--config=NAME is missing, for example --config=rl or --config=my_run.py.")
    if len(named) > 1:
        raise ValueError(f"--config is there {len(named)} times: {', '.join(named)}; give one.")
    config = load_config(named[-1]) if saved is None else saved
    if "run_dir" not in config:
        raise ValueError(
            f"--config={named[-1]} has no run_dir; start from the defaults, as in "
            "config = base.get_config() (from ntkrl.configs import base), and change some."
        )
    apply_shorthands(config, {} if shorthands is None else shorthands)
    return _override(overrides, config)


def join_config_flag(arguments: Sequence[str]) -> list[str]:
    """Return arguments with `--config FILE` written as `--config=FILE`."""
    joined = list(arguments)
    if "--config" in joined[:-1]:
        at = joined.index("--config")
        joined[at : at + 2] = [f"--config={joined[at + 1]}"]
    return joined


def _override(arguments: Sequence[str], config: ConfigDict) -> ConfigDict:
    problems = [
        problem
        for word in arguments
        if (problem := _unknown_key(word, config) or _wrong_value(word, config))
    ]
    if problems:
        raise ValueError("\n".join(problems))
    # None is not a value of a typed flag, but turns many settings off; the last of several counts
    last = {word.partition("=")[0].lstrip("-"): word for word in arguments}
    unset = [match[1] for word in last.values() if (match := SET_TO_NONE.fullmatch(word))]
    typed = [word for word in arguments if not SET_TO_NONE.fullmatch(word)]
    values, argv = flags.FlagValues(), ["ntkrl", *typed]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    try:
        positional = values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(_text(error)) from error
    if len(positional) > 1:
        raise ValueError(
            f"{' '.join(positional[1:])} is not a flag; write --config.section.field=value."
        )
    result = values.config
    with result.ignore_type():
        for name in unset:
            config_path.set_value(name, result, None)
    return result


def _unknown_key(argument: str, config: ConfigDict) -> str | None:
    """Return a message with the nearest known key if an override's key is not that of a setting."""
    name = argument.split("=")[0].lstrip("-")
    if not name.startswith("config."):
        return None
    problem = name_problem(name.removeprefix("config."), config, "--config.")
    return None if problem is None else f"--{name}{problem}"


def _wrong_value(argument: str, config: ConfigDict) -> str | None:
    """Return a message if the value of an override is not of the type of its setting."""
    flag, equals, text = argument.partition("=")
    name = flag.lstrip("-").removeprefix("config.")
    if not flag.startswith("--config.") or not equals or text == "None":
        return None
    default = config_path.get_value(name, config)
    return flag_problem(flag, text, config_path.get_type(name, config), default)


def _text(error: Exception) -> str:
    # str() of a KeyError quotes and escapes its message
    return " ".join(str(error.args[0]).split()) if error.args else str(error)


def parse_section(kind: type[Settings], section: ConfigDict, name: str) -> Settings:
    """Convert a config section to its frozen dataclass; `name` is the section's in messages.

    Raises:
      ValueError: missing or unknown fields (all of them, with the nearest known name), or values
        that the dataclass rejects.
    """
    values = section.to_dict() if isinstance(section, ConfigDict) else dict(section)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    problems = []
    for key in values:
        if key not in fields:
            hint = did_you_mean(key, fields) or f"; known: {', '.join(fields)}"
            problems.append(f"{name}.{key} does not exist{hint}")
    for key, field in fields.items():
        optional = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if key not in values and not optional:
            problems.append(f"{name}.{key} is missing")
    problems += type_problems(kind, values, name)
    if problems:
        raise ValueError("; ".join(problems) + ".")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config section {name}: {error}") from error


def to_json(config: ConfigDict) -> dict[str, Any]:
    """Return the config as JSON values (tuples become lists)."""
    return _json(config.to_dict())


def from_json(values: Mapping[str, Any]) -> ConfigDict:
    """Return the ConfigDict of `to_json`; fields that are None accept any type."""
    return ConfigDict({name: _typed(value) for name, value in values.items()})


def _typed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _typed(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return tuple(value)
    return placeholder(object) if value is None else value


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the fields in which two configs differ, as `stages[0].steps: old -> new`."""
    changed = []
    for key in sorted({*old, *new}):
        before = old[key] if key in old else "(absent)"
        after = new[key] if key in new else "(absent)"
        changed += _difference(f"{prefix}{key}", before, after)
    return changed


def _difference(name: str, before: Any, after: Any) -> list[str]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        return differences(before, after, f"{name}.")
    if before == after:
        return []
    if isinstance(before, list) and isinstance(after, list):
        pairs = list(enumerate(zip(before, after, strict=False)))
        rows = all(isinstance(entry, Mapping) for entry in (*before, *after))
        if len(before) == len(after) or rows:
            changed = [d for i, pair in pairs for d in _difference(f"{name}[{i}]", *pair)]
            lengths = f"{name}: {len(before)} -> {len(after)} entries"
            return changed if len(before) == len(after) else [lengths, *changed]
    return [f"{name}: {before!r} -> {after!r}"]


def _json(value: Any) -> Any:
    if isinstance(value, ConfigDict):
        return _json(value.to_dict())
    if isinstance(value, Mapping):
        return {str(key): _json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value
