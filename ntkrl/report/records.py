"""Probe sets, probe readings and step ledgers of a run directory.

Files: `probes/set.json`, `probes/step_*.npz` and `ledger/step_*.npz` with a `.json` beside each. A
file that cannot be used is left out and named in a note. Runs whose sets have different digests
were probed on different tokens (see `runs.comparable`).
"""

import dataclasses
import functools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ntkrl.json_files import MAX_RECORD_BYTES, parse_json, read_json

FORMAT = 1
"""Version of `probes/set.json` and of a ledger's JSON."""
PROBE_ARRAYS = ("actual", "predicted_head", "predicted_body")
"""Required arrays of a probe file, `[O]` each, nats; tied heads add `predicted_cross`."""
MEASURES = ("log_prob", "entropy")
NOT_TERMS = ("momentum", "decay", "optimizer")
"""Ledger columns that are not terms of the loss and so have no share per sample."""
ORDER = ("kl", "bonus", *NOT_TERMS, "curvature")
TOLERANCE = 1e-3
"""Allowed gap of the parts' sum to the actual change, relative to Σ |part|: float32 rounding."""


@dataclasses.dataclass(frozen=True)
class ProbeCompletion:
    """A probe completion.

    prompt: text of its prompt.
    family: origin: own, other, reference, rejected, paraphrased or shuffled.
    text: the completion.
    tokens: text of each of its probe tokens, in order.
    """

    prompt: str
    family: str
    text: str
    tokens: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ProbeTexts:
    """The probe set as text.

    digest: identifies the set; equal digests mean equal tokens.
    completions: in the order of the probe tokens O: those of the first, then of the second, …
    """

    digest: str
    completions: tuple[ProbeCompletion, ...]

    @property
    def size(self) -> int:
        """Number of probe tokens, O."""
        return sum(len(completion.tokens) for completion in self.completions)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum over the tokens of each completion: `[O, …]` to `[S, …]`."""
        lengths = [len(completion.tokens) for completion in self.completions]
        ends = np.cumsum(lengths)
        totals = np.concatenate([np.zeros_like(values[:1], float), np.cumsum(values, 0, float)])
        return totals[ends] - totals[ends - lengths]


@dataclasses.dataclass(frozen=True)
class LedgerSample:
    """A completion of the step's minibatch; advantage: mean over its tokens."""

    prompt: str
    completion: str
    advantage: float


@dataclasses.dataclass(frozen=True, eq=False)
class StepLedger:
    """The ledger of one optimizer step.

    step: the optimizer step.
    by: "sample" where terms are kept per sample, else "group".
    stage: the stage of the step.
    texts: the probe set.
    samples: `B` completions of the minibatch.
    parts: measure → part → `[O]` nats: "policy R", "policy G" (likewise each term of the loss),
        "momentum", "decay", "optimizer", "curvature"; they add up to `actual`.
    actual: measure → `[O]` nats.
    terms: measure → group of parameters → `[O, B]` nats, or `[O]` by group, over all terms of the
        loss: "head" for R, others make up G.
    """

    step: int
    by: str
    stage: str
    texts: ProbeTexts
    samples: tuple[LedgerSample, ...]
    parts: dict[str, dict[str, np.ndarray]]
    actual: dict[str, np.ndarray]
    terms: dict[str, dict[str, np.ndarray]]

    def roles(self, measure: str) -> tuple[np.ndarray, np.ndarray]:
        """Return R and G of a measure, by sample `[O, B]` or by group `[O]` (nats)."""
        shape = (self.texts.size, len(self.samples))[: 2 if self.by == "sample" else 1]
        roles = {"R": np.zeros(shape), "G": np.zeros(shape)}
        for group, values in self.terms[measure].items():
            roles["R" if group == "head" else "G"] += values
        return roles["R"], roles["G"]

    @functools.cached_property
    def influence(self) -> np.ndarray | None:
        """Δ log π by sample `[O, B]` (nats); None unless `by` is "sample"."""
        head, body = self.roles("log_prob")
        return head + body if self.by == "sample" else None

    @property
    def head_influence(self) -> np.ndarray | None:
        """The part of `influence` through the classifier, R."""
        return self.roles("log_prob")[0] if self.by == "sample" else None

    def __repr__(self) -> str:
        count, kept = len(self.texts.completions), "apart" if self.by == "sample" else "together"
        parts = self.parts["log_prob"].items()
        return (
            f"StepLedger of optimizer step {self.step}, stage {self.stage}: "
            f"{self.texts.size} tokens of {count} probe completions\n"
            f"  mean Δ log π {self.actual['log_prob'].mean():+.2g} nats: "
            f"{', '.join(f'{part} {values.mean():+.2g}' for part, values in parts)}\n"
            f"  {len(self.samples)} samples, kept {kept}"
        )


