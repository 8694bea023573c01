"""The study of the paper's claims on base models of its own: which runs there are, in order."""

from __future__ import annotations

from collections.abc import Iterator

from ntkrl.configs.evidence import prompts, similarity
from ntkrl.configs.evidence.arm_study import ArmStudy
from ntkrl.study import Job


class PaperStudy(ArmStudy):
    """The study of `configs/study.py`, as `ntkrl study` runs it."""

    def phases(self) -> Iterator[tuple[str, list[Job]]]:
        """Yield titles and jobs, and between them write the files that later jobs read."""
        settings = self.settings
        prompts.write_prompts(self.root)
        seeds = {size: settings.seeds for size in settings.sizes}
        seeds[settings.tuned] += settings.tuning_seeds
        bases = [(size, seed) for size in seeds for seed in seeds[size]]
        learned = [
            (size, arm, seed)
            for size in settings.sizes
            for arm in settings.learned(size)
            for seed in settings.seeds
        ]
        rewards = list(dict.fromkeys((size, seed) for size, _, seed in learned))
        yield "base models", [self.train(size, "base", seed) for size, seed in bases]
        yield (
            "base models' samples",
            [self.sample_base(*base, part) for base in bases for part in ("train", "test")],
        )
        for size, seed in rewards:
            base = self.results.place(size, "base", seed)
            samples = base / "train" / "evaluations" / f"{base.name}.jsonl"
            out = self.results.place(size, "data", seed) / "preferences.jsonl"
            prompts.write_preferences(samples, out, seed)
        yield "reward models", [self.train(size, "reward", seed) for size, seed in rewards]
        yield "choice of rates", list(self.tuning())
        yield "runs", list(self.runs())
        yield "evaluations by the true reward", [self.evaluate_truly(*run) for run in learned]
        similarity.write_all(self.results, settings.arms)

    def sample_base(self, size: str, seed: int, part: str) -> Job:
        """Return the evaluation of a base model on one part of the prompts."""
        place = self.results.place(size, "base", seed)
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
        """Return the evaluation, by the true reward, of a run with a learned one."""
        place = self.results.place(size, arm, seed)
        words = (
            "evaluate",
            self._config(size, "rl", seed, {}),
            f"--config.model.path={place / 'export'}",
            f"--config.run_dir={place / 'true'}",
        )
        done = place / "true" / "evaluations" / f"{place.name}.json"
        return Job(f"{size} {place.name}, true reward", words, done)
