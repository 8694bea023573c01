"""RL post-training of language models, with exact kernels that explain each optimizer step.

`train`, `evaluate`, `kernels`, `open_run`, `Run` and `Steps` are the command line as calls; `load`,
`load_scorer`, `build` and `export` handle models; `ntk` serves any network and imports no RL.
"""

import importlib
from typing import Any

_ROOMS = {
    "api": ("Run", "Steps", "evaluate", "kernels", "open_run", "train"),
    "models": ("build", "export", "load", "load_scorer"),
}
__all__ = [
    *("Run", "Steps", "build", "evaluate", "export", "kernels"),
    *("load", "load_scorer", "ntk", "open_run", "train"),
]
__version__ = "0.1.0"


def __dir__() -> list[str]:
    """Return the public names; other modules are imported by their full names."""
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """Import a room at the first use of its names, so that reward workers start without JAX."""
    if name == "ntk":
        return importlib.import_module("ntkrl.ntk")
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(importlib.import_module(f"ntkrl.{room}"), name)
    raise AttributeError(f"module 'ntkrl' has no attribute {name!r}")
