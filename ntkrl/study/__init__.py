"""A study: many runs from one plan, and what they say about the claims they were made for.

Promise: one command goes on where it stopped, every run is a command that is kept, and the page
is made from run directories alone.
"""

from __future__ import annotations

import json
from pathlib import Path

from tqdm import tqdm

from ntkrl import runtime
from ntkrl.study.claims import verdicts
from ntkrl.study.page import write_page
from ntkrl.study.plan import Commands, StudySettings
from ntkrl.study.results import Results
from ntkrl.study.running import run_jobs
from ntkrl.study.similarity import write_similarities
from ntkrl.study.summary import write_summaries
from ntkrl.study.tasks import write_preferences, write_prompts

__all__ = ["StudySettings", "run_study"]


def run_study(study: StudySettings, file: str, page_only: bool = False) -> Path:
    """Run what has not run yet, and write the page.

    Args:
      study: the plan.
      file: of its config.
      page_only: run nothing; the page says what is missing.

    Returns:
      The page. Beside it lie the verdicts (`verdicts.md`, `verdicts.json`) and `runs.jsonl`.

    Raises:
      ValueError: a run failed.
    """
    if not page_only:
        write_prompts(study.root)
        for title, jobs in Commands(study, file).phases():
            if title == "reward models":
                _write_preferences(study)
            run_jobs(title, jobs, study.jobs, study.root)
        _write_similarities(study)
    results = Results(study)
    listed = verdicts(results)
    told = [verdict._asdict() for verdict in listed]
    runtime.save_text(study.root / "verdicts.json", json.dumps(told, indent=2) + "\n")
    write_summaries(results)
    return write_page(results, listed, f"ntkrl study --config={file}")


def _write_preferences(study: StudySettings) -> None:
    """Pair the base models' samples, for each reward model there will be."""
    for size in study.learned:
        for seed in study.seeds:
            place = study.place(size, "base", seed)
            samples = place / "train" / "evaluations" / f"{place.name}.jsonl"
            out = study.place(size, "data", seed) / "preferences.jsonl"
            write_preferences(samples, out, seed)


def _write_similarities(study: StudySettings) -> None:
    places = [
        (study.place(size, "base", seed), study.place(size, arm, seed))
        for size, arms in study.arms.items()
        for arm in ("base", *(arm for arm in arms if arm in ("rl", "cfrl")))
        for seed in study.seeds
    ]
    for base, place in tqdm(places, desc="similarity by layer"):
        samples = base / "test" / "evaluations" / f"{base.name}.jsonl"
        write_similarities(place / "export", samples, place / "similarity.json")
