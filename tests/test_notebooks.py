"""The notebooks as scripts, without a browser."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
PRINTED = {
    "kernels": ("of tr K in a context", "cosines of features:"),
    "rl": ("Run runs/notebooks/cfrl: finished after step 40", "page: runs/notebooks/cfrl/report"),
    "ledger": ("policy R", "nats, mean over", "(advantage "),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory whose base model all notebooks share."""
    pytest.importorskip("marimo")
    return tmp_path_factory.mktemp("notebooks")


def run(name, place):
    """Run a notebook in a directory and return what it printed."""
    command = [sys.executable, str(ROOT / "configs" / "notebooks" / f"{name}.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("name", PRINTED)
def test_it_runs_as_a_script(place, name):
    """Story: it prints its results, and the same numbers again from its finished runs."""
    first = run(name, place)
    assert all(words in first for words in PRINTED[name])
    again = [line for line in run(name, place).splitlines() if " is finished; " not in line]
    assert again and first.endswith("\n".join(again) + "\n")


def test_marimo_has_no_complaint():
    """Law: cells bind each name once, and import what they use."""
    pytest.importorskip("marimo")
    command = [sys.executable, "-m", "marimo", "check", "--strict", "configs/notebooks"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
