"""RL post-training of language models that can say why a step did what it did.

Imports neither RL nor data rooms: `ntkrl.ntk` serves any model on its own.
"""

import importlib
from typing import Any

__all__ = ["build", "export", "load", "load_scorer", "ntk"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a room when it is first asked for: processes that serve rewards do without JAX."""
    if name not in __all__:
        raise AttributeError(f"module 'ntkrl' has no attribute {name!r}")
    if name == "ntk":
        return importlib.import_module("ntkrl.ntk")
    return getattr(importlib.import_module("ntkrl.models"), name)
