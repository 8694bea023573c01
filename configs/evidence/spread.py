"""The effect of one prompt's policy gradient on answers to that prompt and to others, by R and G.

For a step along the gradient g_p of a prompt p, the first-order change of every token o is
J_o g_p = Σ_u A_u K(o, u), over the tokens u of the answers to p: the action of the kernel itself.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ntkrl import data, durable_files, models, ntk, scoring
from ntkrl.configs.evidence.answers import Answers, encode_answers, first_answers
from ntkrl.study import Results
from ntkrl.types import Array, Params, Policy

PROMPTS, PER_PROMPT = 6, 4
"""Prompts, and samples of each; prompts whose samples have equal rewards have no gradient."""
QUANTITIES = {"entropy": "entropy", "max_log_prob": "log π of the arg-max token"}
"""Fields of `ntk.TokenChanges`, in words."""
PARTS = ("R", "G", "total")
FILE = "spread.json"

Spread = dict[str, float]
"""Of a quantity: `R_own`, `R_other`, `G_own`, … mean squares of the changes (nats²) over the tokens
of the prompt that the gradient is of, and over those of other prompts; `share_own` and
`share_other`, ⟨Δ_R, Δ⟩/⟨Δ, Δ⟩ over either."""


def write_spread(export: Path, samples: Path, out: Path) -> None:
    """Write the effect of each prompt's gradient on own and other prompts; nothing without two.

    Args:
      export: Hugging Face directory.
      samples: an evaluation's JSONL: prompt, completion, reward.
      out: JSON of a Spread by quantity.
    """
    policy, params = models.load(export)
    texts = _with_gradients(data.read_set(samples, ("prompt", "completion", "reward")))
    if len({str(prompt) for prompt in texts.prompts}) < 2:
        tqdm.write(f"{samples}: fewer than two prompts have answers of different rewards")
        return
    answers = encode_answers(export, texts, policy.max_tokens)
    advantage_B = leave_one_out(np.array(texts.columns["reward"], float), answers.groups)
    durable_files.save_text(out, json.dumps(spread(policy, params, answers, advantage_B)) + "\n")


def leave_one_out(reward_B: np.ndarray, groups_B: np.ndarray) -> np.ndarray:
    """Return each reward less the mean of the other answers' to its prompt."""
    advantage_B = np.zeros(len(reward_B))
    for group in np.unique(groups_B):
        rewards = reward_B[groups_B == group]
        count = len(rewards)
        advantage_B[groups_B == group] = (rewards - rewards.mean()) * count / (count - 1)
    return advantage_B


def read_spreads(results: Results, size: str, arm: str, quantity: str) -> list[Spread]:
    """Return the spread of a quantity of each seed of an arm that has one."""
    files = [results.place(size, arm, seed) / FILE for seed in results.seeds]
    return [json.loads(f.read_text(encoding="utf-8"))[quantity] for f in files if f.exists()]


def spread(
    policy: Policy, params: Params, answers: Answers, advantage_B: np.ndarray
) -> dict[str, Spread]:
    """Return by quantity the mean squares and shares of the effects of every prompt's gradient."""
    batch, rows = answers.batch, jnp.asarray(answers.rows)
    places = jnp.asarray(answers.columns + answers.prompt_length)
    contexts = ntk.Contexts(batch.tokens, places - 1, rows, batch.mask)
    targets = batch.tokens[rows, places]
    changes: dict[str, list[np.ndarray]] = {f"{q}_{p}": [] for q in QUANTITIES for p in PARTS[:2]}
    own_PO = []
    for group in tqdm(np.unique(answers.groups), desc="effects of a prompt's gradient"):
        members = np.nonzero(answers.groups == group)[0]
        arrays = batch.tokens[members], batch.mask[members], batch.completion_mask[members]
        direction = _gradient(policy, params, arrays, jnp.asarray(advantage_B[members]))
        parts = ntk.predict_changes(policy, params, direction, contexts, targets)
        own_PO.append(np.isin(answers.rows, members))
        for quantity in QUANTITIES:
            for part, role in zip(PARTS, ("head", "body"), strict=False):
                values = np.asarray(getattr(parts[role], quantity), float)
                changes[f"{quantity}_{part}"].append(values)
    arrays_PO = {name: np.stack(values) for name, values in changes.items()}
    return {q: _summary(arrays_PO, q, np.stack(own_PO)) for q in QUANTITIES}


def _summary(changes: dict[str, np.ndarray], quantity: str, own_PO: np.ndarray) -> dict[str, float]:
    parts = {part: changes[f"{quantity}_{part}"] for part in PARTS[:2]}
    parts["total"] = parts["R"] + parts["G"]
    result = {}
    for side, chosen in (("own", own_PO), ("other", ~own_PO)):
        for part, change_PO in parts.items():
            result[f"{part}_{side}"] = float(np.mean(change_PO[chosen] ** 2))
        total = parts["total"][chosen]
        result[f"share_{side}"] = float(parts["R"][chosen] @ total / (total @ total))
    return result


@functools.partial(jax.jit, static_argnames="policy")
def _gradient(
    policy: Policy, params: Params, arrays: tuple[Array, Array, Array], advantage_N: Array
) -> Params:
    """Return the gradient of the mean over N answers of A Σ log π."""
    tokens, mask, completion_mask = arrays
    length = completion_mask.shape[1]

    def objective(params: Params) -> Array:
        log_probs = scoring.score(policy, params, tokens, mask, length).log_probs
        sums_N = jnp.sum(jnp.where(completion_mask, log_probs, 0), axis=1)
        return jnp.mean(advantage_N * sums_N)

    return jax.grad(objective)(params)


def _with_gradients(texts: data.PromptSet) -> data.PromptSet:
    """Return the first answers of the first prompts whose answers have different rewards."""
    texts = first_answers(texts, PER_PROMPT)
    rewards: dict[str, list[Any]] = {}
    for prompt, reward in zip(texts.prompts, texts.columns["reward"], strict=True):
        rewards.setdefault(str(prompt), []).append(reward)
    chosen = [text for text, values in rewards.items() if len(set(values)) > 1][:PROMPTS]
    rows = [row for row, prompt in enumerate(texts.prompts) if str(prompt) in chosen]
    return data.take(texts, np.array(rows, int))
