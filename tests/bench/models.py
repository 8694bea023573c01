"""Compare models loaded by this package with transformers': `python -m tests.bench.models`.

Random weights at the odd shapes of tests/models/families.py, float32, left and right padding: the
largest difference of logits (over all shapes of a family), of PEFT's adapted logits and of reward
models' scores (at one shape).
"""

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import ntkrl
from ntkrl import models
from ntkrl.models.families import FAMILIES
from tests.bench import measure
from tests.models.families import CASES, EACH, tokens_and_mask, torch_logits, torch_model
from tests.models.test_lora import with_adapters
from tests.models.test_scorers import right_padded, torch_scorer


def logits_error(model: Any, directory: Path) -> float:
    """Return the largest difference of logits on real tokens."""
    policy, params = ntkrl.load(directory)
    tokens, mask = tokens_and_mask(policy.vocab_size)
    features = jax.jit(policy.features)(params, jnp.asarray(tokens), jnp.asarray(mask))
    gap = np.abs(np.asarray(policy.head(params, features)) - torch_logits(model, tokens, mask)[0])
    return float(gap[mask].max())


def score_error(case: str, directory: Path) -> float:
    """Return the largest difference of a reward model's scores."""
    model = torch_scorer(case, directory)
    scorer, params = models.load_scorer(directory)
    tokens, mask = right_padded(scorer.vocab_size)
    with torch.no_grad():
        out = model(torch.tensor(tokens), attention_mask=torch.tensor(mask).long()).logits[:, 0]
    arrays = (jnp.asarray(tokens), jnp.asarray(mask), jnp.zeros(len(tokens), int))
    result = jax.jit(scorer.score)(params, *arrays)["score"]
    return float(np.abs(np.asarray(result) - out.numpy()).max())


def row(case: str, place: Path) -> dict[str, Any]:
    """Measure a family, named by one of its cases."""
    architecture = CASES[case][1]
    shapes = [name for name, (_, model, _) in CASES.items() if model == architecture]
    logits, tied = [], set()
    for name in shapes:
        directory = place / name
        model = torch_model(name, directory)
        logits.append(logits_error(model, directory))
        tied.add(model.config.tie_word_embeddings)
    adapted = with_adapters(case, place)
    return {
        "family": FAMILIES[architecture].label,
        "shapes": len(shapes),
        "tied": " and ".join(sorted("yes" if is_tied else "no" for is_tied in tied)),
        "logits": f"{max(logits):.1e}",
        "LoRA": f"{logits_error(adapted, place / 'adapter'):.1e}",
        "reward model": f"{score_error(case, place / 'scorer'):.1e}",
    }


def main() -> None:
    """Print a row for every family."""
    rows = []
    for case in EACH:
        with tempfile.TemporaryDirectory() as directory:
            rows.append(row(case, Path(directory)))
    print(measure.table(rows, tuple(rows[0])))


if __name__ == "__main__":
    main()
