"""Statistics over past probe readings, read back from `probes/` when a run resumes."""

import math
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ntkrl import probe, runtime
from ntkrl.report import read_arrays, step_files

DIRECTION = "direction"
"""`direction/<leaf>/left` and `…/right` in a probe file are singular vectors of ΔW, layers in
front."""
SERIES = {"probe": "log_probs", "weights": "weights"}
"""Series fitted by linear regression in the step: array of a reading, by prefix of its metrics."""


class History:
    """Linearity of log-probs and weights over training, and rotation of leading directions."""

    def __init__(self, directory: Path):
        """Start without readings.

        Args:
          directory: directory of the files `step_*.npz`.
        """
        self.directory = directory
        self.sums: dict[str, probe.LineSums] = {}

    def linearity(self, step: int, arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Add a reading; return how much of all readings a linear regression explains.

        Args:
          step: optimizer step of the reading; increasing.
          arrays: arrays of the reading, with those of SERIES, all before the step.

        Returns:
          `<prefix>/linearity` and `<prefix>/linearity_pooled` (see `probe.line_fit`), from the
          third reading on.
        """
        if not self.sums:
            for earlier_step, path in self._before(step):
                earlier = read_arrays(path)
                if earlier is None:
                    runtime.log(f"{path} is damaged; statistics over past readings leave it out")
                self._extend(earlier_step, {} if earlier is None else earlier)
        self._extend(step, arrays)
        metrics: dict[str, float] = {}
        for prefix, sums in self.sums.items():
            if sums.number >= 3:
                _, scalars = probe.line_fit(sums)
                metrics |= {f"{prefix}/{name}": float(value) for name, value in scalars.items()}
        return {name: value for name, value in metrics.items() if math.isfinite(value)}

    def rotation(self, step: int, leading: dict[str, probe.SingularTriple]) -> dict[str, float]:
        """Compare leading directions with those of the last reading that has any.

        Args:
          step: optimizer step of the reading.
          leading: singular triples of ΔW by leaf, layers in front, from `probe.update_ranks`.

        Returns:
          `weights/<leaf>/direction_cosine`, the mean over layers, and `weights/direction_cosine`,
          the mean over leaves; of leaves that had moved before.
        """
        for _, path in reversed(self._before(step)):
            arrays = read_arrays(path)
            cosines = {
                name: _cosine(triple, arrays, name)
                for name, triple in leading.items()
                if arrays is not None and f"{DIRECTION}/{name}/left" in arrays
            }
            if cosines:
                metrics = {f"weights/{name}/direction_cosine": c for name, c in cosines.items()}
                return metrics | {"weights/direction_cosine": float(np.mean([*cosines.values()]))}
        return {}

    def _before(self, step: int) -> list[tuple[int, Path]]:
        """Return the files of earlier steps; later ones belong to a run that was rolled back."""
        return [entry for entry in step_files(self.directory, ".npz") if entry[0] < step]

    def _extend(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        for prefix, name in SERIES.items():
            if name not in arrays:
                continue
            if prefix in self.sums:
                self.sums[prefix] = probe.extend_line(self.sums[prefix], arrays[name], float(step))
            else:
                self.sums[prefix] = probe.start_line(arrays[name], float(step))


def direction_arrays(leading: dict[str, probe.SingularTriple]) -> dict[str, np.ndarray]:
    """Return the arrays that a probe file stores of leading directions."""
    return {
        f"{DIRECTION}/{name}/{side}": np.asarray(getattr(triple, side))
        for name, triple in leading.items()
        for side in ("left", "right")
    }


def _cosine(triple: probe.SingularTriple, arrays: Mapping[str, np.ndarray], name: str) -> float:
    earlier = triple._replace(
        left=jnp.asarray(arrays[f"{DIRECTION}/{name}/left"]),
        right=jnp.asarray(arrays[f"{DIRECTION}/{name}/right"]),
    )
    return float(np.mean(jax.vmap(probe.direction_cosine)(triple, earlier)))
