"""Model, data, objective, learning rates, versions and commands of runs, as far as recorded.

From `config.json` and `starts.jsonl`, which has a line per start of a run. Directories of made-up
or older runs may lack any of it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ntkrl.report.figure_text import short_exponent
from ntkrl.report.runs import Run, by_name
from ntkrl.report.tables import NO_VALUE, Table

LOSSES = {"sft": "−log π of the completions (supervised)", "reward": "Bradley–Terry (reward model)"}
"""Objectives of the methods without a preset."""
NOT_RECORDED = "not recorded"


def facts_table(runs: Sequence[Run]) -> Table:
    """Return a table of what was run: a row per fact, a column per method."""
    groups = by_name(runs)
    most_stages = max(len(_stages(run)) for run in runs)
    facts: list[tuple[str, Callable[[Run], str]]] = [
        ("model", _model),
        (
            "data",
            lambda run: _recorded(run, "data") or _text(run, "data.path", none="built-in task"),
        ),
        ("rewards", lambda run: _text(run, "reward.function").replace(",", ", ")),
        ("objective", _objective),
        *((f"stage {place + 1}", _StageWords(place)) for place in range(most_stages)),
        ("each step", _batch),
        ("seeds", lambda run: str(run.seed)),
        ("machine", lambda run: _of_starts(run, "machine")),
        ("versions", lambda run: _of_starts(run, "versions")),
    ]
    rows = [
        (words, *(_distinct(fact(run) for run in group) for group in groups.values()))
        for words, fact in facts
    ]
    return Table("The runs", ("", *groups), tuple(rows), css="facts")


def command(run: Run) -> str:
    """Return the command that last started a run."""
    return _recorded(run, "command") or NOT_RECORDED


def _distinct(texts: Any) -> str:
    return "; ".join(dict.fromkeys(texts))


def _value(config: Any, name: str) -> Any:
    """Return a field of a config by its dotted name, None where it is missing."""
    for part in name.split("."):
        if not isinstance(config, Mapping) or part not in config:
            return None
        config = config[part]
    return config


def _text(run: Run, name: str, none: str = NO_VALUE) -> str:
    """Return a field as text; `none` for None, "–" where the config does not have it."""
    section = name.partition(".")[0]
    if section not in run.config:
        return NO_VALUE
    value = _value(run.config, name)
    return none if value is None else str(value)


def _recorded(run: Run, name: str) -> str:
    """Return the last record of a fact, "" where there is none."""
    values = [str(start[name]) for start in run.starts if name in start]
    return values[-1] if values else ""


def _model(run: Run) -> str:
    recorded = _recorded(run, "model")
    if recorded:
        return recorded
    path, architecture = (_value(run.config, f"model.{name}") for name in ("path", "architecture"))
    if path is None:
        return NO_VALUE if architecture is None else f"new {architecture}"
    return str(path)


def _data(run: Run) -> str:
    return _recorded(run, "data") or _text(run, "data.path", none="built-in task")


def _objective(run: Run) -> str:
    """Return the preset, and the settings that the run recorded or the config changes."""
    method = _value(run.config, "method")
    if method in LOSSES:
        return LOSSES[method]
    preset = _value(run.config, "objective.preset")
    recorded = _recorded(run, "objective")
    if recorded:
        return f"{preset}: {recorded}"
    section = _value(run.config, "objective")
    changes = section.items() if isinstance(section, Mapping) else ()
    words = [f"{name} {value}" for name, value in changes if value is not None and name != "preset"]
    return NO_VALUE if preset is None else " · ".join([str(preset), *words])


def _stages(run: Run) -> Sequence[Any]:
    stages = _value(run.config, "stages")
    return stages if isinstance(stages, list | tuple) else ()


class _StageWords:
    """A stage by its place, in words: name, length, optimizer and learning rates."""

    def __init__(self, place: int):
        self.place = place

    def __call__(self, run: Run) -> str:
        stages = _stages(run)
        if len(stages) <= self.place:
            return NO_VALUE
        stage = stages[self.place]
        limits = [(_value(stage, "steps"), "steps"), (_value(stage, "epochs"), "epochs")]
        words = [f"{count:g} {unit}" for count, unit in limits if isinstance(count, int | float)]
        words.append(str(_value(stage, "optimizer")))
        rows = _value(stage, "parameters")
        rates = [
            f"{row[0]} {'frozen' if row[1] is None else f'at {rate_words(row[1])}'}"
            for row in (rows if isinstance(rows, list | tuple) else ())
            if isinstance(row, list | tuple) and len(row) == 2
        ]
        return f"{_value(stage, 'name')}, {', '.join(words)}: {', '.join(rates)}"


def rate_words(rate: Any) -> str:
    """Return a learning rate without the zeros of its exponent: 1e-5."""
    return short_exponent(f"{rate:g}") if isinstance(rate, int | float) else str(rate)


def _batch(run: Run) -> str:
    prompts = _value(run.config, "data.prompts_per_step")
    if prompts is None:
        return NO_VALUE
    completions = _value(run.config, "rollout.completions_per_prompt")
    if _value(run.config, "method") in LOSSES or completions is None:
        return f"{prompts} examples"
    return f"{prompts} prompts × {completions} completions"


def _of_starts(run: Run, name: str) -> str:
    """Return the distinct values of an entry over the starts of a run."""
    values = [start[name] for start in run.starts if name in start]
    words = [
        ", ".join(f"{package} {version}" for package, version in value.items())
        if isinstance(value, Mapping)
        else str(value)
        for value in values
    ]
    return _distinct(words) if words else NOT_RECORDED
