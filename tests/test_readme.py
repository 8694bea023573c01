"""The README keeps its word: its Python runs, its commands and files exist."""

import re
from pathlib import Path

import pytest

from ntkrl.main import USAGE
from ntkrl.report import ALIASES
from tests.toys import torch_neox

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    """Return the fenced code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_kernel_examples_run(tmp_path):
    """story: the examples of the kernels section, the first on a tiny model in DIR's place."""
    torch_neox(tmp_path)
    example, own = [block for block in blocks("python") if "ntk.kernel" in block]
    exec(compile(own, "README", "exec"), {})
    names = {}
    exec(compile(example.replace('"DIR"', repr(str(tmp_path))), "README", "exec"), names)
    kernel = names["kernel"]
    assert kernel.head.shape == (2, 2)
    assert kernel.dense(rows=[5, 8], columns=[0, 1]).shape == (2, 2, 2, 2)


def test_reward_example_runs():
    """story: the reward function scores and has TRL's signature."""
    (example,) = [block for block in blocks("python") if "def score" in block]
    names = {}
    exec(compile(example, "README", "exec"), names)
    assert names["score"](completions=["4 ", "5"], answer=["4", "4"], prompts=[]) == [1.0, 0.0]


def test_stages_example_is_the_config():
    """law: the two rows shown are the two rows of configs/cfrl.py."""
    (example,) = [block for block in blocks("python") if "config.stages" in block]
    source = (ROOT / "configs" / "cfrl.py").read_text(encoding="utf-8")
    assert re.sub(r"\s+", "", example) in re.sub(r"\s+", "", source)


COMMANDS = ["train", "evaluate", "prepare", "plan", "kernel", "report", "export"]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_known(command):
    """law: every command of the table is one of the command line, and the other way round."""
    assert f"`ntkrl {command} " in TEXT and f"\n  {command} " in USAGE


def test_aliases_are_the_tables():
    """law: every library whose names can be written is shown with one of them."""
    shown = [pair for pair in re.findall(r"(\w+)`\s+\(`([\w/]+)`\)", TEXT) if pair[0] in ALIASES]
    assert {style for style, _ in shown} == set(ALIASES)
    assert all(name in ALIASES[style].values() for style, name in shown)


def test_files_exist():
    """law: every path the README names is there."""
    named = set(re.findall(r"`((?:ntkrl|tests|configs|launch)/[\w/.]*)`", TEXT))
    named |= set(re.findall(r"bash (launch/\w+\.sh)", TEXT))
    assert len(named) > 15
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_no_private_paths():
    """law: every path in the README is relative to the checkout."""
    assert re.findall(r"(?<![\w.])/\w+/\w+", TEXT) == []
