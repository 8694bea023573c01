"""Kinds of directories: of a run, of a Hugging Face model; sentences where the other is meant."""

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ntkrl.json_files import read_object
from ntkrl.messages import joined

RUN_KEYS = ("run_dir", "stages", "seed")
"""Fields of a run's config.json, of which a model's has none."""
MODEL_KEYS = ("model_type", "architectures")


def is_run_config(values: Mapping[str, Any]) -> bool:
    """Return whether the values of a config.json are those of a run."""
    return any(key in values for key in RUN_KEYS)


def is_run(path: Path) -> bool:
    """Return whether a directory has the config.json of a run."""
    return is_run_config(_config(path))


def is_model(path: Path) -> bool:
    """Return whether a directory is that of a Hugging Face model or of an adapter."""
    values = _config(path)
    if is_run_config(values):
        return False
    return any(key in values for key in MODEL_KEYS) or (path / "adapter_config.json").is_file()


def not_a_model(path: Path) -> str | None:
    """Return a sentence about a path that is no model but a run or a part of one, else None."""
    runs = [place for place in (path, *path.parents[:1]) if is_run(place)]
    if not runs or is_model(path):
        return None
    export = runs[0] / "export"
    fix = f"its model is {export}" if export.is_dir() else f"`ntkrl export {runs[0]} OUT` writes it"
    where = "is" if path == runs[0] else "is in"
    name = "a run directory" if path == runs[0] else f"the run directory {runs[0]}"
    return f"{path} {where} {name} of `ntkrl train`, not a model; {fix}."


def not_a_run(path: Path) -> str | None:
    """Return the predicate of a sentence about a path that is no run directory, else None."""
    if is_run(path):
        return None
    if not path.exists():
        return f"is not a run directory: it does not exist{nearest(path, is_run) or '.'}"
    if path.is_file():
        return "is a file, not a run directory."
    if is_model(path):
        return (
            "is a Hugging Face directory, not a run directory of `ntkrl train`: it needs no "
            f"export, and `ntkrl evaluate --config=… --config.model.path={path}` scores it."
        )
    if (path / "config.json").is_file():
        return "is not a run directory: its config.json is not that of a run."
    runs = sorted(str(each.parent) for each in path.glob("*/config.json") if is_run(each.parent))
    hint = f"; it holds the runs {joined(runs, ', ', 5)}" if runs else ""
    return f"is not a run directory: it has no config.json{hint}."


def nearest(path: Path, suits: Callable[[Path], bool] = Path.exists) -> str:
    """Return "; did you mean …?" with the name beside a missing path that is nearest to its.

    Args:
      path: that does not exist.
      suits: whether a path may be meant.
    """
    parent = path.parent
    if not parent.is_dir():
        return ""
    known = [each.name for each in parent.iterdir() if each.name[:1] != "." and suits(each)]
    near = difflib.get_close_matches(path.name, known, n=1)  # not of paths, which share their start
    return f"; did you mean {str(path.with_name(near[0]))!r}?" if near else ""


def _config(path: Path) -> Mapping[str, Any]:
    """Return the config.json of a directory; empty where there is none that can be read."""
    try:
        return read_object(path / "config.json", finite=False)
    except (ValueError, OSError):
        return {}
