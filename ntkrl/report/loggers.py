"""TensorBoard, Weights & Biases and trackio loggers; packages are imported on first use."""

import contextlib
import dataclasses
import importlib
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from ntkrl import durable_files, json_files
from ntkrl.messages import not_among
from ntkrl.report.metric_names import ALIASES, aliased

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
"""Package by the extra that installs it."""
WANDB_ID_FILE, TRACKIO_ID_FILE = "wandb_id", "trackio_id"


@dataclasses.dataclass(frozen=True)
class LoggingSettings:
    """Loggers beside metrics.jsonl; a run may be resumed with different ones.

    tensorboard: write event files to `tensorboard/` of the run directory.
    wandb: project at Weights & Biases, or None; with WANDB_MODE=offline the run stays local.
    trackio: project in the local database of trackio, or None.
    aliases: key of ALIASES; the loggers also get each metric under that library's name. Or None.
    rollouts_mib: MiB that the log of completions may take, > 0; None for no log.
    """

    tensorboard: bool
    wandb: str | None
    trackio: str | None
    aliases: str | None
    rollouts_mib: float | None = None

    @property
    def enabled(self) -> tuple[str, ...]:
        """Names of the enabled loggers, which are those of the extras."""
        enabled = {"tensorboard": self.tensorboard}
        enabled |= {"wandb": self.wandb is not None, "trackio": self.trackio is not None}
        return tuple(name for name, enable in enabled.items() if enable)

    def __post_init__(self):
        problems = []
        for name, project in (("wandb", self.wandb), ("trackio", self.trackio)):
            if project is not None and not project.strip():
                problems.append(f"logging.{name} is empty; name a project, or None for none")
        if self.aliases is not None and self.aliases not in ALIASES:
            problems.append(not_among("logging.aliases", self.aliases, ALIASES))
        if self.aliases is not None and not self.enabled:
            problems.append(
                "logging.aliases needs logging.tensorboard, logging.wandb or logging.trackio: "
                "metrics.jsonl has one name per metric"
            )
        if self.rollouts_mib is not None and not self.rollouts_mib > 0:
            problems.append(
                f"logging.rollouts_mib must be > 0 MiB, or None for no log, not {self.rollouts_mib}"
            )
        if problems:
            raise ValueError("; ".join(problems) + ".")


def check_loggers(settings: LoggingSettings) -> None:
    """Import the packages of the enabled loggers.

    Args:
      settings: of the run.

    Raises:
      ValueError: packages are missing; all at once, with the extras that install them.
    """
    problems = []
    for extra in settings.enabled:
        try:
            importlib.import_module(PACKAGES[extra])
        except ImportError as error:
            problems.append(
                f"logging.{extra} needs the package {PACKAGES[extra]} ({error}); "
                f"pip install 'ntkrl[{extra}]', or leave logging.{extra} out."
            )
    if problems:
        raise ValueError("\n".join(problems))


class Logger(Protocol):
    """A receiver of metrics and timings beside the JSONL files."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the values of a step: numbers, and texts such as the stage's name."""

    def close(self, failed: bool) -> None:
        """Flush; `failed` where the run ended in an error."""


def open_loggers(
    settings: LoggingSettings, directory: Path, group: str, resume_step: int
) -> list[Logger]:
    """Open the loggers of a run.

    Args:
      settings: of the run.
      directory: the run directory, with its config.json.
      group: name that seeds of one method share.
      resume_step: optimizer steps of the restored state, −1 for a new run.

    Raises:
      ValueError: Weights & Biases or trackio refuses the run.
    """
    loggers: list[Logger] = []
    if settings.wandb is not None:
        loggers.append(WeightsAndBiases(directory, settings.wandb, group))
    if settings.trackio is not None:
        loggers.append(Trackio(directory, settings.trackio, group))
    if settings.tensorboard:
        loggers.append(TensorBoard(directory / "tensorboard", resume_step))
    if settings.aliases is None:
        return loggers
    return [Aliased(logger, settings.aliases) for logger in loggers]


