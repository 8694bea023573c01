"""Which files the prompts of a run come from: the config's data section."""

from __future__ import annotations

import dataclasses
import math


def split_names(names: str) -> tuple[str, ...]:
    """Return the names in a list separated by commas."""
    return tuple(name.strip() for name in names.split(","))


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Which prompts.

    path: prompts (with completions for sft) in a form of data/published.py, several paths by
      commas; None: the built-in task.
    weights: what share of the rows each file of `path` gives, relative and > 0; None for epochs
      that visit every row of every file once.
    eval_path: held-out prompts, likewise; None holds out `held_out` of `path`.
    held_out: fraction of each file of `path` kept for evaluation, in [0, 1).
    examples: supervised examples drawn for the built-in task (sft).
    prompts_per_step: P ≥ 1.
    max_prompt_tokens: longest prompt allowed.
    packing: several supervised examples share a row (see data.packed_batches).
    """

    path: str | None
    weights: tuple[float, ...] | None
    eval_path: str | None
    held_out: float
    examples: int
    prompts_per_step: int
    max_prompt_tokens: int
    packing: bool

    def __post_init__(self):
        problems = []
        if not 0 <= self.held_out < 1:
            problems.append(f"data.held_out must be in [0, 1), not {self.held_out}")
        if self.prompts_per_step < 1 or self.max_prompt_tokens < 1:
            problems.append("data.prompts_per_step and data.max_prompt_tokens must be ≥ 1")
        files = 0 if self.path is None else len(split_names(self.path))
        given = self.weights
        if given is not None and (len(given) != files or not all(0 < w < math.inf for w in given)):
            problems.append(
                f"data.weights must be a positive number for each of the {files} files of "
                f"data.path, not {tuple(given)}; None visits every row once an epoch"
            )
        if problems:
            raise ValueError("; ".join(problems) + ".")
