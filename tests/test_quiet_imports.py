"""Imports of transformers: its notice about PyTorch is left out, and other warnings are not."""

import os
import subprocess
import sys

CODE = """
import logging, os, sys
sys.modules["torch"] = None  # as if it were not installed
from ntkrl import chat_templates
chat_templates.import_transformers()
assert "TRANSFORMERS_NO_ADVISORY_WARNINGS" not in os.environ
from transformers.utils import is_torch_available, logging
assert not is_torch_available()
logging.get_logger("transformers").warning_advice("another warning")
"""


def test_pytorch_is_not_missed():
    """law: without PyTorch, importing transformers prints nothing; later warnings are printed."""
    environment = {key: value for key, value in os.environ.items() if "TRANSFORMERS" not in key}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "[transformers] another warning"
