"""Synthetic run directories: two methods, two seeds each, with probes and ledgers."""

import json
from pathlib import Path

import numpy as np
import pytest

from ntkrl.report import MetricsWriter, mark_finished

STEPS = 20
STAGE_END = 8
FAMILIES = ("own", "own", "other", "own", "shuffled")
LENGTH = 10
SIZE = LENGTH * len(FAMILIES)
SAMPLES = 4


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
            line |= {"probe/own/log_prob": -1.0, "probe/shuffled/log_prob": -5 - 0.1 * step}
            for k in (1, 2, 4):
                line[f"diversity/pass@{k}"] = 1 - (0.9 - 0.02 * step) ** k
                line[f"diversity/best_of_{k}"] = 0.1 * k + 0.01 * step + offset
        if step > 0 and step % 5 == 0:
            head = 1.0 if line["stage"] == "classifier" else 0.25 + 0.01 * step
            line |= {"predict/head_share": head, "predict/body_share": 1.0 - head}
            line |= {"predict/correlation": 0.9, "predict/relative_error": 0.2}
            line |= {"ledger/head_share": 0.5, "ledger/body_share": 0.2}
            line |= {"ledger/momentum_share": 0.2, "ledger/decay_share": 0.01}
            line |= {"ledger/kl_share": 0.1, "ledger/curvature_share": 0.09}
            line |= {"probe/ches_normalised": -0.1, "probe/head_sum_negative": -0.2}
            line |= {"probe/linearity": 0.5, "weights/direction_cosine": 0.9}
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
        arrays["cosines"] = np.full((5, 5), 0.05 * step) + np.eye(5) * 0.5
        np.savez(path / "probes" / f"step_{step:06d}.npz", **arrays)
        write_ledger(path, step, seed)
    write_probe_set(path)
    (path / "evaluations").mkdir()
    (path / "evaluations" / "best.json").write_text('{"eval/reward": 0.5, "diversity/pass@2": 1}')
    mark(path)
    return path


def mark(path: Path) -> None:
    """Mark a run directory as finished."""
    with MetricsWriter(path) as writer:
        record = writer.sync(print)
    mark_finished(path, STEPS, record, [])


def write_probe_set(path: Path, digest: str = "d1ge57") -> None:
    """Write the probe set of two prompts; the tokens of a completion are numbered."""
    completions = [
        {
            "prompt": number // 3,
            "family": family,
            "text": f"text {number} </script><b>",
            "tokens": [f" {number}.{token}" for token in range(LENGTH)],
        }
        for number, family in enumerate(FAMILIES)
    ]
    fields = {"format": 1, "digest": digest, "prompts": ["2+2=", "say <hi>"]}
    (path / "probes" / "set.json").write_text(json.dumps(fields | {"completions": completions}))


def ledger_arrays(seed: int, by: str = "sample") -> dict[str, np.ndarray]:
    """Columns of small numbers that add up to `actual`."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for measure in ("log_prob", "entropy"):
        columns = {}
        for term, size in (("policy", 0.02), ("kl", 0.002)):
            for group in ("head", "body"):
                columns[f"{term}/{group}"] = size * rng.normal(size=(SIZE, SAMPLES))
        for column in ("momentum", "decay", "optimizer"):
            for group in ("head", "body"):
                columns[f"{column}/{group}"] = 0.005 * rng.normal(size=SIZE)
        if by == "group":
            columns = {k: v.sum(axis=1) if v.ndim == 2 else v for k, v in columns.items()}
        arrays |= {f"{measure}/{name}": values for name, values in columns.items()}
        curvature = arrays[f"{measure}/curvature"] = 0.003 * rng.normal(size=SIZE)
        flat = [values.sum(axis=1) if values.ndim == 2 else values for values in columns.values()]
        arrays[f"{measure}/actual"] = np.sum(flat, axis=0) + curvature
    return {name: values.astype(np.float32) for name, values in arrays.items()}


def write_ledger(path: Path, step: int, seed: int, by: str = "sample", **changes: object) -> Path:
    """Write the two files of a ledger; `changes` replace fields of its JSON."""
    (path / "ledger").mkdir(exist_ok=True)
    samples = [
        {"prompt": "2+2=", "completion": f"sample {b} </script>", "advantage": b - 1.5, "row": b}
        for b in range(SAMPLES)
    ]
    fields = {"format": 1, "by": by, "digest": "d1ge57", "stage": "all", "samples": samples}
    file = path / "ledger" / f"step_{step:06d}.npz"
    file.with_suffix(".json").write_text(json.dumps(fields | changes))
    np.savez(file, **ledger_arrays(seed + step, by))
    return file


@pytest.fixture
def run_paths(tmp_path):
    """Four run directories; offsets of the seeds are 0 and 0.1."""
    return [
        write_run(tmp_path / f"{name}-{seed}", name, seed, name == "cfrl", 0.1 * seed)
        for name in ("rl", "cfrl")
        for seed in (0, 1)
    ]
