"""The study on a pretrained model: which runs there are, in order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ntkrl import durable_files
from ntkrl.configs.evidence import list_claims, similarity, spread
from ntkrl.configs.evidence.arm_study import ArmStudy
from ntkrl.configs.evidence.claims import PAIRS
from ntkrl.configs.pretrained import lists
from ntkrl.study import Job

CONTEXTS = 12
"""Prompts of the exact kernels."""
COMPARED = ("rl", "cfrl")
SUPERVISED = 8
"""Right answers of each training category, for supervised training."""


class PretrainedStudy(ArmStudy):
    """The study of `configs/pretrained/study.py`, as `ntkrl study` runs it."""

    def phases(self) -> Iterator[tuple[str, list[Job]]]:
        """Yield titles and jobs, and between them write the files that later jobs read."""
        settings, (size,) = self.settings, self.settings.sizes
        self.write_prompts()
        model = self.root / "model"
        words = ("export", settings.fields["model"], str(model))
        yield "the model", [Job("the model", words, model / "config.json")]
        yield "the model's samples", [self.sample_model(size, seed) for seed in settings.seeds]
        yield "choice of rates", list(self.tuning())
        yield "runs", list(self.runs())
        compared = [arm for pair in PAIRS for arm in pair if arm in settings.arms[size]]
        runs = [(arm, seed) for arm in compared for seed in settings.seeds_of(arm)]
        yield "their samples", [self.sample_end(size, arm, seed) for arm, seed in runs]
        self.write_features(size, model)
        yield "kernels", [self.kernel(size, arm) for arm in ("base", *COMPARED)]

    def write_prompts(self) -> None:
        """Write the prompts of training, of the choice of rates and of tests, and the kernels'."""
        parts = {
            "train": [name for i, name in enumerate(lists.TRAIN) if i % 4 != 3],
            "validation": list(lists.TRAIN[3::4]),
            "test": list(lists.TEST),
        }
        for name, categories in parts.items():
            rows = [json.dumps(row) + "\n" for row in lists.rows(categories)]
            durable_files.save_text(self.root / "data" / f"{name}.jsonl", "".join(rows))
        rng = np.random.default_rng(0)
        rows = [
            json.dumps({**row, "completion": [{"role": "assistant", "content": answer}]}) + "\n"
            for row in lists.rows(parts["train"])
            for answer in right_answers(row["category"], rng)
        ]
        durable_files.save_text(self.root / "data" / "supervised.jsonl", "".join(rows))
        rows = [json.dumps(row) + "\n" for row in lists.rows(lists.TEST[:CONTEXTS])]
        durable_files.save_text(self.root / "data" / "contexts.jsonl", "".join(rows))

    def sample_model(self, size: str, seed: int) -> Job:
        """Return the evaluation of the starting model on the test categories."""
        place = self.results.place(size, "base", seed)
        words = (
            "evaluate",
            self._config(size, "rl", seed, {}),
            "--config.eval.base=None",
            f"--config.eval.name={place.name}",
            f"--config.run_dir={place / 'test'}",
        )
        done = place / "test" / "evaluations" / f"{place.name}.json"
        return Job(f"{size} {place.name}", words, done)

    def sample_end(self, size: str, arm: str, seed: int) -> Job:
        """Return the evaluation of a run's export on the test categories."""
        place = self.results.place(size, arm, seed)
        words = (
            "evaluate",
            self._config(size, arm, seed, {}),
            "--config.eval.base=None",
            f"--config.eval.name={place.name}",
            "--config.model.untie=False",
            f"--config.model.path={place / 'export'}",
            f"--config.run_dir={place / list_claims.END}",
        )
        done = list_claims.samples_file(place, list_claims.END).with_suffix(".json")
        return Job(f"{size} {place.name}, samples", words, done)

    def kernel(self, size: str, arm: str) -> Job:
        """Return the exact kernels of the test prompts, of the start or of a run's end."""
        place = self.results.place(size, arm, self.settings.seeds[0])
        export = self.root / "model" if arm == "base" else place / "export"
        words = (
            "kernel",
            str(export),
            f"--prompts={self.root / 'data' / 'contexts.jsonl'}",
            f"--out={place / 'kernel'}",
        )
        return Job(f"{size} {place.name}, kernels", words, place / "kernel" / "kernel.png")

    def write_features(self, size: str, model: Path) -> None:
        """Write similarities of features and spreads of gradients, before and after training."""
        for seed in tqdm(self.settings.seeds, desc="features by place"):
            base = self.results.place(size, "base", seed)
            samples = base / "test" / "evaluations" / f"{base.name}.jsonl"
            for arm in ("base", *COMPARED):
                place = self.results.place(size, arm, seed)
                export = model if arm == "base" else place / "export"
                if not (place / similarity.FILE).exists():
                    similarity.write_similarities(export, samples, place / similarity.FILE)
                control = seed in self.settings.seeds[: self.settings.control_seeds]
                if control and not (place / spread.FILE).exists():
                    spread.write_spread(export, samples, place / spread.FILE)


def right_answers(category: str, rng: np.random.Generator) -> list[str]:
    """Return right answers for supervised training."""
    members = sorted(lists.MEMBERS[category])
    drawn = [rng.choice(members, lists.COUNT, replace=False) for _ in range(SUPERVISED)]
    return [", ".join(answer).capitalize() for answer in drawn]
