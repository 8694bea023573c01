"""launch/paper.sh: its parts in order, restarts and signals."""

import os
import shlex
import signal

import pytest

PAPER = {"MODEL": "m", "REWARD": "r", "RUNS": "runs", "SEEDS": "0"}


def test_paper_dry_run(desk):
    """golden: the parts in order, each with its model and prompts."""
    status, lines, _ = desk.run("paper", "--dry-run", "--config.mesh.fsdp=8", DATA="d", **PAPER)
    parts = []
    for line in lines:
        words = dict(word.partition("=")[::2] for word in shlex.split(line))
        verb = "train" if "launch/local.sh" in words else line.split()[3]
        names = ("model.path", "data.path", "data.eval_path", "eval.name", "eval.base")
        config = words["--config"].removeprefix("configs/paper/") if "--config" in words else None
        parts.append((verb, config, *(words.get(f"--config.{name}") for name in names)))
    start, before = "runs/sft/export", "runs/sft/evaluations"
    files = {name: f"runs/data/{name}.jsonl" for name in ("sft", "rl", "test")}
    selected = {name: f"runs/data/{name}_selected.jsonl" for name in ("rl", "test")}
    scored = ("evaluate", "evaluation.py:pythia-2.8b")
    expected = [
        ("prepare", "data.py:pythia-2.8b", "m", None, None, None, None),
        ("train", "sft.py:pythia-2.8b", "m", files["sft"], None, None, None),
        (*scored, start, files["rl"], selected["rl"], "statistics", None),
        (*scored, start, files["rl"], selected["test"], "test", None),
    ]
    for method in ("rl", "grpo", "cfrl"):
        config, export = f"{method}.py:pythia-2.8b", f"runs/{method}-0/export"
        expected.append(("train", config, start, files["rl"], files["test"], None, None))
        for name, prompts, base in (("train", "rl", "statistics"), ("test", "test", "test")):
            arguments = (export, files["rl"], selected[prompts], name, f"{before}/{base}.jsonl")
            expected.append((*scored, *arguments))
    assert status == 0 and parts == [*expected, ("report", None, None, None, None, None, None)]
    statistics = f"--config.reward.normalisation={before}/statistics.rewards.json"
    assert sum(statistics in line and "--config.mesh.fsdp=8" in line for line in lines) == 10
    arguments = [word for word in lines[0].split() if "prepare." in word]
    published = "d/ultrafeedback_binarized"
    assert arguments == [
        f"--config.prepare.preferences={published}/train_prefs",
        f"--config.prepare.test={published}/test_prefs",
        "--config.prepare.supervised=d/alpaca_farm/sft",
    ]
    assert lines[-1].endswith("report runs/rl-0 runs/grpo-0 runs/cfrl-0 --out=runs/report")


def test_paper_of_another_model_and_in_miniature(desk):
    """golden: SFT on chosen responses in separate runs; tiny inputs replace the real ones."""
    settings = {**PAPER, "DATA": "d", "RUNS": "", "VARIANT": "llama-3.2-1b"}
    _, lines, _ = desk.run("paper", "--dry-run", **settings)
    assert not any("supervised" in line for line in lines)
    assert all("runs/paper-llama-3.2-1b/" in line for line in lines)
    assert sum("llama-3.2-1b " in line for line in lines) == len(lines) - 1
    small = desk.run("paper", "--dry-run", "--config.mesh.fsdp=8", MINIATURE="1")[1]
    assert sum("--config=configs/paper/miniature.py:" in line for line in small) == len(small) - 2
    assert small[0].endswith("-m ntkrl.configs.paper.made_up runs/miniature/inputs")
    assert "--config.model.path=runs/miniature/inputs/pythia" in small[1]


@pytest.fixture
def published(desk):
    """Directories of published data, and the script's settings."""
    for name in ("alpaca_farm", "ultrafeedback_binarized"):
        (desk.place / name).mkdir()
    runs = desk.place / "runs"
    return {**PAPER, "DATA": str(desk.place), "RUNS": str(runs), "NTKRL": desk.program}


def test_paper_goes_on_where_it_stopped(desk, published):
    """story: a part that fails ends the script; finished parts are not repeated."""
    runs = desk.place / "runs"
    done = [runs / "data" / "summary.json", runs / "sft" / "evaluations" / "statistics.json"]
    for path in done:
        path.parent.mkdir(parents=True)
        path.touch()
    # sft and its other evaluation, rl and its evaluations, then a mistake in grpo
    status, lines, error = desk.run("paper", STATUSES="0 0 0 0 0 2", **published)
    assert status == 2 and all(f"{path} exists" in error for path in done)
    verbs = ["train", "evaluate", "train", "evaluate", "evaluate", "train"]
    assert [line.split()[1] for line in lines] == verbs
    assert "grpo.py" in lines[-1]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_paper_passes_signals_on(desk, published, sent):
    """story: terminated, it ends the running part and starts no other."""
    (desk.place / "runs" / "data").mkdir(parents=True)
    (desk.place / "runs" / "data" / "summary.json").touch()
    process = desk.start("paper", **{**published, "STATUSES": "stays"})
    os.killpg(process.pid, sent)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and "started" not in rest and "told to end" in rest