def step_files(directory: Path, suffix: str) -> Iterator[tuple[int, Path]]:
    """Yield step and path of every `step_<number><suffix>`, by step."""
    for path in sorted(directory.glob(f"step_*{suffix}")):
        match = re.fullmatch(r"step_(\d+)" + re.escape(suffix), path.name)
        if match is not None:
            yield int(match.group(1)), path


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """Read an npz file; return None where it is missing, truncated or not an npz file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: np.asarray(file[key]) for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def read_texts(run: Path) -> tuple[ProbeTexts | None, list[str]]:
    """Read `probes/set.json` of a run directory and return it with notes; older runs have none."""
    path, name = run / "probes" / "set.json", "probes/set.json"
    if not path.exists():
        return None, []
    try:
        header = _read_json(path, name)
        completions = tuple(
            ProbeCompletion(
                str(header["prompts"][item["prompt"]]),
                str(item["family"]),
                str(item["text"]),
                tuple(str(token) for token in item["tokens"]),
            )
            for item in header["completions"]
        )
        return ProbeTexts(str(header["digest"]), completions), []
    except (KeyError, IndexError, TypeError):
        return None, [f"{name} lacks what a probe set has and was left out"]
    except ValueError as error:
        return None, [str(error)]


def read_probes(
    run: Path, texts: ProbeTexts | None
) -> tuple[dict[int, dict[str, np.ndarray]], list[str]]:
    """Read `probes/step_*.npz` by step, with a note for each file that was left out."""
    probes, notes = {}, []
    for step, path in step_files(run / "probes", ".npz"):
        arrays = read_arrays(path)
        problem = "cannot be read" if arrays is None else _probe_problem(arrays, texts)
        if problem is not None:
            notes.append(f"probes/{path.name} {problem} and was left out")
        elif arrays is not None:
            probes[step] = arrays
    if not probes:
        notes.append("no probe files (probes/step_*.npz)")
    return probes, notes


def read_ledgers(run: Path, texts: ProbeTexts | None) -> tuple[dict[int, StepLedger], list[str]]:
    """Read the ledgers of a run directory.

    Args:
      run: the run directory.
      texts: its probe set; without it the ledgers' tokens are unknown and they are refused.

    Returns:
      ledgers: by step.
      notes: one sentence per ledger that was left out.
    """
    ledgers, notes = {}, []
    files = dict(step_files(run / "ledger", ".npz"))
    for step, path in files.items():
        try:
            ledgers[step] = _read_ledger(step, path, texts)
        except ValueError as error:
            notes.append(str(error))
    notes += [
        f"ledger/{path.name} has no .npz beside it and was left out"
        for step, path in step_files(run / "ledger", ".json")
        if step not in files
    ]
    return ledgers, notes


def read_starts(run: Path) -> tuple[tuple[dict[str, Any], ...], list[str]]:
    """Read `starts.jsonl`: command, versions and machine of each start; return it with notes."""
    path = run / "starts.jsonl"
    if not path.exists():
        return (), []
    starts, notes = list[dict[str, Any]](), []
    for number, text in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
        try:
            line = parse_json(text, finite=False)
        except ValueError:
            line = None
        if isinstance(line, dict):
            starts.append(line)
        else:
            notes.append(f"line {number} of {path.name} cannot be read and was left out")
    return tuple(starts), notes


def _read_json(path: Path, name: str) -> dict[str, Any]:
    """Read a JSON object of the current format, else raise ValueError with a note."""
    try:
        value = read_json(path, MAX_RECORD_BYTES, finite=False)
    except ValueError:
        raise ValueError(f"{name} cannot be read and was left out") from None
    version = value["format"] if isinstance(value, dict) and "format" in value else None
    if version != FORMAT:
        raise ValueError(f"{name} has format {version!r}, not {FORMAT}, and was left out")
    return value


def _probe_problem(arrays: dict[str, np.ndarray], texts: ProbeTexts | None) -> str | None:
    missing = [name for name in PROBE_ARRAYS if name not in arrays]
    if missing:
        return f"has no {', '.join(missing)}"
    used = [name for name in (*PROBE_ARRAYS, "predicted_cross") if name in arrays]
    shapes = {arrays[name].shape for name in used}
    if len(shapes) > 1 or arrays["actual"].ndim != 1:
        return f"has arrays of shapes {sorted(shapes)}"
    if not all(np.isfinite(arrays[name]).all() for name in used):
        return "has values that are not finite"
    if texts is not None and arrays["actual"].size != texts.size:
        return f"has {arrays['actual'].size} probe tokens where set.json names {texts.size}"
    if "cosines" in arrays:
        shape = arrays["cosines"].shape
        count = shape[0] if texts is None or not shape else len(texts.completions)
        if shape != (count, count):
            return f"has cosines of shape {shape}"
    return None


def _read_ledger(step: int, path: Path, texts: ProbeTexts | None) -> StepLedger:
    """Read one ledger, or raise ValueError with a note."""
    name, header_path = f"ledger/{path.name}", path.with_suffix(".json")
    if not header_path.exists():
        raise ValueError(f"{name} has no .json beside it and was left out")
    header = _read_json(header_path, f"ledger/{header_path.name}")
    arrays = read_arrays(path)
    if arrays is None:
        raise ValueError(f"{name} cannot be read and was left out")
    try:
        digest, by, stage = header["digest"], str(header["by"]), str(header["stage"])
        samples = tuple(
            LedgerSample(str(row["prompt"]), str(row["completion"]), float(row["advantage"]))
            for row in header["samples"]
        )
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"ledger/{header_path.name} lacks what a ledger has and was left out"
        ) from None
    if texts is None or digest != texts.digest:
        run_digest = None if texts is None else texts.digest
        raise ValueError(f"{name} is of probe set {digest}, the run has {run_digest}; refused")
    problem = _ledger_problem(arrays, texts.size, len(samples), by)
    if problem is not None:
        raise ValueError(f"{name} {problem} and was left out")
    parts = {measure: _parts(arrays, measure) for measure in MEASURES}
    actual = {measure: arrays[f"{measure}/actual"] for measure in MEASURES}
    for measure in MEASURES:
        size = sum(np.abs(part) for part in parts[measure].values())
        gap = np.abs(sum(parts[measure].values()) - actual[measure])
        if (gap > TOLERANCE * size + 1e-7).any():
            raise ValueError(
                f"{name} has {measure} parts that do not add up to the change; left out"
            )
    terms = {measure: _terms_by_group(arrays, measure) for measure in MEASURES}
    return StepLedger(step, by, stage, texts, samples, parts, actual, terms)


def _ledger_problem(
    arrays: dict[str, np.ndarray], tokens: int, samples: int, by: str
) -> str | None:
    required = [f"{measure}/{part}" for measure in MEASURES for part in ("actual", "curvature")]
    missing = [key for key in required if key not in arrays]
    if missing:
        return f"has no {', '.join(missing)}"
    for key, array in arrays.items():
        by_sample = by == "sample" and _is_term(key)
        if array.shape != ((tokens, samples) if by_sample else (tokens,)):
            return f"has {key} of shape {array.shape}, for {tokens} tokens and {samples} samples"
        if not np.isfinite(array).all():
            return f"has {key} that is not finite"
    if by == "sample" and not any(_is_term(key) for key in arrays):
        return "has no terms"
    return None


def _terms_by_group(arrays: dict[str, np.ndarray], measure: str) -> dict[str, np.ndarray]:
    """Sum the terms of the loss, by group of parameters."""
    totals: dict[str, np.ndarray] = {}
    for key in sorted(key for key in arrays if key.startswith(f"{measure}/") and _is_term(key)):
        group = key.split("/", 2)[2]
        totals[group] = totals[group] + arrays[key] if group in totals else arrays[key]
    return totals


def _is_term(key: str) -> bool:
    """Return whether MEASURE/COLUMN/GROUP belongs to a term of the loss."""
    parts = key.split("/", 2)
    return len(parts) == 3 and parts[1] not in NOT_TERMS


def _parts(arrays: dict[str, np.ndarray], measure: str) -> dict[str, np.ndarray]:
    """Sum over samples, and over groups but for the two roles (R, G) of the terms."""
    parts = {"curvature": arrays[f"{measure}/curvature"].astype(float)}
    for key in sorted(key for key in arrays if key.startswith(f"{measure}/")):
        if key.count("/") < 2:
            continue
        _, part, group = key.split("/", 2)
        values = arrays[key].astype(float)
        if _is_term(key):
            part = f"{part} {'R' if group == 'head' else 'G'}"
            values = values.sum(axis=1) if values.ndim == 2 else values
        parts[part] = parts[part] + values if part in parts else values
    return dict(sorted(parts.items(), key=lambda item: _part_order(item[0])))


def _part_order(part: str) -> tuple[int, str, bool]:
    """Order parts: terms (KL and bonus last, R before G), then ORDER."""
    term = part.split(" ")[0]
    return (1 + ORDER.index(term) if term in ORDER else 0, term, part.endswith("G"))
