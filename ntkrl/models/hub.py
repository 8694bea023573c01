"""Names on the Hugging Face hub: fetched when asked for by name, never otherwise."""

from __future__ import annotations

import re
from pathlib import Path

from ntkrl.models.files import COMPANIONS

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WANTED = ("config.json", "*.safetensors", "*.safetensors.index.json", *COMPANIONS)


def local_directory(path: str | Path) -> Path:
    """Return the directory itself, or the local copy of a model on the hub.

    Args:
      path: a directory, or a hub name such as `EleutherAI/pythia-160m`; fetched files are kept by
        `huggingface_hub` and used again, and HF_HUB_OFFLINE=1 keeps it from the network.

    Raises:
      ValueError: a name that is no directory and could not be fetched.
    """
    directory = Path(path)
    if directory.exists() or not NAME.fullmatch(str(path)):
        return directory
    import huggingface_hub  # takes a second, and most runs need none of it

    try:
        return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=list(WANTED)))
    except (OSError, ValueError, RuntimeError) as error:
        # what the hub's client raises for offline mode, lost connections, unknown and gated names
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"model.path {str(path)!r} is no directory here, and as a name on the Hugging Face hub "
            f"it could not be fetched ({type(error).__name__}: {reason}). Give a model directory "
            "(config.json, *.safetensors, tokenizer files), or fetch it where there is a network."
        ) from error
