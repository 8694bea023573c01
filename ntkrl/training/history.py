"""What the looks of a run so far say together, read back from `probes/` where a run resumes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from ntkrl import probe
from ntkrl.probe import SingularTriple
from ntkrl.report import read_arrays, step_files

DIRECTION = "direction"
"""`direction/<leaf>/left` and `…/right` in a probe file are singular vectors of ΔW, layers in
front."""


LINES = {"probe": "log_probs", "weights": "weights"}
"""What is laid lines through: the array of a look, by the room of its metrics."""


class History:
    """How straight log-probs and weights run, and how directions of ΔW turn."""

    def __init__(self, directory: Path):
        """Read nothing yet.

        Args:
          directory: that looks write `step_*.npz` to.
        """
        self.directory = directory
        self.lines: dict[str, probe.LineSums] = {}

    def straightness(self, step: int, arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Add a look, and say how well lines in the step explain what all of them saw.

        Args:
          step: the optimizer step that was looked at; rising.
          arrays: of the look, with those of LINES, all before the step.

        Returns:
          `<room>/linearity` and `<room>/linearity_pooled` (see `linearity.line_fit`), of three
          looks or more.
        """
        if not self.lines:
            for number, path in self._before(step):
                held = read_arrays(path)
                self._extend(number, {} if held is None else held)
        self._extend(step, arrays)
        found = {}
        for room, line in self.lines.items():
            if line.number >= 3:
                _, scalars = probe.line_fit(line)
                found |= {f"{room}/{name}": float(value) for name, value in scalars.items()}
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def turning(self, step: int, leading: dict[str, SingularTriple]) -> dict[str, float]:
        """Compare leading directions with those of the last look before that has any.

        Args:
          step: the optimizer step that was looked at.
          leading: of ΔW by leaf, layers in front, from `weights.update_ranks`.

        Returns:
          `weights/<leaf>/direction_cosine`, the mean over layers, and `weights/direction_cosine`,
          the mean over leaves; of leaves that had moved before.
        """
        for _, path in reversed(self._before(step)):
            arrays = read_arrays(path)
            held = {} if arrays is None else arrays
            known = {
                name: own for name, own in leading.items() if f"{DIRECTION}/{name}/left" in held
            }
            if known:
                cosines = {name: _cosine(own, held, name) for name, own in known.items()}
                found = {f"weights/{name}/direction_cosine": c for name, c in cosines.items()}
                return found | {"weights/direction_cosine": float(np.mean([*cosines.values()]))}
        return {}

    def _before(self, step: int) -> list[tuple[int, Path]]:
        """Find the looks before a step; those after it are of a run that goes on otherwise."""
        return [found for found in step_files(self.directory, ".npz") if found[0] < step]

    def _extend(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        for room, name in LINES.items():
            if name not in arrays:
                continue
            given = arrays[name], float(step)
            if room in self.lines:
                self.lines[room] = probe.extend_line(self.lines[room], *given)
            else:
                self.lines[room] = probe.start_line(*given)


def direction_arrays(leading: dict[str, SingularTriple]) -> dict[str, np.ndarray]:
    """Return what a probe file keeps of leading directions."""
    return {
        f"{DIRECTION}/{name}/{side}": np.asarray(getattr(own, side))
        for name, own in leading.items()
        for side in ("left", "right")
    }


def _cosine(own: SingularTriple, arrays: dict[str, np.ndarray], name: str) -> float:
    sides = {side: arrays[f"{DIRECTION}/{name}/{side}"] for side in ("left", "right")}
    cosines = jax.vmap(probe.direction_cosine)(own, own._replace(**sides))
    return float(np.mean(cosines))
