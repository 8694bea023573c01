"""The probe set of a run and what was read on it: `probes/set.json` and `probes/step_*.npz`.

Runs whose sets have different digests were probed on different tokens: `comparable` takes from
them what must not stand side by side, and says so.
"""

from __future__ import annotations

import dataclasses
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
"""Of `probes/set.json` and of a ledger's JSON."""
PROBE_ARRAYS = ("actual", "predicted_head", "predicted_body")
"""Arrays a probe file must hold, `[O]` each, nats; `predicted_cross` is there for a tied head."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """A probe completion.

    prompt: text of its prompt.
    family: where it comes from: own, other, reference, rejected, paraphrased or shuffled.
    text: the whole of it.
    tokens: text of each of its probe tokens, in order.
    """

    prompt: str
    family: str
    text: str
    tokens: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ProbeTexts:
    """The probe set in words.

    digest: names the set; equal digests mean equal tokens.
    completions: in the order of the probe tokens O: those of the first, then of the second, …
    """

    digest: str
    completions: tuple[Completion, ...]

    @property
    def size(self) -> int:
        """How many probe tokens there are, O."""
        return sum(len(completion.tokens) for completion in self.completions)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum over the tokens of each completion: `[O, …]` to `[S, …]`."""
        ends = np.cumsum([len(completion.tokens) for completion in self.completions])
        before = np.concatenate([np.zeros_like(values[:1], float), np.cumsum(values, 0, float)])
        return before[ends] - before[ends - [len(c.tokens) for c in self.completions]]


def read_texts(run: Path) -> tuple[ProbeTexts | None, list[str]]:
    """Read `probes/set.json`; older runs have none."""
    path, name = run / "probes" / "set.json", "probes/set.json"
    if not path.exists():
        return None, []
    told, note = read_object(path, name)
    if told is None:
        return None, [note]
    try:
        completions = tuple(_completion(told["prompts"], item) for item in told["completions"])
        texts = ProbeTexts(str(told["digest"]), completions)
    except (KeyError, IndexError, TypeError):
        return None, [f"{name} lacks what a probe set has and was left out"]
    return texts, []


def _completion(prompts: list[str], item: dict[str, Any]) -> Completion:
    tokens = tuple(str(token) for token in item["tokens"])
    return Completion(str(prompts[item["prompt"]]), str(item["family"]), str(item["text"]), tokens)


def read_object(path: Path, name: str) -> tuple[dict[str, Any] | None, str]:
    """Read a JSON object of this format, else return None and why in words."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None, f"{name} cannot be read and was left out"
    if not isinstance(told, dict) or "format" not in told or told["format"] != FORMAT:
        given = told["format"] if isinstance(told, dict) and "format" in told else None
        return None, f"{name} has format {given!r}, not {FORMAT}, and was left out"
    return told, ""


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """Read a file of arrays; None where it is no such file, or a cut one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: np.asarray(file[key]) for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def step_files(directory: Path, suffix: str) -> Iterator[tuple[int, Path]]:
    """Yield step and path of every `step_<number><suffix>`, steps rising."""
    for path in sorted(directory.glob(f"step_*{suffix}")):
        match = re.fullmatch(r"step_(\d+)" + re.escape(suffix), path.name)
        if match is not None:
            yield int(match.group(1)), path


def read_probes(
    run: Path, texts: ProbeTexts | None
) -> tuple[dict[int, dict[str, np.ndarray]], list[str]]:
    """Read `step_*.npz`; a file that cannot be used is named and left out."""
    probes, notes = {}, []
    for step, path in step_files(run / "probes", ".npz"):
        arrays = read_arrays(path)
        problem = "cannot be read" if arrays is None else _problem(arrays, texts)
        if arrays is None or problem is not None:
            notes.append(f"probes/{path.name} {problem} and was left out")
            continue
        probes[step] = arrays
    if not probes:
        notes.append("no probe files (probes/step_*.npz)")
    return probes, notes


def _problem(arrays: dict[str, np.ndarray], texts: ProbeTexts | None) -> str | None:
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
