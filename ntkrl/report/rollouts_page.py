"""The rollouts view of a report: `rollouts.html` and the files of `rollouts_view/`.

Without a server, a page opened from a disk may load scripts and nothing else: each data file is a
script that calls `ntkrlData` with a name and JSON. Files of steps are loaded when they are shown.
Texts of runs are in these files alone, and the scripts set them as text.
"""

import dataclasses
import importlib.resources
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ntkrl import durable_files
from ntkrl.report.rollouts_causes import ledger_data
from ntkrl.report.rollouts_records import decode_rollouts, packed
from ntkrl.report.rollouts_writer import DIRECTORY, members, paths, read_every
from ntkrl.report.runs import Run

PAGE, DATA = "rollouts.html", "rollouts_view"
"""Names in the directory of a report."""
STATIC = (
    *("page.css", "rollouts.css", "view_parts.js", "rollouts_data.js"),
    *("rollouts_tokens.js", "rollouts_group.js", "rollouts_ledger.js", "rollouts.js"),
)
INDEX = "index.js"
START = 'ntkrlData("index", '
"""Beginning of the index, by which the directory of an earlier report is recognised."""
PAGE_BYTES = 96 * 2**20
"""Most bytes of completions in the view, of all runs together."""
FILE_BYTES = 500_000
"""Most bytes of a data file, unless a step alone is larger."""
MAX_PROMPT = 160
"""Characters of a prompt in the list."""


@dataclasses.dataclass(frozen=True)
class RolloutsView:
    """A view ready to write.

    completions: number of them. files: content by name.
    """

    completions: int
    files: dict[str, str]

    def write(self, directory: Path) -> None:
        """Write the view into the directory of a report; see `check_rollouts_view`."""
        with durable_files.replacing_directory(directory / DATA) as fresh:
            for name, content in self.files.items():
                durable_files.save_text(fresh / name, content)
        durable_files.save_text(directory / PAGE, resource(PAGE))


def check_rollouts_view(directory: Path) -> None:
    """Refuse a directory whose files of these names are not those of an earlier report.

    Raises:
      ValueError: they are others.
    """
    data = directory / DATA
    durable_files.check_replaceable(
        directory / PAGE, lambda text: b'content="ntkrl"' in text[:1000], "a page of this program"
    )
    if data.exists():
        durable_files.check_replaceable(
            data / INDEX, lambda text: text.startswith(START.encode()), "of an earlier report"
        )
        if not (data / INDEX).exists():
            raise ValueError(
                f"{data} exists and is not of an earlier report, so it is not replaced; move it, "
                "or write elsewhere."
            )


def remove_rollouts_view(directory: Path) -> None:
    """Remove the view of an earlier report; see `check_rollouts_view`."""
    (directory / PAGE).unlink(missing_ok=True)
    if (directory / DATA).exists():
        shutil.rmtree(directory / DATA)


