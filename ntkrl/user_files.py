"""Python files of users: reward functions, rollout engines, studies."""

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


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
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module while it is executed
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
