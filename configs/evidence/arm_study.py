"""A study of arms over seeds: its settings, the choice of rates, and the runs that are compared."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ntkrl import durable_files
from ntkrl.configs.evidence import page
from ntkrl.configs.evidence.claims import verdicts
from ntkrl.report import read_run
from ntkrl.study import (
    Job,
    Point,
    Results,
    grid_points,
    rank_points,
    save_archive,
    started_commands,
    write_run_metrics,
)

RUN = re.compile(r"--config=[^:]+:(\w+)/(\w+),seed=(\d+)")
RUN_DIR = re.compile(r"--config\.run_dir=(\S+)")


@dataclasses.dataclass(frozen=True)
class StudySettings:
    """Settings of a study.

    run_dir: directory of everything the study writes.
    jobs: commands at a time.
    seeds, tuning_seeds: of the compared runs, and of the runs that choose rates.
    steps: rollout steps of a run.
    task: its name in the verdicts.
    samples: per test prompt, in each of an evaluation's two samplings.
    arms: by size, names of the config's arms.
    grids: by arm, values of each rate; all their combinations are tried.
    tuned: the size at which rates are chosen.
    scales: by size, factor on the chosen rates.
    step_rates: of the arms of one optimizer step.
    fields: further keys of a run's config, the same in every run.
    control_seeds: of all arms but those of the grids, the first of seeds; None for all.
    """

    run_dir: str
    jobs: int
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    steps: int
    task: str
    samples: int
    arms: dict[str, tuple[str, ...]]
    grids: dict[str, dict[str, tuple[float, ...]]]
    tuned: str
    scales: dict[str, float]
    step_rates: dict[str, tuple[float, ...]]
    fields: dict[str, Any]
    control_seeds: int | None

    def __post_init__(self):
        problems = []
        for name in ("jobs", "steps", "samples", "control_seeds"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                problems.append(f"{name} must be ≥ 1, not {getattr(self, name)}")
        if not self.seeds or set(self.seeds) & set(self.tuning_seeds):
            problems.append("seeds are needed, none of which is a tuning seed")
        if self.tuned not in self.arms:
            problems.append(f"tuned names the size {self.tuned!r}, which has no arms")
        points = {arm: len(grid_points(grid)) for arm, grid in self.grids.items()}
        if len(set(points.values())) > 1:
            problems.append(f"grids must have equally many points, not {points}")
        for size in self.arms:
            if size not in self.scales:
                problems.append(f"scales has no entry for {size}")
            missing = [arm for arm in self.grids if arm not in self.arms[size]]
            if missing:
                problems.append(f"{size} lacks the arms of the grids: {', '.join(missing)}")
        if problems:
            raise ValueError("study: " + "; ".join(problems) + ".")

    @property
    def sizes(self) -> list[str]:
        """Sizes, small ones first: rates shrink as widths grow."""
        return sorted(self.arms, key=lambda size: -self.scales[size])

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """Return the seeds of an arm."""
        return self.seeds if arm in self.grids else self.seeds[: self.control_seeds]

    def learned(self, size: str) -> list[str]:
        """Return the arms of a size whose reward is a learned one."""
        return [arm for arm in self.arms[size] if arm.startswith("rlhf")]


class ArmStudy:
    """What studies share; `phases` is theirs. file: path of the config, as commands name it."""

    def __init__(self, settings: StudySettings, file: str):
        self.settings, self.file = settings, file
        self.root, self.jobs = Path(settings.run_dir), settings.jobs
        self.results = Results(self.root, settings.seeds)

    def write_page(self, command: str) -> Path:
        """Write the page, the verdicts, every run's metrics and the archive of small files."""
        settings = self.settings
        listed = verdicts(self.results, settings)
        text = json.dumps([verdict._asdict() for verdict in listed], indent=2)
        durable_files.save_text(self.root / "verdicts.json", text + "\n")
        durable_files.save_text(self.root / "verdicts.md", page.markdown(listed, command))
        commands = self.commands()
        runs = [
            (str(run.path.relative_to(self.root)), commands.get(run.path), run)
            for size in settings.sizes
            for run in self.results.finished(size)
        ]
        metrics = page.metrics(settings.samples)
        write_run_metrics(self.root / "runs.jsonl", runs, page.MEASURES, metrics)
        archive = self.root / "runs.tar.xz"
        tuning = ("probes/*", "timings.jsonl", "starts.jsonl")
        large = save_archive(self.root, archive, [f"*/tuning/*/{name}" for name in tuning])
        if large:
            print(f"too large for {archive}: {', '.join(large)}")
        return page.write_page(self.results, settings, listed, command)

    def tuning(self) -> Iterator[Job]:
        """Yield the runs that choose rates."""
        settings = self.settings
        for arm, grid in settings.grids.items():
            for point in grid_points(grid):
                for seed in settings.tuning_seeds:
                    place, values = self.tuning_place(arm, point, seed), {"part": "validation"}
                    yield self.train(settings.tuned, arm, seed, {**point, **values}, place)

    def tuning_place(self, arm: str, point: Point, seed: int) -> Path:
        """Return the directory of a run that chooses rates."""
        words = "_".join(f"{key}={value:g}" for key, value in point.items())
        return self.root / self.settings.tuned / "tuning" / f"{arm}_{words}-{seed}"

    def chosen(self) -> dict[str, Point]:
        """Choose each grid's rates by the mean reward on the targets set aside.

        The reward of a run is the mean of its last two evaluations.
        """
        rates, table = {}, {}
        for arm, grid in self.settings.grids.items():
            points, seeds = grid_points(grid), self.settings.tuning_seeds
            runs = [[read_run(self.tuning_place(arm, p, s)) for s in seeds] for p in points]
            rates[arm], rows = rank_points(points, runs, "eval/reward")
            table[arm] = {"chosen": rates[arm], "tried": rows}
        path = self.root / self.settings.tuned / "rates.json"
        durable_files.save_text(path, json.dumps(table, indent=2) + "\n")
        return rates

    def runs(self) -> Iterator[Job]:
        """Yield the runs that are compared, seed by seed, the arms of the grids first."""
        settings, chosen = self.settings, self.chosen()
        for size in settings.sizes:
            scale = settings.scales[size]
            scaled = {arm: {k: rate * scale for k, rate in chosen[arm].items()} for arm in chosen}
            for seed, arm in self._ordered(size):
                if arm not in settings.step_rates:
                    yield self.train(size, arm, seed, scaled[self.grid_of(arm)])
                    continue
                for number, rate in enumerate(settings.step_rates[arm]):
                    place = self.results.place(size, f"{arm}_{number}", seed)
                    yield self.train(size, arm, seed, {"body": rate}, place)

    def _ordered(self, size: str) -> list[tuple[int, str]]:
        settings = self.settings
        pairs = [(seed, arm) for seed in settings.seeds for arm in settings.arms[size]]
        pairs = [(seed, arm) for seed, arm in pairs if seed in settings.seeds_of(arm)]
        return sorted(pairs, key=lambda pair: pair[1] not in settings.grids)

    def grid_of(self, arm: str) -> str:
        """Return the arm whose rates an arm takes."""
        first = arm.startswith("cfrl") or arm.endswith(("_first", "_cfrl"))
        return "cfrl" if first else "rl"

    def train(
        self,
        size: str,
        arm: str,
        seed: int,
        values: Mapping[str, Any] | None = None,
        run_dir: Path | None = None,
    ) -> Job:
        """Return the training of an arm; run_dir: its directory, if not the arm's and seed's."""
        place = self.results.place(size, arm, seed) if run_dir is None else run_dir
        words = ["train", self._config(size, arm, seed, {} if values is None else values)]
        if run_dir is not None:
            words.append(f"--config.run_dir={run_dir}")
        return Job(f"{size} {place.name}", tuple(words), place / "finished")

    def commands(self) -> dict[Path, str]:
        """Return the training commands started so far, by run directory."""
        by_place = {}
        for line in started_commands(self.root):
            run, run_dir = RUN.search(line), RUN_DIR.search(line)
            if run and line.startswith("ntkrl train"):
                size, arm, seed = run.groups()
                place = self.results.place(size, arm, int(seed))
                by_place[Path(run_dir[1]) if run_dir else place] = line
        return by_place

    def _config(self, size: str, arm: str, seed: int, values: Mapping[str, Any]) -> str:
        settings = self.settings
        fields = {"seed": seed, "root": settings.run_dir, "steps": settings.steps}
        fields |= {"samples": settings.samples, **settings.fields, **values}
        words = [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in fields.items()]
        return f"--config={self.file}:{size}/{arm},{','.join(words)}"
