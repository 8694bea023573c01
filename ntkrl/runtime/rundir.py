"""config.json of a run directory, and changes of it that a resumed run may have."""

import contextlib
import itertools
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ntkrl import directory_kinds
from ntkrl.durable_files import save_text
from ntkrl.json_files import parse_json, read_object
from ntkrl.run_lock import DirectoryLock
from ntkrl.runtime.config import differences
from ntkrl.runtime.distributed import allgather_object, is_writer, log
from ntkrl.user_files import IN_PROCESS

SHARED_SECONDS = 60.0
"""Time until a new file is visible on every host."""
TRAINING_FILES = (
    *("metrics.jsonl", "timings.jsonl", "layout.json", "finished", "checkpoints"),
    *("probes", "ledger", "rollouts", "export", "export_reference", "starts.jsonl"),
)
"""Files and directories that a run replaces or shortens."""
ALLOWED = {
    "checkpoint": "schedule and retention only, not the computation",
    "logging": "loggers only, not the computation",
    "mesh": "same numbers up to rounding",
    "rollout.mesh": "same numbers up to rounding",
    "run_dir": "path of the run",
    "schedule.log_ratio_tolerance": "a check only, not the computation",
}
"""Sections and fields of a config that a resumed run may change, and why: the run computes what it
would have computed. Any other difference but a longer last stage would mix two runs, and is
refused."""
LENGTHS = ("steps", "epochs")
"""Fields of a stage that may grow when a run is resumed: it goes on."""
TRAINED = ("finished", "export", "export_reference", "adapter", "ledger")
"""Files and directories that only a run has that has trained."""
UNTRAINED = (
    *("metrics.jsonl", "timings.jsonl", "starts.jsonl", "layout.json"),
    *("probes", "checkpoints", "tokenizer"),
)
"""Files and directories of a run before its first step, besides config.json."""


def locked(
    directory: Path, command: str, done: str | None = None, name: str = "run"
) -> contextlib.AbstractContextManager[object]:
    """Return a context in which process 0 has the lock of a directory, see `run_lock`.

    Args:
      directory: that the command writes into.
      command: in words.
      done: name of a file there that means that nothing will be written; no lock is taken then.
      name: of the lock.
    """
    finished = done is not None and (directory / done).exists()
    if finished or not is_writer():
        return contextlib.nullcontext()
    return DirectoryLock(directory, f"ntkrl {command}", name)


def config_changes(saved: Mapping[str, Any], config: Mapping[str, Any], subject: str) -> list[str]:
    """Return the allowed differences between two configs, with the reason.

    Stages may become longer, and what is ALLOWED may change.

    Args:
      saved, config: as JSON values.
      subject: name, in messages, of what was created with `saved`.

    Raises:
      ValueError: any other difference; the message lists all of both kinds.
    """
    renamed = _with_functions(saved, config)
    allowed, refused = stage_lengths(saved, config)
    refused = differences(config_identity(renamed), config_identity(config)) + refused
    reason = "the same function by its name"
    allowed += [f"{change} ({reason})" for change in differences(saved, renamed)]
    allowed += [
        f"{change} ({reason})"
        for name, reason in ALLOWED.items()
        for change in differences(_part(saved, name), _part(config, name))
    ]
    if not refused:
        return allowed
    also = f" Also changed, but allowed: {'; '.join(allowed)}." if allowed else ""
    raise ValueError(
        f"{subject} was begun with another config: {'; '.join(refused)}.{also} Undo these changes, "
        "set another --config.run_dir, or remove the directory to start over."
    )


def stage_lengths(
    saved: Mapping[str, Any], config: Mapping[str, Any], ended: int = 0
) -> tuple[list[str], list[str]]:
    """Return the changes of the lengths of stages: those with which a run goes on, and others.

    Args:
      saved, config: as JSON values.
      ended: stages that have ended before the current one, whose length is past.
    """
    allowed, refused = [], []
    pairs = zip(_stages(saved), _stages(config), strict=False)
    for number, (before, after) in enumerate(pairs):
        for field in LENGTHS:
            old, new = before.get(field), after.get(field)
            if old == new:
                continue
            change = f"stages[{number}].{field}: {old!r} -> {new!r}"
            if old is None or new is None:
                refused.append(change)
            elif new < old:
                refused.append(f"{change} (a run goes on for more {field}, never for fewer)")
            elif number < ended:
                refused.append(f"{change} (that stage has ended; lengthen the last stage alone)")
            else:
                schedule = after.get("schedule")
                constant = schedule in (None, "constant")
                also = "" if constant else f", its {schedule} schedule over the new length"
                allowed.append(f"{change} (the run goes on{also})")
    return allowed, refused


def is_longer(directory: Path, config: Mapping[str, Any]) -> bool:
    """Return whether a config makes stages of the run in a directory longer."""
    path = directory / "config.json"
    return path.is_file() and bool(stage_lengths(read_object(path, finite=False), config)[0])


