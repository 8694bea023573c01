"""From the words of a configuration to a reward function."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ntkrl.reward.functions import RewardFunction
from ntkrl.reward.processes import ProcessFunction
from ntkrl.reward.verifiers import BUILT_IN, IN_PROCESS, built_in

FORMS = f"{', '.join(BUILT_IN)} (built in), 'path/to/file.py:function' or a reward model directory"


def open_function(
    spec: str, seconds: float, options: Mapping[str, Any], **given: Any
) -> RewardFunction:
    """Load a reward function for a run: a user's own in a process of its own.

    Args:
      spec: as for `load_function`.
      seconds: that a call of a function in a process may take.
      options: replaces defaults of a built-in function.
      **given: `weight`, `shift`, `scale` and `on_failure` of a RewardFunction.

    Raises:
      ValueError: what `load_function` raises, or options that the function does not have.
    """
    if spec in BUILT_IN and spec not in IN_PROCESS:
        call = built_in(spec, options)
        unknown = sorted(set(options) - set(inspect.signature(BUILT_IN[spec]).parameters))
        if unknown:
            raise ValueError(f"reward.options.{spec} has no {', '.join(unknown)}.")
        return RewardFunction(spec, call, **given)
    if options:
        raise ValueError(f"reward.options: {spec!r} takes none.")
    served = ProcessFunction(spec, seconds)
    return RewardFunction(served.name, served, source=spec, **given)


def load_function(spec: str, weight: float = 1.0) -> RewardFunction:
    """Load a reward function into this process.

    A file is run once, however many of its functions are loaded. It is the user's own code
    and runs with the user's rights.

    Args:
      spec: name of a built-in function or "path/to/file.py:function".
      weight: finite factor of its rewards in the sum.

    Returns:
      The function; its name is that of the Python function.

    Raises:
      ValueError: another spec, no such file, a file that does not run, no such function in
        it, something that cannot be called, or parameters that do not fit the contract.
    """
    if spec in BUILT_IN:
        return RewardFunction(spec, BUILT_IN[spec], weight)
    file, colon, name = spec.rpartition(":")
    if not colon or not file.endswith(".py") or not name:
        raise ValueError(
            f"{spec!r} names no reward function{_near(spec, BUILT_IN)} Allowed is {FORMS}."
        )
    path = Path(file)
    if not path.is_file():
        beside = [str(other) for other in sorted(path.parent.glob("*.py"))]
        raise ValueError(
            f"reward function {spec}: there is no file {file}{_near(str(path), beside)} "
            "Paths are relative to the working directory."
        )
    members = vars(_run(path, spec))
    if name not in members:
        found = [n for n, value in members.items() if callable(value) and not n.startswith("_")]
        raise ValueError(
            f"reward function {spec}: {file} has no {name!r}{_near(name, found)} "
            f"It has: {', '.join(found) if found else 'no functions'}."
        )
    return RewardFunction(name, members[name], weight, source=spec)


def _run(path: Path, spec: str) -> ModuleType:
    # named by its contents too: an edited file is run anew within one process
    digest = hashlib.sha256(str(path.resolve()).encode() + path.read_bytes()).hexdigest()
    name = f"ntkrl_reward_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(module_spec)
    # Dataclasses look their module up by name while the file still runs.
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(
            f"reward function {spec}: {path} does not run: {type(error).__name__}: "
            f"{_first_line(error)} at {path}:{_line(error, path)}.{_import_hint(error)}"
        ) from error
    return module


def _first_line(error: Exception) -> str:
    return error.msg if isinstance(error, SyntaxError) else str(error)


def _line(error: Exception, path: Path) -> int | None:
    if isinstance(error, SyntaxError):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    return own[-1].lineno if own else None


def _import_hint(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return " Install it, or add the folder that holds it to PYTHONPATH."
    return ""


def _near(given: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else "."
