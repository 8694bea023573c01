"""Python files of users: reward functions, rollout engines, studies."""

import hashlib
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

IN_PROCESS = "python:"
"""Before the name of a function of the calling program, where a config would name a file's."""


class _UncachedLoader(importlib.machinery.SourceFileLoader):
    """Compiles the file itself: Python's cache keeps code of an edit in the same second."""

    def get_code(self, fullname: str) -> CodeType:
        """Return the code of the source as it is."""
        return self.source_to_code(self.get_data(self.path), self.path)


def execute(path: Path) -> ModuleType:
    """Return the module of a Python file, executed once with the user's rights.

    An edited file is executed again.

    Raises:
      FileNotFoundError: no such file.
      Exception: any that the file raises.
    """
    digest = hashlib.sha256(str(path.resolve()).encode() + path.read_bytes()).hexdigest()
    name = f"ntkrl_user_file_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    loader = _UncachedLoader(name, str(path))
    spec: Any = importlib.util.spec_from_file_location(name, path, loader=loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module while it is executed
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def check_trust(directory: Path, names: Sequence[str], trusted: bool) -> None:
    """Refuse code named by a file of a directory that another user may have written.

    Args:
      directory: whose config.json names it; trusted if below the working directory and, like the
        file, of this user.
      names: of the code, for messages.
      trusted: the user has said that it may be executed.

    Raises:
      ValueError: it is not trusted.
    """
    reasons = []
    if not directory.resolve().is_relative_to(Path.cwd().resolve()):
        reasons.append("is outside the current directory")
    owners = {(directory / name).stat().st_uid for name in (".", "config.json")}
    if hasattr(os, "geteuid") and owners != {os.geteuid()}:
        reasons.append("belongs to another user")
    if reasons and not trusted:
        raise ValueError(
            f"{directory}/config.json names code that would be executed with your rights, "
            f"{', '.join(names)}, and the directory {' and '.join(reasons)}. Read the code, then "
            "add --trust."
        )
