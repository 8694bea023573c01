"""Differences of the sampler's and the trainer's log-probs: `python -m tests.bench.log_ratio`.

Prompts of random tokens, left-padded to different lengths; completions are sampled at temperature 1
and scored by the trainer's forward pass. Prints the largest and the mean |log π(trainer) −
log π(sampler)| over the tokens (nats) by model, compute dtype and cache dtype. Arguments are
Hugging Face directories to measure too, with the params in float32. Lengths and models are options,
as in `--prompt=512 --completion=512 --prompts=2 --group=2 --only="Llama 128"`.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import data, models
from ntkrl.numerics import DTYPES
from ntkrl.rollout import Sampler, SamplerSettings
from ntkrl.scoring import score
from tests.bench import measure

PAIRS = (
    ("float32", "float32"),
    ("float32", "bfloat16"),
    ("bfloat16", "bfloat16"),
    ("float32", "float16"),
    ("float16", "float16"),
)
"""Compute dtype and cache dtype."""
SHAPES = ((64, 2, 0.02), (128, 6, 0.1), (256, 12, 0.05))
"""Width, layers and standard deviation of the random weights."""
SIZES = {"prompt": 32, "completion": 64, "prompts": 4, "group": 16}
"""Tokens of a prompt and of a completion, prompts, and completions of each."""


def config(architecture: str, width: int, layers: int, deviation: float) -> dict[str, Any]:
    """Return a config of a random model."""
    return {
        "vocab_size": 512,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 2 * width,
        "max_position_embeddings": 2048,
        "initializer_range": deviation,
        "tie_word_embeddings": architecture == "GPTNeoXForCausalLM",
        "rotary_pct": 0.25,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "head_dim": width // 4,
        "hidden_act": "silu" if architecture != "GPTNeoXForCausalLM" else "gelu",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }


def difference(policy: Any, params: Any, cache: str, sizes: argparse.Namespace) -> np.ndarray:
    """Return |log π(trainer) − log π(sampler)| of the sampled tokens."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(sizes.prompt // 4, sizes.prompt + 1, sizes.prompts)
    prompts = [generator.integers(3, min(policy.vocab_size, 500), n).tolist() for n in lengths]
    settings = SamplerSettings(
        sizes.group, sizes.completion, 1.0, end_ids=(1,), pad_id=2, cache_dtype=DTYPES[cache]
    )
    batch = data.prompt_batch(prompts, range(sizes.prompts), 2, sizes.prompt, None)
    rollout = Sampler(policy, settings)(params, batch, jax.random.key(0))
    length = rollout.completion_mask.shape[1]
    trainer = jax.jit(score, static_argnums=(0, 4))
    log_probs = trainer(policy, params, rollout.tokens, rollout.mask, length).log_probs
    gap_BC = np.abs(np.asarray(log_probs) - np.asarray(rollout.sampler_log_probs))
    return gap_BC[np.asarray(rollout.completion_mask)]


def rows(name: str, load: Any, sizes: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure a model at every pair of dtypes; `load(compute_dtype) -> policy, params`."""
    result = []
    for compute, cache in PAIRS:
        gaps = difference(*load(DTYPES[compute]), cache, sizes)
        row = {
            "model": name,
            "compute": compute,
            "cache": cache,
            "tokens": gaps.size,
            "largest": f"{gaps.max():.1e}",
            "mean": f"{gaps.mean():.1e}",
        }
        print(" | ".join(map(str, row.values())), file=sys.stderr, flush=True)
        result.append(row)
    return result


def main() -> None:
    """Print a row for every model and pair of dtypes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directories", nargs="*")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--only", default="", help="part of the names of random models")
    options = parser.parse_args()
    measured = []
    for architecture in ("LlamaForCausalLM", "GPTNeoXForCausalLM"):
        for shape in SHAPES:
            values = config(architecture, *shape)

            def build(compute: Any, values: Any = values, name: str = architecture) -> Any:
                options = models.ModelOptions(compute)
                return models.build(name, values, jax.random.key(0), jnp.float32, None, options)

            label = f"{architecture.removesuffix('ForCausalLM')} {shape[0]} × {shape[1]}"
            if options.only in label:
                measured += rows(f"{label}, weights {shape[2]}", build, options)
    for directory in options.directories:

        def load(compute: Any, directory: str = directory) -> Any:
            return models.load(directory, options=models.ModelOptions(compute))

        measured += rows(directory.rstrip("/").rpartition("/")[2], load, options)
    print(measure.table(measured, tuple(measured[0])))


if __name__ == "__main__":
    main()
