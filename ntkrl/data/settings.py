"""Settings of prompts and their batches: the config's data section."""

import dataclasses
import math


def split_names(text: str) -> tuple[str, ...]:
    """Return the names of a comma-separated list."""
    return tuple(name.strip() for name in text.split(","))


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Prompts of a run.

    path: comma-separated paths of prompts (with completions for sft), see data/published.py; None
      for the built-in task.
    weights: relative share of the rows drawn from each file of `path`, > 0; None for epochs that
      visit every row of every file once.
    eval_path: evaluation prompts, likewise; None holds out `held_out` of `path`.
    held_out: fraction of each file of `path` held out for evaluation, in [0, 1).
    examples: supervised examples drawn for the built-in task (sft).
    prompts_per_step: P ≥ 1.
    max_prompt_tokens: longest prompt allowed (tokens).
    packing: pack several supervised examples into a row (see data.packed_batches).
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
        problems += [
            f"data.{name} must be ≥ 1, not {getattr(self, name)}"
            for name in ("prompts_per_step", "max_prompt_tokens")
            if getattr(self, name) < 1
        ]
        files = 0 if self.path is None else len(split_names(self.path))
        weights = () if self.weights is None else self.weights
        positive = all(0 < weight < math.inf for weight in weights)
        if self.weights is not None and (len(weights) != files or not positive):
            problems.append(
                f"data.weights must be a positive number for each of the {files} files of "
                f"data.path, not {tuple(weights)}; None visits every row once an epoch"
            )
        if problems:
            raise ValueError("; ".join(problems) + ".")
