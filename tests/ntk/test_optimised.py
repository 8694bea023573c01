"""Programs with the compiler's optimisations, which other tests switch off, compute the same."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import jax, numpy as np
import ntkrl
from ntkrl import ntk

for width, layers, length, rows in ((96, 1, 4, 1), (64, 2, 8, 3), (128, 1, 16, 2)):
    config = dict(vocab_size=40, hidden_size=width, num_hidden_layers=layers,
                  num_attention_heads=2, intermediate_size=4 * width,
                  max_position_embeddings=32, rotary_pct=0.25)
    policy, params = ntkrl.build("GPTNeoXForCausalLM", config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (rows, length), 0, 40)
    where = ntk.last_positions(tokens)
    found = {}
    for algorithm, chunk in (("jvp_vjp", 16), ("layerwise", None), ("layerwise", width // 2)):
        body = np.asarray(ntk.kernel(policy, params, where, algorithm=algorithm).body(chunk=chunk))
        found[algorithm, chunk] = body
    first = found.pop(("jvp_vjp", 16))
    for name, other in found.items():
        error = np.abs(other - first).max() / np.abs(first).max()
        print(width, name, error)
        assert error < 2e-5, (width, name, error)
"""


def test_algorithms_agree_in_optimised_programs():
    """oracle: algorithms against each other at sizes where XLA's CPU backend fuses products.

    With one product per leaf summed up, jax 0.10.2 gave garbage in the layer-wise algorithm here.
    """
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
