"""Sampling settings, validated on construction."""

import dataclasses
import math
from typing import Any

from ntkrl.messages import not_among
from ntkrl.numerics import DTYPES
from ntkrl.rollout.rollout_mesh import AXES


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    """Settings of sampling.

    completions_per_prompt: N ≥ 1.
    max_completion_tokens: C ≥ 1; longer completions are truncated.
    temperature: divides the logits; 0 for greedy decoding.
    end_ids: tokens that end a completion, as its last token; none for completions of full length.
    pad_id: token written after the end.
    top_k: sample from the k likeliest tokens (and ties with the last), ≥ 1; None for all.
    top_p: then from the fewest of them with this share of their mass, in (0, 1]; None for all.
    min_p: then from those with at least this share of the largest probability, in [0, 1); None for
        all.
    cache_dtype: dtype of keys and values; None for the network's.
    keep_features: record the features that predicted each token.
    chunk_steps: most decode steps between two checks for finished rows, ≥ 1; None for 4 on CPUs,
      and 16 elsewhere, where each check costs more and a step less.
    fewest_rows: smallest batch of compaction, ≥ 1: with few rows, a step costs reading the params.
    """

    completions_per_prompt: int
    max_completion_tokens: int
    temperature: float
    end_ids: tuple[int, ...]
    pad_id: int
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    cache_dtype: Any = None
    keep_features: bool = False
    chunk_steps: int | None = None
    fewest_rows: int = 8

    def __post_init__(self):
        names = ["completions_per_prompt", "max_completion_tokens", "fewest_rows"]
        if self.chunk_steps is not None:
            names.append("chunk_steps")
        problems = [
            f"{name} must be ≥ 1, not {getattr(self, name)}"
            for name in names
            if getattr(self, name) < 1
        ]
        if not 0 <= self.temperature < math.inf:
            problems.append(f"temperature must be finite and ≥ 0, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k must be ≥ 1, or None for all tokens, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"top_p must be in (0, 1], or None for all tokens, not {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p < 1:
            problems.append(f"min_p must be in [0, 1), or None for all tokens, not {self.min_p}")
        if self.greedy and self.truncates:
            problems.append("temperature 0 takes the likeliest token: set top_k, top_p, min_p None")
        if problems:
            raise ValueError("; ".join(problems) + ".")

    def chunk_length(self, platform: str) -> int:
        """Return the steps of every chunk: chunks of equal length waste the fewest steps.

        Args:
          platform: of the devices, as in `jax.Device.platform`.
        """
        most = self.chunk_steps
        if most is None:
            most = 4 if platform == "cpu" else 16
        steps = max(self.max_completion_tokens - 1, 1)  # the first token is sampled by the prefill
        return -(-steps // -(-steps // most))

    @property
    def greedy(self) -> bool:
        """True for argmax decoding."""
        return self.temperature == 0

    @property
    def truncates(self) -> bool:
        """True if top_k, top_p or min_p exclude tokens."""
        return any(value is not None for value in (self.top_k, self.top_p, self.min_p))


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
    """Sampling of completions in training: the config's rollout section (see SamplerSettings).

    stop: strings that end a completion; they are part of it.
    mesh: parts by axis, data and tensor; see rollout_mesh.make_rollout_mesh.
    engine: "FILE.py:NAME" of a sampler outside this package (see rollout/external.py), or None.
    exact: sample by the update's own forward pass (see rollout/exact.py).
    """

    completions_per_prompt: int
    max_completion_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    stop: tuple[str, ...]
    cache_dtype: str | None
    mesh: dict[str, int | None]
    engine: str | None
    exact: bool

    def __post_init__(self):
        problems = []
        if not self.temperature > 0:
            problems.append(
                f"rollout.temperature must be > 0, not {self.temperature}: a greedy sampler gives "
                "groups of equal completions; for greedy evaluation set eval.temperature=0"
            )
        if self.cache_dtype is not None and self.cache_dtype not in DTYPES:
            problems.append(not_among("rollout.cache_dtype", self.cache_dtype, DTYPES))
        if not all(self.stop):
            problems.append("rollout.stop holds an empty string")
        for axis, size in self.mesh.items():
            if axis not in AXES:
                problems.append(f"rollout.mesh.{axis} does not exist; known: {', '.join(AXES)}")
            elif size is not None and size != -1 and size < 1:
                problems.append(f"rollout.mesh.{axis} must be ≥ 1, -1 or None, not {size}")
        checked = dataclasses.asdict(self)
        for name in ("stop", "cache_dtype", "mesh", "engine", "exact"):
            del checked[name]
        try:
            SamplerSettings(end_ids=(), pad_id=0, **checked)
        except ValueError as error:
            problems.append(str(error).rstrip("."))
        if problems:
            raise ValueError("; ".join(problems) + ".")
