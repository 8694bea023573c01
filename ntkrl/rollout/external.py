"""Sampling by an external engine: weights out, token ids in.

A user's file makes the engine:

    def make(directory, settings):          # the Hugging Face directory, a dict of SamplerSettings
        def generate(weights, prompts, seed):
            # weights(): {Hugging Face name: numpy array} of the current policy
            # N answers per prompt, consecutive: ids, and log-probs under the sampling distribution
            return [{"tokens": [5, 3, 0], "log_probs": [-1.2, -0.3, -0.1]}, ...]
        return generate

The file runs with the user's rights. Its log-probs differ from this package's by rounding: train
with objective.correction.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import user_files
from ntkrl.numerics import bucket_length
from ntkrl.rollout.settings import SamplerSettings
from ntkrl.types import Array, Params, PromptBatch, Rollout

Answer = Mapping[str, Sequence[Any]]
Generate = Callable[..., Sequence[Answer]]


class ExternalSampler:
    """`sampler(params, prompts, key) -> Rollout` by an engine.

    generate: function of the engine, as above.
    settings: SamplerSettings; features cannot be recorded.
    stored: `params -> {Hugging Face name: array}`, called when the engine needs weights.
    """

    def __init__(
        self,
        generate: Generate,
        settings: SamplerSettings,
        stored: Callable[[Params], Mapping[str, np.ndarray]],
    ):
        self.generate, self.settings, self.stored = generate, settings, stored

    def __call__(self, params: Params, prompts: PromptBatch, key: Array) -> Rollout:
        """Sample N completions of each prompt with the engine.

        Raises:
          ValueError: answers that do not fit the prompts or the settings; all of them named.
        """
        tokens_PT, mask_PT = np.asarray(prompts.tokens), np.asarray(prompts.mask)
        ids = [row[real].tolist() for row, real in zip(tokens_PT, mask_PT, strict=True)]
        seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
        answers = list(self.generate(lambda: self.stored(params), ids, seed))
        count = self.settings.completions_per_prompt
        _check(answers, len(ids) * count, self.settings.max_completion_tokens)
        return self._rollout(np.repeat(tokens_PT, count, 0), np.repeat(mask_PT, count, 0), answers)

    def _rollout(
        self, tokens_BT: np.ndarray, mask_BT: np.ndarray, answers: Sequence[Answer]
    ) -> Rollout:
        budget = self.settings.max_completion_tokens
        lengths_B = np.array([len(answer["tokens"]) for answer in answers])
        length = bucket_length(int(lengths_B.max()), budget)
        completions_BC = np.full((len(answers), length), self.settings.pad_id, np.int32)
        log_probs_BC = np.zeros(completions_BC.shape, np.float32)
        for row, answer in enumerate(answers):
            completions_BC[row, : lengths_B[row]] = answer["tokens"]
            log_probs_BC[row, : lengths_B[row]] = answer["log_probs"]
        real_BC = np.arange(length)[None] < lengths_B[:, None]
        ended_B = np.array([answer["tokens"][-1] in self.settings.end_ids for answer in answers])
        return Rollout(
            tokens=jnp.asarray(np.concatenate([tokens_BT, completions_BC], axis=1)),
            mask=jnp.asarray(np.concatenate([mask_BT, real_BC], axis=1)),
            completion_mask=jnp.asarray(real_BC),
            sampler_log_probs=jnp.asarray(log_probs_BC),
            # the engine reports log-probs after its truncation
            kept_log_mass=jnp.zeros(real_BC.shape, jnp.float32),
            finished=jnp.asarray(ended_B | (lengths_B < budget)),
        )


def load_engine(spec: str, directory: str | None, settings: SamplerSettings) -> Generate:
    """Run a user's file and make its engine.

    Args:
      spec: "path/to/file.py:make".
      directory: Hugging Face directory of the starting model, or None for a new one.
      settings: settings of sampling.

    Raises:
      ValueError: no such file or function, or an exception in it, quoted in the message.
    """
    file, _, name = spec.rpartition(":")
    if not file.endswith(".py") or not Path(file).is_file():
        raise ValueError(f"rollout.engine {spec!r} is not an existing 'path/to/file.py:function'.")
    try:
        generate = vars(user_files.execute(Path(file)))[name](
            directory, dataclasses.asdict(settings)
        )
    except Exception as error:  # any exception of the user's code
        raise ValueError(f"rollout.engine {spec}: {type(error).__name__}: {error}") from error
    if not callable(generate):
        raise ValueError(f"rollout.engine {spec} made {generate!r}, which cannot be called.")
    return generate


def _check(answers: Sequence[Answer], expected: int, budget: int) -> None:
    problems = []
    if len(answers) != expected:
        problems.append(f"{len(answers)} answers where {expected} were expected")
    for row, answer in enumerate(answers):
        if set(answer) != {"tokens", "log_probs"}:
            problems.append(f"answer {row} has {', '.join(answer)}, not tokens and log_probs")
            continue
        count, log_probs = len(answer["tokens"]), list(answer["log_probs"])
        if not 1 <= count <= budget or len(log_probs) != count:
            problems.append(f"answer {row} has {count} tokens and {len(log_probs)} log_probs")
        elif not all(math.isfinite(value) and value <= 1e-6 for value in log_probs):
            problems.append(f"answer {row} has log_probs that are not finite and ≤ 0")
    if problems:
        first = "; ".join(problems[:5])
        raise ValueError(f"rollout.engine: {first}; 1 to {budget} tokens each are allowed.")
