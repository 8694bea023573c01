"""TRL's losses written out by hand, to verify `tests.bench.trl_peer.one_step`.

Everything is float64 torch on the logits of transformers' model: advantages, loss, `backward`, one
step of SGD, as in TRL 1.16.0. `python -m tests.bench.trl_peer --check` runs `check`.
"""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import transformers

from tests.bench.trl_peer import Batch, one_step
from tests.toys import TINY, torch_neox

TOLERANCE = 1e-6
COMMON = {"num_generations": 4, "learning_rate": 0.05}
CASES = (
    ("grpo", {"beta": 0.0}),
    ("grpo", {"beta": 0.3, "use_bias_correction_kl": False}),
    ("grpo", {"beta": 0.3, "use_bias_correction_kl": True}),
    ("grpo", {"beta": 0.0, "scale_rewards": "batch", "entropy_coef": 0.2}),
    ("dapo", {"beta": 0.3, "epsilon_high": 0.28}),
    ("dr_grpo", {"beta": 0.0, "scale_rewards": "none", "max_completion_length": 50}),
    ("bnpo", {"beta": 0.3}),
    ("cispo", {"beta": 0.0, "epsilon_high": 1.1}),
    ("gspo", {"beta": 0.0, "epsilon": 0.05, "epsilon_high": 0.07}),
    ("rloo", {"beta": 0.0}),
    ("rloo", {"beta": 0.3, "epsilon_high": 0.5}),
    ("rloo", {"beta": 0.3, "normalize_advantages": True, "reward_clip_range": (-1.0, 1.0)}),
)
DEFAULTS = {
    "epsilon": 0.2,
    "epsilon_high": None,
    "use_bias_correction_kl": True,
    "scale_rewards": "group",
    "entropy_coef": 0.0,
    "normalize_advantages": False,
    "reward_clip_range": (-np.inf, np.inf),
}


def step(kind: str, directory: str, batch: Batch, options: dict[str, Any]) -> dict[str, np.ndarray]:
    """Do the same as `one_step`, with a loss written here in float64."""
    settings = {**DEFAULTS, "max_completion_length": batch.completion_mask.shape[1], **options}
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    old_BC, ref_BC, rewards_B = (
        torch.tensor(array, dtype=torch.float64)
        for array in (batch.old_log_probs, batch.ref_log_probs, batch.rewards)
    )
    mask_BC, tokens_BT = torch.tensor(batch.completion_mask), torch.tensor(batch.tokens)
    length = mask_BC.shape[1]
    out = model(tokens_BT, attention_mask=torch.tensor(batch.mask).long())
    log_pi_BCV = out.logits[:, -length - 1 : -1].log_softmax(-1)
    new_BC = log_pi_BCV.gather(-1, tokens_BT[:, -length:, None])[..., 0]
    if kind == "rloo":
        loss = _rloo(new_BC, old_BC, ref_BC, mask_BC, rewards_B, settings)
    else:
        loss = _grpo(kind, new_BC, old_BC, ref_BC, mask_BC, rewards_B, settings)
        entropy_BC = -(log_pi_BCV.exp() * log_pi_BCV).sum(-1)
        loss = loss - settings["entropy_coef"] * entropy_BC[mask_BC].mean()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(settings["learning_rate"] * parameter.grad)
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        return safetensors.numpy.load_file(f"{place}/model.safetensors")


def _grpo(kind: str, new_BC, old_BC, ref_BC, mask_BC, rewards_B, settings: dict) -> torch.Tensor:
    low = settings["epsilon"]
    high = low if settings["epsilon_high"] is None else settings["epsilon_high"]
    rewards_PN = rewards_B.view(-1, settings["num_generations"])
    advantages_PN = rewards_PN - rewards_PN.mean(1, keepdim=True)
    if settings["scale_rewards"] == "group":
        advantages_PN = advantages_PN / (rewards_PN.std(1, correction=1, keepdim=True) + 1e-4)
    elif settings["scale_rewards"] == "batch":
        advantages_PN = advantages_PN / (rewards_PN.std(correction=1) + 1e-4)
    advantages_B1 = advantages_PN.reshape(-1, 1)

    lengths_B = mask_BC.sum(1)
    ratio_BC = torch.where(mask_BC, new_BC - old_BC, 0.0).exp()
    if kind == "gspo":  # the geometric mean of the token ratios
        ratio_BC = (ratio_BC.log().sum(1) / lengths_B).exp()[:, None].expand(ratio_BC.shape)
    if kind == "cispo":
        loss_BC = -ratio_BC.clamp(max=high).detach() * advantages_B1 * new_BC
    else:
        clipped_BC = ratio_BC.clamp(1 - low, 1 + high)
        loss_BC = -torch.minimum(ratio_BC * advantages_B1, clipped_BC * advantages_B1)
    if settings["beta"]:
        gap_BC = torch.where(mask_BC, ref_BC - new_BC, 0.0)
        kl_k3_BC = gap_BC.exp() - 1 - gap_BC
        if settings["use_bias_correction_kl"]:
            kl_k3_BC = ratio_BC * kl_k3_BC
        loss_BC = loss_BC + settings["beta"] * kl_k3_BC

    totals_B = torch.where(mask_BC, loss_BC, 0.0).sum(1)
    if kind in ("grpo", "gspo"):
        return (totals_B / lengths_B).mean()
    if kind == "dr_grpo":
        return totals_B.sum() / (len(totals_B) * settings["max_completion_length"])
    return totals_B.sum() / lengths_B.sum()  # dapo, bnpo, cispo: the same with one batch


