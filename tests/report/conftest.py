"""Synthetic run directories: two methods, two seeds each, with probes."""

import json
from pathlib import Path

import numpy as np
import pytest

STEPS = 20
STAGE_END = 8


def metrics_lines(staged: bool, offset: float) -> list[dict]:
    """Lines in which every value is a plain formula of the step."""
    lines = []
    for step in range(STEPS + 1):
        line = {"step": step}
        if step > 0:
            line |= {"reward": 0.1 + 0.02 * step + offset, "entropy": 2.0 - 0.05 * step}
            line |= {"confidence": 0.4 + 0.01 * step}
            line["stage"] = "classifier" if staged and step <= STAGE_END else "all"
        if step % 5 == 0:
            line |= {"eval/reward": 0.1 + 0.02 * step + offset, "eval/reward_sd": 0.02}
            line |= {"eval/pass@1": 0.1, "eval/pass@k": 0.5, "eval/distinct_solutions": 3.0}
            line |= {"eval/distinct_completions": 0.9, "probe/entropy": 2.0 - 0.04 * step}
            line |= {"probe/confidence": 0.4 + 0.01 * step, "probe/head_norm": 10.0 + step}
            line |= {"probe/cosine_within_response": 0.8, "probe/cosine_across_responses": 0.7}
            line |= {"probe/cosine_across_prompts": 0.6, "probe/feature_distortion": 0.1 * step}
        if step > 0 and step % 5 == 0:
            head = 1.0 if line["stage"] == "classifier" else 0.25 + 0.01 * step
            line |= {"predict/head_share": head, "predict/body_share": 1.0 - head}
            line |= {"predict/correlation": 0.9, "predict/relative_error": 0.2}
        lines.append(line)
    return lines


def write_run(path: Path, name: str, seed: int, staged: bool = False, offset: float = 0.0) -> Path:
    """Write one complete run directory."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"name": name, "seed": seed}))
    lines = metrics_lines(staged, offset)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    timing = {"sample_seconds": 1.0, "reward_seconds": 0.25, "update_seconds": 0.5}
    timing |= {"probe_seconds": 7.0, "eval_seconds": 9.0}
    timings = [{"step": step} | timing for step in range(1, STEPS + 1)]
    (path / "timings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timings))
    (path / "probes").mkdir()
    wave = np.sin(np.arange(50.0) + seed)
    for step in (5, 10):
        arrays = {"predicted_head": 0.3 * wave, "predicted_body": 0.7 * wave}
        arrays |= {"actual": 1.25 * wave, "log_probs": -(wave**2)}
        np.savez(path / "probes" / f"step_{step:06d}.npz", **arrays)
    (path / "finished").touch()
    return path


@pytest.fixture
def run_paths(tmp_path):
    """Four run directories; offsets of the seeds are 0 and 0.1."""
    return [
        write_run(tmp_path / f"{name}-{seed}", name, seed, name == "cfrl", 0.1 * seed)
        for name in ("rl", "cfrl")
        for seed in (0, 1)
    ]
