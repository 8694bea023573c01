"""A tiny model, rows and settings for calls from Python, and a directory of their own."""

import os

import jax
import pytest

from ntkrl import data
from tests.toys import torch_neox

SMALL = {
    "data.prompts_per_step": 4,
    "data.max_prompt_tokens": 8,
    "rollout.completions_per_prompt": 2,
    "rollout.max_completion_tokens": 5,
    "eval.prompts": 4,
    "eval.samples_per_prompt": 2,
    "eval.every_steps": 3,
    "probe.prompts": 2,
    "probe.every_steps": 2,
    "probe.ledger_every_steps": 2,
    "mesh.data": 1,
}
ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(9) for b in range(9)]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny GPT-NeoX with the built-in task's tokenizer."""
    place = tmp_path_factory.mktemp("base")
    torch_neox(place, vocab_size=18, initializer_range=0.05)
    data.save_tokenizer(place)
    return place


@pytest.fixture(autouse=True, scope="module")
def empty_directory(tmp_path_factory):
    """Work in an empty directory, with one device of the eight."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("work"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
        yield
    os.chdir(before)
