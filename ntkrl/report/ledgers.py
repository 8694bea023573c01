"""Step ledgers: what each part of one optimizer step did to the probe tokens.

Read from `ledger/step_*.npz` and the `.json` beside each; for every measure the parts add up to
the actual change.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from ntkrl.report.probes import ProbeTexts, read_arrays, read_object, step_files

MEASURES = ("log_prob", "entropy")
OTHERS = ("momentum", "decay", "optimizer")
"""Columns that are no term of the loss, so that no sample has a share of them."""
ORDER = ("kl", "bonus", *OTHERS, "curvature")
TOLERANCE = 1e-3
"""Of the parts' sizes, what they may miss the actual change by: float32 rounding and no more."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A completion that the step was taken on; advantage: mean over its tokens."""

    prompt: str
    completion: str
    advantage: float


@dataclasses.dataclass(frozen=True, eq=False)
class StepLedger:
    """The account of one optimizer step.

    step: the optimizer step it is of.
    by: "sample" where the terms were kept apart by sample, else "group".
    stage: the stage it belongs to.
    samples: `B` completions of the minibatch.
    parts: measure → part → `[O]` nats: "policy R", "policy G" (and so each term of the loss),
        "momentum", "decay", "optimizer", "curvature"; they add up to `actual`.
    actual: measure → `[O]` nats.
    influence: `[O, B]` nats, Δ log π by sample over all terms; None unless `by` is "sample".
    """

    step: int
    by: str
    stage: str
    samples: tuple[Sample, ...]
    parts: dict[str, dict[str, np.ndarray]]
    actual: dict[str, np.ndarray]
    influence: np.ndarray | None


def read_ledgers(run: Path, texts: ProbeTexts | None) -> tuple[dict[int, StepLedger], list[str]]:
    """Read the ledgers of a run; one that cannot be used is named and left out.

    Args:
      run: the run directory.
      texts: its probe set; without one nothing says which tokens a ledger is about.

    Returns:
      ledgers: by step.
      notes: in words, what was left out and why.
    """
    ledgers, notes = {}, []
    directory = run / "ledger"
    alone = {step for step, _ in step_files(directory, ".json")}
    for step, path in step_files(directory, ".npz"):
        alone.discard(step)
        found = _read(step, path, texts)
        if isinstance(found, str):
            notes.append(found)
        else:
            ledgers[step] = found
    notes.extend(
        f"ledger/step_{step:06d}.json has no .npz beside it and was left out"
        for step in sorted(alone)
    )
    return ledgers, notes


def _read(step: int, path: Path, texts: ProbeTexts | None) -> StepLedger | str:
    name = f"ledger/{path.name}"
    beside = path.with_suffix(".json")
    if not beside.exists():
        return f"{name} has no .json beside it and was left out"
    told, note = read_object(beside, f"ledger/{beside.name}")
    if told is None:
        return note
    arrays = read_arrays(path)
    if arrays is None:
        return f"{name} cannot be read and was left out"
    digest = None if texts is None else texts.digest
    try:
        if told["digest"] != digest:
            return f"{name} is of probe set {told['digest']}, the run has {digest}; refused"
        samples = tuple(
            Sample(str(one["prompt"]), str(one["completion"]), float(one["advantage"]))
            for one in told["samples"]
        )
        by, stage = str(told["by"]), str(told["stage"])
    except (KeyError, TypeError, ValueError):
        return f"ledger/{beside.name} lacks what a ledger has and was left out"
    problem = _problem(arrays, texts.size, len(samples), by)
    if problem is not None:
        return f"{name} {problem} and was left out"
    parts = {measure: _parts(arrays, measure) for measure in MEASURES}
    actual = {measure: arrays[f"{measure}/actual"] for measure in MEASURES}
    for measure in MEASURES:
        size = sum(np.abs(part) for part in parts[measure].values())
        gap = np.abs(sum(parts[measure].values()) - actual[measure])
        if (gap > TOLERANCE * size + 1e-7).any():
            return f"{name} has {measure} parts that do not add up to the change; left out"
    influence = _influence(arrays) if by == "sample" else None
    return StepLedger(step, by, stage, samples, parts, actual, influence)


def _problem(arrays: dict[str, np.ndarray], size: int, samples: int, by: str) -> str | None:
    """Say what is wrong with a ledger's arrays, None when nothing is."""
    needed = [f"{measure}/{one}" for measure in MEASURES for one in ("actual", "curvature")]
    missing = [key for key in needed if key not in arrays]
    if missing:
        return f"has no {', '.join(missing)}"
    for key, array in arrays.items():
        summed = by != "sample" or not _is_term(key)
        if array.shape != ((size,) if summed else (size, samples)):
            return f"has {key} of shape {array.shape}, for {size} tokens and {samples} samples"
        if not np.isfinite(array).all():
            return f"has {key} that is not finite"
    if by == "sample" and not any(_is_term(key) for key in arrays):
        return "has no terms"
    return None


def _is_term(key: str) -> bool:
    """Tell whether MEASURE/COLUMN/GROUP is of a term of the loss."""
    parts = key.split("/", 2)
    return len(parts) == 3 and parts[1] not in OTHERS


def _parts(arrays: dict[str, np.ndarray], measure: str) -> dict[str, np.ndarray]:
    """Sum over samples, and over groups but for the two roles of the terms."""
    found = {"curvature": arrays[f"{measure}/curvature"].astype(float)}
    for key in sorted(key for key in arrays if key.startswith(f"{measure}/")):
        if key.count("/") < 2:
            continue
        _, part, group = key.split("/", 2)
        values = arrays[key].astype(float)
        if _is_term(key):
            part = f"{part} {'R' if group == 'head' else 'G'}"
            values = values.sum(axis=1) if values.ndim == 2 else values
        found[part] = found[part] + values if part in found else values
    return dict(sorted(found.items(), key=lambda item: part_order(item[0])))


def part_order(part: str) -> tuple[int, str, bool]:
    """Order parts: the terms (the KL and bonus last, R before G), then ORDER."""
    term = part.split(" ")[0]
    return (1 + ORDER.index(term) if term in ORDER else 0, term, part.endswith("G"))


def _influence(arrays: dict[str, np.ndarray]) -> np.ndarray:
    keys = sorted(key for key in arrays if key.startswith("log_prob/") and _is_term(key))
    return np.sum([arrays[key].astype(float) for key in keys], axis=0)
