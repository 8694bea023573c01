"""Back ends beside the JSONL files: TensorBoard and Weights & Biases.

Both packages are extras, imported here alone and only where a run asks for them.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ntkrl.report.names import ALIASES, aliased

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # by the extra that installs them
WANDB_ID_FILE = "wandb_id"


class Logger(Protocol):
    """What a run's metrics and timings are written to as well."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Take the values of a step: numbers, and texts such as the stage's name."""

    def close(self, failed: bool) -> None:
        """Write what is held back; `failed` where the run ended in an error."""


@dataclasses.dataclass(frozen=True)
class LoggingSettings:
    """Where metrics go beside metrics.jsonl; a run may be resumed with others.

    tensorboard: whether event files go to `tensorboard/` of the run directory.
    wandb: project at Weights & Biases, or None; WANDB_MODE=offline keeps the run here.
    aliases: key of ALIASES whose names both get beside ours, or None.
    """

    tensorboard: bool
    wandb: str | None
    aliases: str | None

    def __post_init__(self):
        problems = []
        if self.wandb == "":
            problems.append("logging.wandb is empty; name a project, or None for none")
        if self.aliases is not None and self.aliases not in ALIASES:
            problems.append(f"logging.aliases {self.aliases!r} is not among {', '.join(ALIASES)}")
        if self.aliases is not None and not self.tensorboard and self.wandb is None:
            problems.append(
                "logging.aliases needs logging.tensorboard or logging.wandb: metrics.jsonl has one "
                "name per thing"
            )
        if problems:
            raise ValueError("; ".join(problems) + ".")


def check_loggers(settings: LoggingSettings) -> None:
    """Import what the settings ask for.

    Args:
      settings: of the run.

    Raises:
      ValueError: a package is missing; all at once, with the extras that install them.
    """
    asked = {"tensorboard": settings.tensorboard, "wandb": settings.wandb is not None}
    problems = []
    for extra in [extra for extra, wanted in asked.items() if wanted]:
        package = PACKAGES[extra]
        try:
            importlib.import_module(package)
        except ImportError as error:
            problems.append(
                f"logging.{extra} needs the package {package} ({error}); "
                f"pip install 'ntkrl[{extra}]', or leave logging.{extra} out."
            )
    if problems:
        raise ValueError("\n".join(problems))


def open_loggers(
    settings: LoggingSettings, directory: Path, group: str, resume_step: int
) -> list[Logger]:
    """Open the back ends of a run.

    Args:
      settings: of the run.
      directory: the run directory, with its config.json.
      group: name that seeds of one method share.
      resume_step: optimizer steps the restored state has taken, −1 for a run from the start.

    Raises:
      ValueError: Weights & Biases refuses the run.
    """
    found: list[Logger] = []
    if settings.wandb is not None:
        found.append(WeightsAndBiases(directory, settings.wandb, group))
    if settings.tensorboard:
        found.append(TensorBoard(directory / "tensorboard", resume_step))
    if settings.aliases is None:
        return found
    return [Aliased(logger, settings.aliases) for logger in found]


class TensorBoard:
    """Event files; a resumed run hides the steps that it takes again.

    Their names have no characters but letters, digits and -_/. so that it is `eval/pass_1` there.
    """

    def __init__(self, directory: Path, resume_step: int):
        """Begin an event file of the steps after `resume_step`."""
        import tensorboardX

        # numbered: files begun in one second would have one name, and the last would remain
        number = len(list(directory.glob("events.*")))
        self._writer = tensorboardX.SummaryWriter(
            str(directory),
            purge_step=resume_step + 1,
            flush_secs=1,
            filename_suffix=f".{number:03d}",
        )
        self._texts: dict[str, str] = {}

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write numbers as scalars, and a text where it has changed."""
        for name, value in values.items():
            if not isinstance(value, str):
                self._writer.add_scalar(name, value, step)
            elif name not in self._texts or self._texts[name] != value:
                self._texts[name] = value
                self._writer.add_text(name, value, step)

    def close(self, failed: bool) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases, which a resumed run goes on with.

    Its steps only ever rise there, while a resumed run takes some again; so `step` is a metric
    like the others, and the axis of their charts.
    """

    def __init__(self, directory: Path, project: str, group: str):
        """Start the run, or go on with the one whose id the run directory holds.

        Raises:
          ValueError: Weights & Biases refuses it.
        """
        import wandb

        try:
            self._run = wandb.init(
                project=project,
                group=group,
                name=directory.name,
                id=_run_id(directory / WANDB_ID_FILE),
                resume="allow",
                dir=str(directory),
                config=json.loads((directory / "config.json").read_text(encoding="utf-8")),
            )
        except wandb.Error as error:
            said = str(error).rstrip(".")
            raise ValueError(
                f"Weights & Biases did not start the run: {said}. Log in with `wandb login`, set "
                "WANDB_MODE=offline to keep the run here, or leave logging.wandb out."
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the values beside their step."""
        self._run.log({"step": step, **values})

    def close(self, failed: bool) -> None:
        """End the run; it waits for what is still on its way."""
        self._run.finish(exit_code=int(failed))


class Aliased:
    """A back end that gets values under another library's names too."""

    def __init__(self, logger: Logger, style: str):
        """Wrap `logger`; `style` is a key of ALIASES."""
        self._logger, self._style = logger, style

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the values under both names."""
        renamed = aliased(self._style, {"step": step, **values})
        self._logger.write(step, {**values, **renamed})

    def close(self, failed: bool) -> None:
        """Close the back end."""
        self._logger.close(failed)


def _run_id(path: Path) -> str:
    """Read the run's id at Weights & Biases, or make one up.

    It is drawn, not derived from the config: a directory that was removed to start over must not
    go on with the old run, and the id of a run deleted there can never be used again.
    """
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
