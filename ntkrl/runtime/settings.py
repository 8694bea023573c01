"""Checkpoints of a run: the config's checkpoint section."""

import dataclasses

from ntkrl.runtime.checkpoint import Best


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """Schedule and retention of checkpoints.

    every_steps: rollout steps between checkpoints.
    keep: number of the newest to keep.
    keep_best: number of the best to keep beside them, or None.
    best_metric: what they are ranked by, or None for reward, loss or accuracy, by the method.
    best_mode: "max" or "min", what is better; None for "min" of a loss and "max" otherwise.
    failures: consecutive failed saves after which a run stops.
    """

    every_steps: int
    keep: int
    keep_best: int | None
    best_metric: str | None
    best_mode: str | None
    failures: int

    def __post_init__(self):
        problems = []
        for name in ("every_steps", "keep", "keep_best", "failures"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"checkpoint.{name} must be ≥ 1, not {value}")
        if self.best_mode not in ("max", "min", None):
            problems.append(f"checkpoint.best_mode must be max, min or None, not {self.best_mode}")
        if problems:
            raise ValueError("; ".join(problems) + ".")

    def ranking(self, headline: str) -> Best | None:
        """Return how checkpoints are ranked, or None where only the newest are kept.

        Args:
          headline: the metric where the config names none.
        """
        if self.keep_best is None:
            return None
        metric = headline if self.best_metric is None else self.best_metric
        mode = self.best_mode
        if mode is None:
            mode = "min" if metric.split("/")[-1] == "loss" else "max"
        return Best(self.keep_best, metric, mode)
