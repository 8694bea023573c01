"""RL post-training of language models that can say why a step did what it did.

Imports neither RL nor data rooms: `ntkrl.ntk` serves any model on its own.
"""

from ntkrl import ntk
from ntkrl.models import build, export, load

__all__ = ["build", "export", "load", "ntk"]
__version__ = "0.1.0"
