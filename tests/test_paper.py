"""The paper's pipeline in miniature: the commands of launch/paper.sh on synthetic data."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ntkrl import runtime
from ntkrl.configs.paper import made_up
from ntkrl.settings import read_settings
from tests.children import Children

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ["data", "sft", "reward", "rl", "grpo", "cfrl", "evaluation"]
VARIANTS = ["pythia-2.8b", "pythia-1b", "llama-3.2-1b"]


def script(runs, *words, **settings):
    """Run launch/paper.sh with a program that prints its words; return its lines."""
    environment = {"MINIATURE": "1", "RUNS": str(runs), "NTKRL": "echo ntkrl", **settings}
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "paper.sh"), *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.splitlines()


def commands(runs, **settings):
    """Return the words of every command of the chain."""
    result = []
    for line in script(runs, "--dry-run", **settings):
        words = shlex.split(line)
        if "ntkrl.configs.paper.made_up" in words:
            continue
        script_words = words[: words.index("launch/local.sh") + 1] if words[0] == "env" else []
        result.append(["train", *words[len(script_words) :]] if script_words else words[2:])
    return result


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps(run):
    """The rollout steps that were logged, the start not counted."""
    return [line["rollout_step"] for line in lines(run)[1:]]


def finished(children, several):
    """Run commands in one process to their end."""
    status, output = children.run(several)
    assert status == 0, output


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """Child processes that share compiled programs."""
    result = Children(tmp_path_factory.mktemp("children"))
    yield result
    result.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, children):
    """Return the directories of the complete chain; CF-RL was killed in its third checkpoint."""
    place = tmp_path_factory.mktemp("chain") / "runs"
    made_up.write(place / "inputs")
    result = commands(place)
    cfrl = next(n for n, words in enumerate(result) if words[0] == "train" and "cfrl" in words[1])
    finished(children, result[:cfrl])
    assert children.run(result[cfrl], dies_in_save=3)[0] == -9
    finished(children, result[cfrl:])
    return place


def test_the_chain(runs):
    """story: every part wrote the next one's inputs, and the report compares them."""
    written = json.loads((runs / "data" / "summary.json").read_text())["written"]
    assert written["rl.jsonl"] == 8 and written["sft.jsonl"] == 25
    statistics = json.loads((runs / "sft/evaluations/statistics.rewards.json").read_text())[
        "rewards"
    ]
    assert [len(values) for values in statistics.values()] == [4 * 2]
    # an epoch of 8 prompts: two steps of four; GRPO's has groups of eight, on two prompts a step
    for method, count in (("rl", 12), ("grpo", 6), ("cfrl", 2 + 12)):
        assert steps(runs / f"{method}-0") == list(range(1, count + 1))
    result = lines(runs / "cfrl-0")
    assert [line["stage"] for line in result[1:]] == ["classifier"] * 2 + ["all"] * 12
    # ArmoRM's shape: every attribute is logged
    assert "logged/helpsteer-verbosity" in result[1]
    scores = json.loads((runs / "cfrl-0/evaluations/test.json").read_text())
    assert {"eval/win_rate", "diversity/gap_best_of_2", "diversity/best_of_2"} <= set(scores)
    page = (runs / "report" / "index.html").read_text()
    assert "Cosines of features" in page and "Best of N" in page
    assert "paper-cfrl, seed 0: test, gap" in page


def test_configs_say_what_was_run(runs):
    """law: the miniature's values are in a run's config, and those of the command line above."""
    config = json.loads((runs / "rl-0" / "config.json").read_text())
    assert config["data"]["prompts_per_step"] == 4
    assert config["model"]["path"] == str(runs / "sft" / "export")
    assert config["stages"][0]["epochs"] == 6.0


def test_a_second_run_repeats_nothing(runs, children):
    """law: existing evaluations and data are not recomputed; trained runs report as finished."""
    left = [shlex.split(line)[1] for line in script(runs)]
    assert left == ["train"] * 4 + ["report"]
    before = {path: path.stat().st_mtime_ns for path in (runs / "cfrl-0").rglob("*")}
    status, output = children.run(commands(runs)[-4])
    assert status == 0 and "is finished; give it more steps" in output
    assert {path: path.stat().st_mtime_ns for path in (runs / "cfrl-0").rglob("*")} == before