def _rloo(new_BC, old_BC, ref_BC, mask_BC, rewards_B, settings: dict) -> torch.Tensor:
    low = settings["epsilon"]
    high = low if settings["epsilon_high"] is None else settings["epsilon_high"]
    total = lambda array_BC: torch.where(mask_BC, array_BC, 0.0).sum(1)  # noqa: E731
    rewards_B = rewards_B.clamp(*settings["reward_clip_range"])
    rewards_B = rewards_B - settings["beta"] * total(old_BC - ref_BC)  # k1, without a gradient
    rewards_PN = rewards_B.view(-1, settings["num_generations"])
    others_PN = rewards_PN.sum(1, keepdim=True) - rewards_PN
    advantages_B = (rewards_PN - others_PN / (settings["num_generations"] - 1)).view(-1)
    if settings["normalize_advantages"]:
        centred_B = advantages_B - advantages_B.mean()
        advantages_B = centred_B / (advantages_B.std(correction=1) + 1e-4)
    ratio_B = total(new_BC - old_BC).exp()
    clipped_B = ratio_B.clamp(1 - low, 1 + high)
    return -torch.minimum(ratio_B * advantages_B, clipped_B * advantages_B).mean()


def example(directory: str, prompts: int = 3, group: int = 4, seed: int = 0) -> Batch:
    """Build a random model, and off-policy completions of unequal length."""
    model = torch_neox(directory, seed)
    generator, rows = np.random.default_rng(seed), prompts * group
    prompt, length = 6, 9
    tokens = generator.integers(0, TINY["vocab_size"], (rows, prompt + length))
    tokens[:, :prompt] = tokens[::group, :prompt].repeat(group, axis=0)
    mask = np.ones(tokens.shape, bool)
    starts = generator.integers(0, prompt - 1, prompts).repeat(group)
    mask[:, :prompt] = np.arange(prompt) >= starts[:, None]
    lengths = generator.integers(1, length + 1, rows)
    mask[:, prompt:] = np.arange(length) < lengths[:, None]
    with torch.no_grad():
        out = model(torch.tensor(tokens), attention_mask=torch.tensor(mask).long())
    log_pi = out.logits[:, prompt - 1 : -1].log_softmax(-1)
    log_probs = log_pi.gather(-1, torch.tensor(tokens[:, prompt:, None]))[..., 0].numpy()
    # nats per token: of the ratios of tokens and of sequences, some are clipped on either side
    noise = generator.normal(size=(2, *log_probs.shape)) * np.array([0.2, 0.5])[:, None, None]
    return Batch(
        tokens=tokens,
        mask=mask,
        completion_mask=mask[:, prompt:],
        old_log_probs=log_probs + noise[0],
        ref_log_probs=log_probs + noise[1],
        rewards=generator.normal(size=rows),
    )


def check() -> list[str]:
    """Compare `one_step` with `step`, a line for each case.

    Raises:
      AssertionError: a weight differs by more than TOLERANCE.
    """
    lines, errors = [], []
    with tempfile.TemporaryDirectory() as directory:
        batch = example(directory)
        before = safetensors.numpy.load_file(f"{directory}/model.safetensors")
        for kind, options in CASES:
            result = one_step(kind, directory, batch, COMMON | options)
            expected = step(kind, directory, batch, COMMON | options)
            errors.append(_gap(result, expected))
            shown = ", ".join(f"{name} {value}" for name, value in options.items())
            moved = _gap(result, before)
            lines.append(f"{kind:8s} moved {moved:.1e}  off by {errors[-1]:.1e}  ({shown})")
    if not max(errors) <= TOLERANCE:
        raise AssertionError("\n".join(["TRL differs from the formulas by hand:", *lines]))
    return lines


def _gap(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> float:
    assert left.keys() == right.keys(), left.keys() ^ right.keys()
    return max(float(np.abs(left[name] - right[name]).max()) for name in left)