def _stages(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    stages = values.get("stages")
    rows = stages if isinstance(stages, list) else []
    return [row if isinstance(row, Mapping) else {} for row in rows]


def _with_functions(saved: Mapping[str, Any], config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the saved config with the config's name of reward functions that are the same.

    A program that calls a run names its functions `python:NAME`; the same run may go on with
    `FILE.py:NAME`, and the reverse.
    """
    sections = [values["reward"] if "reward" in values else {} for values in (saved, config)]
    texts = [section["function"] if "function" in section else None for section in sections]
    if texts[0] == texts[1] or None in texts:
        return saved
    pairs = list(itertools.zip_longest(*((text or "").split(",") for text in texts), fillvalue=""))
    same = all(
        before == after
        or (
            before.rpartition(":")[2] == after.rpartition(":")[2]
            and (before.startswith(IN_PROCESS) or after.startswith(IN_PROCESS))
        )
        for before, after in pairs
    )
    return {**saved, "reward": {**sections[0], "function": texts[1]}} if same else saved


def config_identity(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a config that must not change within a run: all but ALLOWED, LENGTHS."""
    identity = {name: value for name, value in values.items() if name not in ALLOWED}
    identity["stages"] = [
        {name: value for name, value in stage.items() if name not in LENGTHS}
        for stage in _stages(values)
    ]
    for name in ALLOWED:
        section, _, field = name.partition(".")
        if field and section in identity:
            fields = identity[section].items()
            identity[section] = {key: value for key, value in fields if key != field}
    return identity


def _part(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a section, or a field of one, by its name; empty if the config does not have it."""
    section, _, field = name.partition(".")
    if section not in values or not field:
        return {name: values[section]} if section in values else {}
    return {name: values[section][field]} if field in values[section] else {}


def check_run_dir(
    directory: Path, config: Mapping[str, Any], files: Sequence[str] = TRAINING_FILES
) -> list[str] | None:
    """Check that a run directory belongs to the same config.

    Args:
      directory: the run directory.
      config: as JSON values.
      files: that will be replaced there.

    Returns:
      The allowed differences, see `config_changes`; None if it has no config.json yet.

    Raises:
      ValueError: it was begun with another config, or has files that no run of a config wrote.
    """
    path = directory / "config.json"
    if not path.exists():
        foreign = [name for name in files if _has_content(directory / name)]
        if foreign:
            raise ValueError(
                f"{directory} has no config.json, so its {', '.join(foreign)} may not be this "
                "program's and would be replaced; move them, or set another --config.run_dir."
            )
        return None
    saved = read_object(path, finite=False)
    if not directory_kinds.is_run_config(saved):
        what = "a Hugging Face directory" if directory_kinds.is_model(directory) else "of no run"
        raise ValueError(
            f"{directory} is {what}, and a run would replace its config.json; set another "
            "--config.run_dir."
        )
    return config_changes(saved, config, str(directory))


def clear_untrained(directory: Path, config: Mapping[str, Any]) -> None:
    """Remove the files of a run of another config that has trained nothing.

    A run that fails before its first step does so with files of its own, which claim nothing. A
    directory whose config.json is of no run, such as a model's, is left as it is.
    """
    path = directory / "config.json"
    if not directory_kinds.is_run(directory) or not _is_untrained(directory):
        return
    try:
        config_changes(read_object(path, finite=False), config, str(directory))
    except ValueError:
        log(f"{directory} is of another config, under which nothing was trained: beginning anew")
        for name in UNTRAINED:
            place = directory / name
            shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        path.unlink()  # last, since files without it are nobody's


def _is_untrained(directory: Path) -> bool:
    """Return whether a run has neither a checkpoint nor metrics of a step."""
    if any((directory / name).exists() for name in TRAINED):
        return False
    if any(path.name.isdigit() for path in (directory / "checkpoints").glob("*")):
        return False
    metrics = directory / "metrics.jsonl"
    for line in metrics.read_bytes().splitlines() if metrics.is_file() else ():
        try:
            row = parse_json(line.decode(), finite=False)
        except ValueError:
            return False
        if not isinstance(row, dict) or row.get("step") != 0:
            return False
    return True


@contextlib.contextmanager
def unclaimed(directory: Path) -> Iterator[None]:
    """Remove the tokenizer that a block wrote into a directory, if it fails before config.json."""
    before = (directory / "tokenizer").exists()
    try:
        yield
    except BaseException:
        if is_writer() and not before and not (directory / "config.json").exists():
            shutil.rmtree(directory / "tokenizer", ignore_errors=True)
        raise


def _has_content(path: Path) -> bool:
    """Return whether there is a file, or a directory that is not empty."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def claim_run_dir(directory: Path, config: Mapping[str, Any]) -> None:
    """Write config.json, creating the directory, unless it is up to date.

    Raises:
      ValueError: as `check_run_dir`.
    """
    if check_run_dir(directory, config, ()) != []:
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        save_text(directory / "config.json", text)


def check_shared(directory: Path) -> None:
    """Check that every process sees the run directory of the first.

    Raises:
      ValueError: this process does not see the config that the first one wrote.
    """
    paths = allgather_object("the run directory", str(directory.absolute()))
    deadline = time.monotonic() + SHARED_SECONDS if len(paths) > 1 else 0.0
    while not (directory / "config.json").exists():
        if time.monotonic() > deadline:
            raise ValueError(
                f"{directory} is not the directory that process 0 writes to ({paths[0]} there); "
                "give a run_dir on a file system that all hosts share."
            )
        time.sleep(0.5)