def test_a_reward_model(runs, children, tmp_path):
    """story: trained on the pairs that are not RL's, from the SFT model."""
    words = [
        "train",
        "--config=configs/paper/miniature.py:reward",
        f"--config.run_dir={tmp_path}",
        f"--config.model.path={runs / 'sft' / 'export'}",
        f"--config.data.path={runs / 'data' / 'reward.jsonl'}",
        f"--config.data.eval_path={runs / 'data' / 'test.jsonl'}",
    ]
    status, output = children.run(words)
    assert status == 0, output
    result = lines(tmp_path)
    assert len(result) == 1 + 4 and "eval/accuracy" in result[-1]
    assert (tmp_path / "export" / "model.safetensors").exists()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_read(name, variant):
    """law: of every model, in full size and in miniature."""
    arguments = [f"--config=configs/paper/{name}.py:{variant}"]
    full = read_settings(runtime.read_config(arguments))
    miniature = [f"--config=configs/paper/miniature.py:{name}:{variant}"]
    small = read_settings(runtime.read_config(miniature))
    assert full.model.path.lower().endswith(variant)
    assert small.model.path.startswith("runs/miniature/")
    assert small.rollout.max_completion_tokens < full.rollout.max_completion_tokens
    assert full.stages[-1].epochs == small.stages[-1].epochs


def test_the_papers_numbers():
    """golden: values of the paper and of its code, except for the unit of epochs."""
    result = {
        name: read_settings(runtime.read_config([f"--config=configs/paper/{name}.py"]))
        for name in CONFIGS
    }
    cfrl, rl, grpo = result["cfrl"], result["rl"], result["grpo"]
    assert [stage.epochs for stage in cfrl.stages] == [1.0, 6.0]
    assert cfrl.stages[0].parameters == (("head/.*", 1e-6), (".*", None))
    assert rl.stages == cfrl.stages[1:]
    counts = [config.stages[-1].epochs / config.data.prompts_per_step for config in (rl, grpo)]
    assert counts[0] == counts[1]  # as many steps, of as many completions
    assert rl.minibatch_rows == grpo.minibatch_rows == 16
    assert (rl.objective.kl_coefficient, rl.objective.kl_place) == (0.05, "reward")
    assert result["reward"].stages[0].parameters == ((".*", 5e-7),)
    assert result["reward"].preference.centering_coefficient == 0.01
    assert result["evaluation"].evaluation.prompts == 500
    assert result["evaluation"].evaluation.samples_per_prompt == 10
    words = ["--config=configs/paper/rl.py:pythia-2.8b-bfloat16"]
    fast = read_settings(runtime.read_config(words))
    assert fast.model == dataclasses.replace(rl.model, compute_dtype="bfloat16")
    assert fast.reward == dataclasses.replace(
        rl.reward,
        dtype="bfloat16",
        normalisation="runs/paper-pythia-2.8b-bfloat16/sft/evaluations/statistics.rewards.json",
    )
    assert (fast.stages, fast.schedule) == (rl.stages, rl.schedule)
    small = read_settings(runtime.read_config(["--config=configs/paper/rl.py:pythia-1b"]))
    assert small.minibatch_rows == 32 and small.stages[0].epochs == 2.0


@pytest.mark.slow
def test_the_llama_chain(tmp_path, children):
    """story: a tied head that is untied, tokens that are added, SFT on chosen responses."""
    place = tmp_path / "runs"
    made_up.write(place / "inputs")
    finished(children, commands(place, VARIANT="llama-3.2-1b"))
    chosen = (place / "data" / "sft.jsonl").read_text().splitlines()
    assert len(chosen) == 32
    config = json.loads((place / "cfrl-0" / "export" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and config["vocab_size"] == 264


def groups(place):
    """Return the groups of the processes whose arguments name a directory."""
    result = subprocess.check_output(["ps", "-ww", "-eo", "pgid,args"], text=True).splitlines()
    lines_of = [line.split(maxsplit=1) for line in result]
    return {int(group) for group, words in lines_of if str(place) in words} - {os.getpgid(0)}


@pytest.mark.slow
def test_the_script_goes_on_after_a_kill(tmp_path):
    """story: killed with everything it started, run again, it ends as if nothing had happened."""
    runs = tmp_path / "runs"
    program = f"{sys.executable} -m ntkrl"
    settings = {"MINIATURE": "1", "RUNS": str(runs), "NTKRL": program, "XLA_FLAGS": ""}
    settings["PYTHON"] = sys.executable
    command = ["bash", str(ROOT / "launch" / "paper.sh")]
    options = {"env": {**os.environ, **settings}, "start_new_session": True}
    process = subprocess.Popen(command, **options)
    until = time.monotonic() + 900
    while not list((runs / "rl-0" / "checkpoints").glob("[0-9]*")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.2)
    # local.sh puts the run in a group of its own: end that one too
    os.killpg(process.pid, signal.SIGKILL)
    for group in groups(runs):
        os.killpg(group, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL and len(steps(runs / "rl-0")) < 12
    assert subprocess.run(command, **options, check=False, timeout=1800).returncode == 0
    for method, count in (("rl", 12), ("grpo", 6), ("cfrl", 2 + 12)):
        assert steps(runs / f"{method}-0") == list(range(1, count + 1))
    assert (runs / "report" / "index.html").exists()
