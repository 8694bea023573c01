"""Examples in docstrings: they run and print the documented output."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import pytest

import ntkrl
from ntkrl import ntk
from tests.toys import TINY

MODULES = ["ntkrl.ntk"] + [
    f"ntkrl.ntk.{name}" for name in ("kernel", "parts", "spectrum", "log_probs")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    """story: with a policy, its params and four tokens in two rows, as every example assumes."""
    policy, params = ntkrl.build("GPTNeoXForCausalLM", TINY, jax.random.key(0))
    names = {
        "jax": jax,
        "jnp": jnp,
        "ntk": ntk,
        "params": params,
        "policy": policy,
        "tokens": jnp.array([[5, 3, 8, 2], [7, 7, 1, 4]]),
    }
    result = doctest.testmod(importlib.import_module(name), extraglobs=names)
    assert result.attempted > 2 and not result.failed
