"""One SGD step of this library and of TRL on the same weights, tokens and rewards.

    python -m tests.bench.trl_parity

Off policy, so that every clip is active; completions of different lengths after padded prompts. A
row has the largest change of a weight by the step and the largest difference of a weight after it.
"""

import dataclasses
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

import ntkrl
from ntkrl import scoring, update
from ntkrl.types import UpdateBatch
from ntkrl.update import RolloutArrays, token_weights
from tests.bench import measure
from tests.toys import torch_neox

ROWS, GROUP, PROMPT, LENGTH, RATE = 16, 4, 6, 9, 0.05

# our preset · what it sets here besides · TRL's kind · TRL's options for the same formula
K3 = {"beta": 0.04, "use_bias_correction_kl": False}
UNFILTERED = {"overlong": "keep", "group_filter": "off"}
CASES: tuple[tuple[str, dict[str, Any], str, dict[str, Any]], ...] = (
    ("rloo", {}, "rloo", {"beta": 0.05}),
    ("grpo", {}, "grpo", K3),
    (
        "grpo",
        {"advantage": "batch_scaled", "clip_high": 0.4},
        "grpo",
        K3 | {"scale_rewards": "batch", "epsilon_high": 0.4},
    ),
    ("dr_grpo", {}, "dr_grpo", {"scale_rewards": "none"}),
    ("dapo", UNFILTERED, "dapo", {"epsilon_high": 0.28}),
    (
        "dapo",
        UNFILTERED | {"entropy_coefficient": 0.02},
        "dapo",
        {"epsilon_high": 0.28, "entropy_coef": 0.02},
    ),
    ("gspo", {"clip_low": 0.2, "clip_high": 0.2}, "gspo", {}),
    ("gspo", {}, "gspo", {"epsilon": 3e-4, "epsilon_high": 4e-4}),
    ("cispo", {}, "cispo", {"epsilon_high": 5.0}),
)


def draw_batch(policy: ntkrl.types.Policy, params: Any) -> dict[str, np.ndarray]:
    """Return random tokens, rewards, and log-probs near the model's, so that ratios are near 1."""
    rng = np.random.default_rng(0)
    prompts = np.repeat(rng.integers(2, policy.vocab_size, (ROWS // GROUP, PROMPT)), GROUP, axis=0)
    tokens = np.concatenate([prompts, rng.integers(2, policy.vocab_size, (ROWS, LENGTH))], axis=1)
    mask = np.ones(tokens.shape, bool)
    short = np.repeat(rng.integers(0, 3, ROWS // GROUP), GROUP)
    mask[:, :PROMPT] = np.arange(PROMPT) >= short[:, None]
    completion_mask = np.arange(LENGTH) < rng.integers(1, LENGTH + 1, ROWS)[:, None]
    mask[:, PROMPT:] = completion_mask
    arguments = (jnp.asarray(tokens), jnp.asarray(mask), LENGTH)
    log_probs = np.asarray(scoring.score(policy, params, *arguments).log_probs)
    noise = rng.normal(size=(2, *log_probs.shape)).astype(np.float32)
    return {
        "tokens": tokens,
        "mask": mask,
        "completion_mask": completion_mask,
        "old_log_probs": log_probs + 0.3 * noise[0],
        "ref_log_probs": log_probs + 0.3 * noise[1],
        "rewards": rng.normal(size=ROWS).astype(np.float32),
    }


def our_step(
    objective: update.Objective, policy: Any, params: Any, arrays: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return all weights after one step of SGD, by their names on disk."""
    old, ref, rewards, completion_mask = (
        jnp.asarray(arrays[name])
        for name in ("old_log_probs", "ref_log_probs", "rewards", "completion_mask")
    )
    rollout = RolloutArrays(
        rewards=rewards,
        old_log_probs=old,
        ref_log_probs=ref,
        behaviour_log_probs=old,
        mask=completion_mask,
        finished=jnp.ones(ROWS, bool),
    )
    weights = token_weights(objective, GROUP, rollout, jax.random.key(0))
    batch = UpdateBatch(
        tokens=jnp.asarray(arrays["tokens"]),
        mask=jnp.asarray(arrays["mask"]),
        completion_mask=weights.mask,
        old_log_probs=old,
        ref_log_probs=ref,
        advantages=weights.advantages,
        penalties=weights.penalties,
    )
    stage = update.Stage("all", 1, ((".*", RATE),), optimizer="sgd")
    bound_stage = update.bind_stage(stage, policy, params)

    def loss(statistics: Any, part: UpdateBatch) -> Any:
        return update.policy_loss(objective, LENGTH, statistics, part)

    step = jax.jit(update.make_step(bound_stage, update.policy_loss_fn(policy, loss)))
    state, *_ = step(update.init_state(bound_stage, params, jax.random.key(0)), batch)
    with tempfile.TemporaryDirectory() as place:
        ntkrl.export(place, policy, state.params)
        return load_file(f"{place}/model.safetensors")


def main() -> None:
    """Print the table."""
    from tests.bench import trl_peer

    rows = []
    with tempfile.TemporaryDirectory() as directory:
        torch_neox(
            directory, vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=4
        )
        policy, params = ntkrl.load(directory)
        batch_arrays = draw_batch(policy, params)
        before = load_file(f"{directory}/model.safetensors")
        for preset, axes, kind, options in CASES:
            objective = dataclasses.replace(update.PRESETS[preset], **axes)
            trl_options = {"num_generations": GROUP, "learning_rate": RATE, **options}
            theirs = trl_peer.one_step(kind, directory, trl_peer.Batch(**batch_arrays), trl_options)
            ours = our_step(objective, policy, params, batch_arrays)
            gap = {name: np.abs(ours[name] - theirs[name]).max() for name in theirs}
            moved = max(np.abs(theirs[name] - before[name]).max() for name in theirs)
            set_here = ", ".join(f"{name}={value}" for name, value in axes.items())
            rows.append(
                {
                    "preset": preset,
                    "besides": set_here,
                    "moved": float(moved),
                    "difference": float(max(gap.values())),
                }
            )
    print(measure.table(rows, ("preset", "besides", "moved", "difference")))


if __name__ == "__main__":
    main()
