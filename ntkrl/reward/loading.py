"""From the words of a configuration to a reward function."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from ntkrl.reward import expressions
from ntkrl.reward.functions import RewardFunction

BUILT_IN = "expressions"
FORMS = f"{BUILT_IN!r} (built in) or 'path/to/file.py:function'"


def load_function(spec: str, weight: float = 1.0) -> RewardFunction:
    """Load a reward function.

    A file is run once, however many of its functions are loaded. It is the user's own code
    and runs with the user's rights.

    Args:
      spec: "expressions" or "path/to/file.py:function".
      weight: finite factor of its rewards in the sum.

    Returns:
      The function; its name is that of the Python function.

    Raises:
      ValueError: another spec, no such file, a file that does not run, no such function in
        it, something that cannot be called, or parameters that do not fit the contract.
    """
    if spec == BUILT_IN:
        return RewardFunction(BUILT_IN, expressions.score, weight)
    file, colon, name = spec.rpartition(":")
    if not colon or not file.endswith(".py") or not name:
        raise ValueError(
            f"{spec!r} names no reward function{_near(spec, [BUILT_IN])} Allowed is {FORMS}."
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
