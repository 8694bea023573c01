"""A run directory as an object: metrics, ledgers, report, evaluations, model and exports."""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ntkrl import data, models, report, runtime
from ntkrl.api import functions, overrides, rows
from ntkrl.api.call import name_rows
from ntkrl.evaluation import commands
from ntkrl.messages import path_text
from ntkrl.report import Explanation, StepLedger
from ntkrl.setup import NO_INPUTS, Inputs
from ntkrl.types import Params, Policy, Scorer

HEADLINES = ("eval/reward", "eval/accuracy", "reward", "accuracy", "loss")
"""Metrics that the representation shows, the first that a run has."""


class TrainingRun:
    """A training run, by its directory, which is read when an attribute is.

    directory: of the run. inputs: values of the program that trained it.
    """

    def __init__(self, directory: str | os.PathLike, inputs: Inputs = NO_INPUTS):
        """Open a run directory.

        Raises:
          ValueError: no run there.
        """
        self.directory, self.inputs = Path(directory), inputs
        _ = self.config

    def __repr__(self) -> str:
        metrics = self.metrics
        state = "stopped" if self.stopped else "finished"
        last = metrics["step"][-1] if metrics["step"] else 0
        name = next((name for name in HEADLINES if name in metrics), None)
        values = [v for v in metrics[name] if not math.isnan(v)] if name is not None else []
        headline = f"{name} {values[0]:.4g} → {values[-1]:.4g}" if values else "no metrics yet"
        export = self.directory / "export"
        model = f"model {export}" if export.exists() else "no exported model yet"
        config = self.config
        return (
            f"Run {self.directory}: {state} after step {last}\n"
            f"  {config.name}, seed {config.seed}: {headline}\n  {model}"
        )

    @property
    def config(self) -> ConfigDict:
        """The config of the run."""
        return commands.config_of(str(self.directory))

    @property
    def stopped(self) -> bool:
        """True if steps are left: the same call as before, or the same command, takes them."""
        return report.finished_problems(self.directory, exports=False) != []

    @property
    def metrics(self) -> dict[str, list[Any]]:
        """Columns by name, a row per line of metrics.jsonl: NaN where a line lacks a number.

        `pandas.DataFrame(run.metrics)` is its table.
        """
        lines = report.read_metrics(self.directory)
        names = dict.fromkeys(("step", *(name for line in lines for name in line)))
        absent = {name: None if name == "stage" else math.nan for name in names}

        def value(line: dict[str, Any], name: str) -> Any:
            return line[name] if name in line and line[name] is not None else absent[name]

        return {name: [value(line, name) for line in lines] for name in names}

    def report(self, out: str | os.PathLike | None = None) -> Path:
        """Write the page with figures and tables; return its path.

        Args:
          out: directory; None for `report/` in the run's.
        """
        kind = "the name of a directory"
        target = self.directory / "report" if out is None else Path(path_text(out, "out", kind))
        return Path(report.write_report([self.directory], target))

    def ledger(self, step: int) -> StepLedger:
        """Return the ledger of an optimizer step: the causes of the change of each probe token.

        Args:
          step: an optimizer step with a ledger, see `probe.ledger_every_steps`.

        Raises:
          ValueError: there is none.
        """
        return report.find_ledger(report.read_run(self.directory), step)

    def explain(
        self,
        step: int | None = None,
        measure: str = "entropy",
        *,
        prompt: int | str | None = None,
        completion: int | None = None,
        token: int | None = None,
        top: int = 5,
    ) -> Explanation:
        """Explain the change of a quantity in an optimizer step: its parts, samples and places.

        Args:
          step: an optimizer step with a ledger; None for the last.
          measure: "entropy" or "log_prob".
          prompt: number of a probe prompt, or a part of its text; None for the one that changed
            most.
          completion: number of a probe completion, or None for all of the prompt.
          token: number of one of its tokens, from 0, or None for all.
          top: most samples and places listed.

        Returns:
          The explanation; `print` shows it.

        Raises:
          ValueError: no such ledger, measure, prompt, completion or token.
        """
        place = report.Place(prompt, completion, token)
        return report.explain(report.read_run(self.directory), step, measure, place, top)

    def evaluate(
        self,
        prompts: Any = None,
        rewards: Any = None,
        *,
        step: int | str | None = None,
        config: dict[str, Any] | None = None,
        trust: bool = False,
    ) -> dict[str, float]:
        """Score a checkpoint of the run on held-out prompts; print and write the metrics.

        Args:
          prompts: as for `ntkrl.train`; None for the held-out ones of the run.
          rewards: as for `ntkrl.train`; None for those of the run.
          step: rollout step of a checkpoint that was kept, "best", or None for the newest.
          config: changes of settings, as for `ntkrl.train`.
          trust: execute the code that the directory names, whoever wrote it.

        Returns:
          The `eval/…` and `diversity/…` metrics.

        Raises:
          ValueError: a mistake in the arguments, or no such checkpoint.
        """
        values, changes = self.config, {} if config is None else config
        if not isinstance(changes, dict):
            raise ValueError(
                f"config is {type(changes).__name__}; pass a dict of changes, such as "
                "{'eval.samples_per_prompt': 16}."
            )
        named: dict[str, data.RowFile] = {}
        in_memory = dict(self.inputs.functions)
        if prompts is not None:
            read = rows.read_rows(prompts, "prompts")
            named = name_rows(values, {"eval_path": read})
            values.eval.prompts = rows.count_rows(read)
        if rewards is not None:
            values.reward.function, in_memory = functions.read_rewards(rewards)
        overrides.override(values, changes)
        inputs = Inputs({**self.inputs.rows, **named}, in_memory)
        trusted = trust or self.inputs is not NO_INPUTS
        with runtime.distributed_session(f"evaluate {self.directory}"):
            runtime.enable_compile_cache()
            return commands.evaluate(values, str(self.directory), step, trusted, inputs)

    @property
    def policy(self) -> Policy | Scorer:
        """The network at the end of the run, or at its newest checkpoint."""
        return self._model[0]

    @property
    def params(self) -> Params:
        """The params of `policy`."""
        return self._model[1]

    @functools.cached_property
    def _model(self) -> tuple[Policy | Scorer, Params]:
        export = self.directory / "export"
        if self.stopped or not export.exists():
            model, params, _ = commands.restore(str(self.directory))
            return model.network, params
        load: Any = models.load_scorer if self.config.method == "reward" else models.load
        return load(export)

    def export(self, out: str | os.PathLike, step: int | str | None = None) -> Path:
        """Write a checkpoint as a Hugging Face directory; return the directory.

        Args:
          out: directory, outside of the run's.
          step: rollout step of a checkpoint that was kept, "best", or None for the newest.

        Raises:
          ValueError: no such checkpoint, or a directory whose files would be lost.
        """
        target = path_text(out, "out", "the name of a directory")
        commands.export(str(self.directory), target, step)
        return Path(target)


def open_run(directory: str | os.PathLike) -> TrainingRun:
    """Open the directory of a run, finished or not.

    Args:
      directory: such as "runs/rl".

    Raises:
      ValueError: no run there.
    """
    return TrainingRun(path_text(directory, "directory", "the path of a run directory"))
