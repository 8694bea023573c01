"""Studies: many runs from one config file, resumed where they stopped, and a page about them.

Promise: one command runs what has not run yet, every run is a command that is recorded, and the
page is made from run directories alone. The config file defines the study: its runs, and what the
page says about them (see `configs/study.py`).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from ml_collections import ConfigDict

from ntkrl import runtime, user_files
from ntkrl.messages import printable
from ntkrl.run_lock import DirectoryLock
from ntkrl.study.archive import save_archive
from ntkrl.study.jobs import Job, run_jobs, started_commands
from ntkrl.study.overview import ArmGroup, figure_html, group_sections
from ntkrl.study.results import (
    Measure,
    Point,
    Results,
    area,
    at_time,
    change,
    first,
    grid_points,
    last,
    mean_interval,
    mean_of,
    paired,
    rank_points,
    training_seconds,
    write_run_metrics,
)


class Study(Protocol):
    """A study, as `get_study(config, file)` of its config file returns it.

    root: directory of everything the study writes.
    jobs: commands at a time.
    """

    root: Path
    jobs: int

    def phases(self) -> Iterable[tuple[str, Sequence[Job]]]:
        """Yield titles and jobs; a phase is requested after all earlier ones have succeeded."""

    def write_page(self, command: str) -> Path:
        """Write the page from the runs that exist, and name the command on it."""


def run_study(config: ConfigDict, file: str, page_only: bool = False) -> Path:
    """Run what has not run yet, and write the page.

    Args:
      config: of the study.
      file: its config file, or the name of a packaged config.
      page_only: run nothing; the page says what is missing.

    Returns:
      The page.

    Raises:
      ValueError: the file defines no study, another process runs it, or a run failed.
    """
    study, command = load_study(config, file), printable(f"ntkrl study --config={file}")
    if page_only:
        return study.write_page(command)
    with DirectoryLock(study.root, "ntkrl study", "study"):
        for title, jobs in study.phases():
            run_jobs(title, jobs, study.jobs, study.root)
        return study.write_page(command)


def load_study(config: ConfigDict, file: str) -> Study:
    """Return the study that a config file defines.

    Raises:
      ValueError: it defines none, or the config is refused.
    """
    file = file.partition(":")[0]  # its variant is in the config
    module = user_files.execute(runtime.find_config(file))
    if not hasattr(module, "get_study"):
        raise ValueError(
            f"{file} is not the config of a study; expected get_study(config, file) beside its "
            "get_config, as in configs/study.py."
        )
    return module.get_study(config, file)
