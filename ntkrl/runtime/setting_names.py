"""Names of settings that a config does not have, and the ones that may be meant."""

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_flags import config_path

from ntkrl.messages import did_you_mean

ERRORS = (AttributeError, KeyError, IndexError, TypeError, ValueError)
"""Exceptions of a path that leads nowhere."""
MOST_NAMES = 3
"""Settings suggested for the beginning of a name."""


def name_problem(name: str, config: ConfigDict, prefix: str = "") -> str | None:
    """Return why a dotted name is no setting, as the end of a sentence about it, or None.

    Args:
      name: such as "rollout.temperature" or "stages[0].steps".
      config: of a run.
      prefix: of names in the answer, such as "--config.".
    """
    try:
        value = config_path.get_value(name, config)
    except ERRORS:
        return f" does not exist{_rows(name, config, prefix) or _nearest(name, config, prefix)}"
    if not isinstance(value, ConfigDict):
        return None
    kind = "row" if name.endswith("]") else "section"
    return f" is a {kind}; name a setting in it, such as {prefix}{name}.{next(iter(value))}."


def _rows(name: str, config: ConfigDict, prefix: str) -> str:
    """Return what is wrong with the number of a row, or where it is missing."""
    parent, bracket, rest = name.partition("[")
    if not bracket:
        parent, _, rest = name.partition(".")
    try:
        rows = config_path.get_value(parent, config)
    except ERRORS:
        return ""
    if not isinstance(rows, list | tuple):
        return ""
    count = len(rows)
    if not bracket:
        return f": {parent} has rows; name the first by {prefix}{parent}[0].{rest}."
    number = rest.partition("]")[0]
    if not number.lstrip("-").isdigit():
        return f": rows are numbered from 0, as {prefix}{parent}[0]."
    if -count <= int(number) < count:
        return ""
    words = "row" if count == 1 else "rows"
    return (
        f": {parent} has {count} {words}, up to {parent}[{count - 1}]; add more in a config file."
    )


def _nearest(name: str, config: ConfigDict, prefix: str) -> str:
    """Return the settings with the same last word, or the one of nearest spelling."""
    row, bracket, _ = name.partition("].")
    names = list(_names(config))
    if bracket:
        stage = config_path.get_value(f"{row}]", config)
        names = [f"{row}].{key}" for key in stage] if isinstance(stage, ConfigDict) else []
    same = [each for each in names if each.rpartition(".")[2] == name.rpartition(".")[2]]
    if same and "." not in name:
        return f"; did you mean {' or '.join(repr(prefix + each) for each in same)}?"
    longer = [each for each in names if each.startswith(name) and "." in name]
    if 0 < len(longer) <= MOST_NAMES:
        return f"; did you mean {' or '.join(repr(prefix + each) for each in longer)}?"
    hint = did_you_mean(prefix + name, [prefix + each for each in names])
    return hint or "; `ntkrl settings` lists all."


def _names(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all settings."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