def rollouts_view(runs: Sequence[Run]) -> RolloutsView | None:
    """Return the view of all runs that kept completions; None where none did."""
    sizes = {run.path: _sizes(run) for run in runs}
    kept = [run for run in runs if sizes[run.path]]
    if not kept:
        return None
    files = {name: resource(name) for name in STATIC}
    entries: list[dict[str, Any]] = []
    limits: list[str] = []
    for number, run in enumerate(kept):
        shown = _shown(sizes[run.path], PAGE_BYTES // len(kept))
        part = _RunFiles(run, f"run{number}")
        part.add(shown)
        files |= part.files
        entries.append(part.entry)
        if part.damaged:
            limits.append(f"{run.path.name}: {part.damaged} steps cannot be read.")
        if len(shown) < len(sizes[run.path]):
            limits.append(
                f"{run.path.name}: {len(shown)} of {len(sizes[run.path])} kept steps, to keep "
                f"this page below {PAGE_BYTES >> 20} MiB; the others are in its {DIRECTORY}/."
            )
    completions = sum(len(entry["reward"]["values"]) for entry in entries)
    limits.append(
        "Log-probs are rounded to 0.001 nats, other numbers of tokens to four digits of the "
        "largest of their step."
    )
    index = {"runs": entries, "limits": " ".join(limits)}
    files[INDEX] = _script("index", json.dumps(index, ensure_ascii=False))
    return RolloutsView(completions, files)


class _RunFiles:
    """The data files of a run, and its entry of the index."""

    def __init__(self, run: Run, name: str):
        self.run, self.name, self.damaged = run, name, 0
        self.files: dict[str, str] = {}
        self.ledgers = dict(run.ledgers)
        self.closed = 0
        self.steps: list[dict[str, Any]] = []
        self.prompts: dict[tuple[int, str], int] = {}
        self.rewards: list[np.ndarray] = []
        self.pending: list[str] = []

    @property
    def entry(self) -> dict[str, Any]:
        rewards = np.concatenate([np.zeros(0), *self.rewards])
        return {
            "name": self.run.name,
            "seed": self.run.seed,
            "every": read_every(self.run.path),
            "prompts": [{"row": row, "text": text} for row, text in self.prompts],
            "steps": self.steps,
            "reward": packed(rewards),
        }

    def add(self, shown: set[int]) -> None:
        """Add steps: completions, and ledgers."""
        for path in paths(self.run.path / DIRECTORY):
            for rollout_step, line, _ in members(path):
                if rollout_step in shown:
                    self._add_step(line)
        self._close_file()

    def _add_step(self, line: bytes) -> None:
        try:
            rollouts = decode_rollouts(line)
        except ValueError:
            self.damaged += 1
            return
        if sum(map(len, self.pending)) + len(line) > FILE_BYTES:
            self._close_file()
        pairs = zip(rollouts.rows, rollouts.prompts, strict=True)
        entry = {
            "rollout_step": rollouts.rollout_step,
            "group": rollouts.group,
            "prompts": [self._prompt(*pair) for pair in pairs],
            "file": self._file_name(),
            "place": len(self.pending),
        }
        if rollouts.step in self.ledgers:  # the first of steps without an update after it
            ledger, name = self.ledgers.pop(rollouts.step), f"{self.name}_ledger{rollouts.step:06d}"
            data = ledger_data(self.run, ledger, rollouts)
            self.files[f"{name}.js"] = _script(name, json.dumps(data, ensure_ascii=False))
            entry["ledger"] = name
        self.pending.append(line.decode("utf-8", "replace").strip())
        self.steps.append(entry)
        self.rewards.append(rollouts.reward)

    def _prompt(self, row: int, text: str) -> int:
        """Return the place of a prompt in the index."""
        text = text if len(text) <= MAX_PROMPT else text[:MAX_PROMPT] + "…"
        return self.prompts.setdefault((int(row), text), len(self.prompts))

    def _file_name(self) -> str:
        return f"{self.name}_steps{self.closed:04d}"

    def _close_file(self) -> None:
        if self.pending:
            name = self._file_name()
            self.files[f"{name}.js"] = _script(name, f"[{','.join(self.pending)}]")
            self.pending, self.closed = [], self.closed + 1


def _sizes(run: Run) -> dict[int, int]:
    """Return the bytes of every kept step."""
    files = paths(run.path / DIRECTORY)
    return {step: len(line) for path in files for step, line, _ in members(path)}


def _shown(sizes: dict[int, int], room: int) -> set[int]:
    """Return evenly spread steps that fit in `room` bytes together, at least the last."""
    steps = sorted(sizes)
    for interval in range(1, len(steps) + 1):
        shown = steps[::-1][::interval]
        if sum(sizes[step] for step in shown) <= room:
            return set(shown)
    return set(steps[-1:])


def _script(name: str, data: str) -> str:
    """Return a script that passes JSON on; its text ends no element and starts no comment."""
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    text = text.encode("utf-8", "replace").decode("utf-8")
    return f'ntkrlData("{name}", {text});\n'


def resource(name: str) -> str:
    """Return a file of this room: markup, a style sheet or a script."""
    return importlib.resources.files("ntkrl.report").joinpath(name).read_text("utf-8")
