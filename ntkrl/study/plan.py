"""What a study runs: its settings, and each run as a command with a file that says it is done."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ntkrl import runtime
from ntkrl.report import read_run, series

Rates = Mapping[str, float]
DATA = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class StudySettings:
    """A study's plan, as its config gives it.

    run_dir: directory of everything the study writes.
    jobs: commands run at a time.
    seeds, tuning_seeds: of the runs that count, and of those that rates are chosen by.
    steps, base_steps: rollout steps of a run, supervised steps of a base model.
    samples: of a test prompt in one of an evaluation's two samplings.
    arms: by size, names of the config's arms.
    grids: by arm, rates by key whose products are tried.
    tuned: the size that rates are chosen at.
    scales: by size, factor on those rates.
    sgd_rates: of the single steps of SGD.
    """

    run_dir: str
    jobs: int
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    steps: int
    base_steps: int
    samples: int
    arms: dict[str, tuple[str, ...]]
    grids: dict[str, dict[str, tuple[float, ...]]]
    tuned: str
    scales: dict[str, float]
    sgd_rates: tuple[float, ...]

    def __post_init__(self):
        problems = []
        for name in ("jobs", "steps", "base_steps", "samples"):
            if getattr(self, name) < 1:
                problems.append(f"{name} must be ≥ 1, not {getattr(self, name)}")
        if not self.seeds or set(self.seeds) & set(self.tuning_seeds):
            problems.append("seeds are needed, none of which is a tuning seed")
        if self.tuned not in self.arms:
            problems.append(f"tuned names the size {self.tuned!r}, which has no arms")
        points = {arm: len(_points(grid)) for arm, grid in self.grids.items()}
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

    @property
    def learned(self) -> list[str]:
        """Sizes with arms whose reward is a learned one."""
        return [size for size in self.sizes if any(a.startswith("rlhf") for a in self.arms[size])]

    @property
    def root(self) -> Path:
        """Directory of the study."""
        return Path(self.run_dir)

    def place(self, size: str, arm: str, seed: int) -> Path:
        """Return the directory of a run."""
        return self.root / size / f"{arm}-{seed}"


@dataclasses.dataclass(frozen=True)
class Job:
    """One command.

    name: what it is called while it runs, and its log.
    words: after `ntkrl`.
    done: exists once it has ended well.
    """

    name: str
    words: tuple[str, ...]
    done: Path


class Commands:
    """The commands of a study.

    file: the config's path, relative to where the commands run.
    """

    def __init__(self, study: StudySettings, file: str):
        self.study, self.file = study, file

    def phases(self) -> Iterator[tuple[str, list[Job]]]:
        """Yield what may run together, in order; a phase needs the ones before to have ended."""
        study = self.study
        every = {size: (*study.seeds,) for size in study.sizes}
        every[study.tuned] += study.tuning_seeds
        pairs = [(size, seed) for size, seeds in every.items() for seed in seeds]
        yield "base models", [self.train(size, "base", seed) for size, seed in pairs]
        yield (
            "base models' samples",
            [
                self.sample_base(size, seed, part)
                for size, seed in pairs
                for part in ("train", "test")
            ],
        )
        yield (
            "reward models",
            [self.train(size, "reward", seed) for size in study.learned for seed in study.seeds],
        )
        yield "choice of rates", list(self.tuning())
        yield "runs", list(self.runs())
        yield (
            "evaluations by the true reward",
            [
                self.evaluate_truly(size, arm, seed)
                for size in study.learned
                for arm in study.arms[size]
                if arm.startswith("rlhf")
                for seed in study.seeds
            ],
        )

    def tuning(self) -> Iterator[Job]:
        """Yield the runs that rates are chosen by."""
        study = self.study
        for arm, grid in study.grids.items():
            for rates, seed in itertools.product(_points(grid), study.tuning_seeds):
                place = self.tuning_place(arm, rates, seed)
                yield self.train(study.tuned, arm, seed, {**rates, "part": "validation"}, place)

    def tuning_place(self, arm: str, rates: Rates, seed: int) -> Path:
        """Return the directory of a run that rates are chosen by."""
        told = "_".join(f"{key}={value:g}" for key, value in rates.items())
        return self.study.root / self.study.tuned / "tuning" / f"{arm}_{told}-{seed}"

    def runs(self) -> Iterator[Job]:
        """Yield the runs that count."""
        study = self.study
        chosen = self.chosen()
        for size in study.sizes:
            scaled = {
                arm: {key: rate * study.scales[size] for key, rate in rates.items()}
                for arm, rates in chosen.items()
            }
            for seed, arm in itertools.product(study.seeds, study.arms[size]):
                if arm.startswith("sgd"):
                    for number, rate in enumerate(study.sgd_rates):
                        place = study.place(size, f"{arm}_{number}", seed)
                        yield self.train(size, arm, seed, {"body": rate}, place)
                else:
                    yield self.train(size, arm, seed, scaled[_grid_of(arm)])

    def chosen(self) -> dict[str, Rates]:
        """Return by grid the rates of the highest mean reward on the targets set aside.

        The reward of a run is the mean of its last two evaluations.
        """
        found: dict[str, Rates] = {}
        told: dict[str, Any] = {}
        for arm, grid in self.study.grids.items():
            means = []
            for rates in _points(grid):
                places = [self.tuning_place(arm, rates, s) for s in self.study.tuning_seeds]
                rewards = [np.mean(series(read_run(p), "eval/reward")[1][-2:]) for p in places]
                means.append(float(np.mean(rewards)))
            found[arm] = _points(grid)[int(np.argmax(means))]
            rows = [{**r, "reward": mean} for r, mean in zip(_points(grid), means, strict=True)]
            told[arm] = {"chosen": found[arm], "tried": rows}
        path = self.study.root / self.study.tuned / "rates.json"
        runtime.save_text(path, json.dumps(told, indent=2) + "\n")
        return found

    def train(
        self,
        size: str,
        arm: str,
        seed: int,
        values: Mapping[str, Any] | None = None,
        place: Path | None = None,
    ) -> Job:
        """Return the training of an arm."""
        where = self.study.place(size, arm, seed) if place is None else place
        words = ["train", self._config(size, arm, seed, {} if values is None else values)]
        if place is not None:
            words.append(f"--config.run_dir={place}")
        return Job(f"{size} {where.name}", tuple(words), where / "finished")

    def sample_base(self, size: str, seed: int, part: str) -> Job:
        """Return the evaluation of a base model on one part of the prompts."""
        place = self.study.place(size, "base", seed)
        words = (
            "evaluate",
            self._config(size, "rl", seed, {"part": part}),
            "--config.eval.base=None",
            "--config.eval.prompts=64",
            f"--config.run_dir={place / part}",
        )
        done = place / part / "evaluations" / f"{place.name}.json"
        return Job(f"{size} {place.name} on {part}", words, done)

    def evaluate_truly(self, size: str, arm: str, seed: int) -> Job:
        """Return the evaluation, by the true reward, of a run that was given a learned one."""
        place = self.study.place(size, arm, seed)
        words = (
            "evaluate",
            self._config(size, "rl", seed, {}),
            f"--config.model.path={place / 'export'}",
            f"--config.run_dir={place / 'true'}",
        )
        done = place / "true" / "evaluations" / f"{place.name}.json"
        return Job(f"{size} {place.name}, true reward", words, done)

    def _config(self, size: str, arm: str, seed: int, values: Mapping[str, Any]) -> str:
        study = self.study
        given = {"seed": seed, "root": study.run_dir, "steps": study.steps}
        given |= {"base_steps": study.base_steps, "samples": study.samples, **values}
        told = ",".join(f"{key}={_plain(value)}" for key, value in given.items())
        return f"--config={self.file}:{size}/{arm},{told}"


def _grid_of(arm: str) -> str:
    """Return whose rates an arm takes."""
    return "cfrl" if arm.startswith("cfrl") or arm.endswith("_first") else "rl"


def _points(grid: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
