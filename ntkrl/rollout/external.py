"""An engine outside this package behind the sampler's seam: weights out, token ids in.

A user's file makes the engine:

    def make(directory, settings):          # the Hugging Face directory, a dict of SamplerSettings
        def generate(weights, prompts, seed):
            # weights(): {Hugging Face name: numpy array} of the policy as it is now
            # N answers per prompt, consecutive: their ids and the log-probs they were drawn with
            return [{"tokens": [5, 3, 0], "log_probs": [-1.2, -0.3, -0.1]}, ...]
        return generate

The file runs with the user's rights. Its log-probs are another program's: train with
objective.correction.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl.numerics import bucket_length
from ntkrl.rollout.settings import SamplerSettings
from ntkrl.types import Array, Params, PromptBatch, Rollout

Generate = Callable[..., Sequence[Mapping[str, Any]]]


class ExternalSampler:
    """`sample(params, prompts, key) -> Rollout` by an engine.

    generate: of the engine, as above.
    settings: SamplerSettings; features cannot be kept.
    stored: `params -> {Hugging Face name: array}`, read when the engine asks.
    """

    def __init__(
        self,
        generate: Generate,
        settings: SamplerSettings,
        stored: Callable[[Params], Mapping[str, np.ndarray]],
    ):
        self.generate, self.settings, self.stored = generate, settings, stored

    def __call__(self, params: Params, prompts: PromptBatch, key: Array) -> Rollout:
        """Let the engine draw N completions of each prompt.

        Raises:
          ValueError: answers that do not fit the prompts or the settings; all of them named.
        """
        tokens_PT, mask_PT = np.asarray(prompts.tokens), np.asarray(prompts.mask)
        asked = [row[real].tolist() for row, real in zip(tokens_PT, mask_PT, strict=True)]
        seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
        answers = list(self.generate(lambda: self.stored(params), asked, seed))
        count = self.settings.completions_per_prompt
        _check(answers, len(asked) * count, self.settings.max_completion_tokens)
        return self._rollout(np.repeat(tokens_PT, count, 0), np.repeat(mask_PT, count, 0), answers)

    def _rollout(self, tokens_BT: np.ndarray, mask_BT: np.ndarray, answers: Sequence) -> Rollout:
        budget, end = self.settings.max_completion_tokens, self.settings.eos_id
        length = bucket_length(max(len(one["tokens"]) for one in answers), budget)
        drawn_BC = np.full((len(answers), length), self.settings.pad_id, np.int32)
        log_probs_BC = np.zeros(drawn_BC.shape, np.float32)
        for row, one in enumerate(answers):
            drawn_BC[row, : len(one["tokens"])] = one["tokens"]
            log_probs_BC[row, : len(one["tokens"])] = one["log_probs"]
        lengths_B = np.array([len(one["tokens"]) for one in answers])
        real_BC = np.arange(length)[None] < lengths_B[:, None]
        ended_B = np.array([one["tokens"][-1] == end for one in answers])
        return Rollout(
            tokens=jnp.asarray(np.concatenate([tokens_BT, drawn_BC], axis=1)),
            mask=jnp.asarray(np.concatenate([mask_BT, real_BC], axis=1)),
            completion_mask=jnp.asarray(real_BC),
            sampler_log_probs=jnp.asarray(log_probs_BC),
            # the engine's log-probs are those it drew with, whatever it truncated
            kept_log_mass=jnp.zeros(real_BC.shape, jnp.float32),
            finished=jnp.asarray(ended_B | (lengths_B < budget)),
        )


def load_engine(spec: str, directory: str, settings: SamplerSettings) -> Generate:
    """Run a user's file and make its engine.

    Args:
      spec: "path/to/file.py:make".
      directory: Hugging Face directory of the starting model.
      settings: what to draw.

    Raises:
      ValueError: no such file or function, or one that fails; its message is in it.
    """
    file, _, name = spec.rpartition(":")
    if not file.endswith(".py") or not Path(file).is_file():
        raise ValueError(f"rollout.engine {spec!r} is no 'path/to/file.py:function' that exists.")
    found = importlib.util.spec_from_file_location("ntkrl_engine", file)
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
        make = vars(module)[name]
        generate = make(directory, dataclasses.asdict(settings))
    except Exception as error:  # whatever the user's code raises
        raise ValueError(f"rollout.engine {spec}: {type(error).__name__}: {error}") from error
    if not callable(generate):
        raise ValueError(f"rollout.engine {spec} made {generate!r}, which cannot be called.")
    return generate


def _check(answers: Sequence[Mapping[str, Any]], expected: int, budget: int) -> None:
    problems = []
    if len(answers) != expected:
        problems.append(f"{len(answers)} answers where {expected} were asked for")
    for row, one in enumerate(answers):
        if set(one) != {"tokens", "log_probs"}:
            problems.append(f"answer {row} has {', '.join(one)}, not tokens and log_probs")
            continue
        count, log_probs = len(one["tokens"]), list(one["log_probs"])
        if not 1 <= count <= budget or len(log_probs) != count:
            problems.append(f"answer {row} has {count} tokens and {len(log_probs)} log_probs")
        elif not all(math.isfinite(value) and value <= 1e-6 for value in log_probs):
            problems.append(f"answer {row} has log_probs that are not finite and ≤ 0")
    if problems:
        shown = "; ".join(problems[:5])
        raise ValueError(f"rollout.engine: {shown}; 1 to {budget} tokens each are allowed.")