class TensorBoard:
    """Event files; a resumed run hides the steps that it repeats.

    TensorBoard's names allow only letters, digits and -_/. so `eval/pass@1` becomes `eval/pass_1`.
    Files are written in this thread: that of `tensorboardX.SummaryWriter` prints a trace when the
    disk is full, and its queue then blocks the run for ever.
    """

    def __init__(self, directory: Path, resume_step: int):
        """Begin an event file of the steps after `resume_step`.

        Raises:
          OSError: it cannot be written.
        """
        from tensorboardX.event_file_writer import EventsWriter

        self._directory, self._texts = directory, dict[str, str]()
        with self._reported():
            directory.mkdir(parents=True, exist_ok=True)
            # numbered: files begun within one second would overwrite each other
            number = len(list(directory.glob("events.*")))
            self._writer = EventsWriter(str(directory / "events"), f".{number:03d}")
            self._add(resume_step + 1, file_version="brain.Event:2")
            self._add(resume_step + 1, session_log={"status": "START"})
            self._writer.flush()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write numbers as scalars, and a text where it has changed.

        Raises:
          OSError: the file cannot be written.
        """
        from tensorboardX import summary

        with self._reported():
            for name, value in values.items():
                if not isinstance(value, str):
                    self._add(step, summary=summary.scalar(name, value))
                elif self._texts.get(name) != value:
                    self._texts[name] = value
                    self._add(step, summary=summary.text(name, value))
            self._writer.flush()

    def close(self, failed: bool) -> None:
        """Close the event file; an error is not raised if another is under way."""
        try:
            with self._reported():
                self._writer.close()
        except OSError:
            if not failed:
                raise

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(step=step, wall_time=time.time(), **content))

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"the event file in {self._directory} cannot be written: {error.strerror}; free "
                "disk space and run the same command again: it resumes from the last checkpoint."
            ) from error


class WeightsAndBiases:
    """A run at Weights & Biases, continued when the run directory is resumed.

    W&B's own steps must rise, while a resumed run repeats some; so `step` is logged as a metric
    and serves as the axis of the charts.
    """

    def __init__(self, directory: Path, project: str, group: str):
        """Start the run, or continue the one whose id is in the run directory.

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
                config=json_files.read_object(directory / "config.json", finite=False),
            )
        except wandb.Error as error:
            message = str(error).rstrip(".")
            raise ValueError(
                f"Weights & Biases did not start the run: {message}. Log in with `wandb login`, "
                "set WANDB_MODE=offline to keep the run here, or leave logging.wandb out."
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the values with their step."""
        self._run.log({"step": step, **values})

    def close(self, failed: bool) -> None:
        """End the run after uploading pending values."""
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run in the local database of trackio, continued when the run directory is resumed.

    Steps that a resumed run repeats are logged again, with the same values. Nothing is sent unless
    trackio's own variables (TRACKIO_SPACE_ID, TRACKIO_SERVER_URL) name a server.
    """

    def __init__(self, directory: Path, project: str, group: str):
        """Start the run, or continue the one whose id is in the run directory.

        Raises:
          ValueError: trackio refuses it.
        """
        import trackio

        try:
            self._run = trackio.init(
                project=project,
                group=group,
                # runs are continued by name, and two directories may have the same one
                name=f"{directory.name}-{_run_id(directory / TRACKIO_ID_FILE)}",
                resume="allow",
                config=json_files.read_object(directory / "config.json", finite=False),
                embed=False,
            )
        except (ValueError, OSError) as error:
            raise ValueError(
                f"trackio did not start the run: {str(error).rstrip('.')}. Name another project "
                "in logging.trackio, or leave it out."
            ) from error

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the values of a step."""
        self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        """End the run after writing pending values."""
        import trackio

        trackio.finish()  # of this module: it forgets the run, and does not end it again at exit


class Aliased:
    """A logger that also gets values under another library's names."""

    def __init__(self, logger: Logger, style: str):
        """Wrap `logger`; `style` is a key of ALIASES."""
        self._logger, self._style = logger, style

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the values under both names."""
        renamed = aliased(self._style, {"step": step, **values})
        self._logger.write(step, {**values, **renamed})

    def close(self, failed: bool) -> None:
        """Close the wrapped logger."""
        self._logger.close(failed)


def _run_id(path: Path) -> str:
    """Read the run's id in a logger, or draw one.

    Random instead of derived from the config: a removed directory must not continue the old run,
    and W&B never accepts the id of a deleted run again.
    """
    if not path.exists():
        durable_files.save_text(path, secrets.token_hex(4) + "\n")
    return path.read_text(encoding="utf-8").strip()
