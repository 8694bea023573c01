"""Runs from Python: the README, the command line's bits, stops, interrupts, evaluations."""

import json
import re
import signal
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import ntkrl
from ntkrl.main import main
from tests.api.conftest import ROWS, SMALL

ROOT = Path(__file__).resolve().parents[2]


def score(completions, answer, **kwargs):
    """The reward of the loop in the README."""
    return [
        float(text == right) - 0.1 * len(text)
        for text, right in zip(completions, answer, strict=True)
    ]


SOURCE = """def score(completions, answer, **kwargs):
    return [float(text == right) - 0.1 * len(text) for text, right in zip(completions, answer)]
"""


def block(file, call):
    """The Python block of a README that has a call."""
    text = (ROOT / file).read_text(encoding="utf-8")
    (found,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if call in b]
    return found


def executed(text, base):
    """The names that a block binds, on a tiny model with small settings."""
    text = text.replace('"DIR"', repr(str(base))).replace("steps=200", "steps=3, config=SMALL")
    names = {"SMALL": {**SMALL}}
    exec(compile(text, "README", "exec"), names)
    return names


def train(base, run_dir, **more):
    """The run of the loop in the README."""
    settings = {"method": "cfrl", "steps": 3, "run_dir": run_dir, "config": SMALL, **more}
    return ntkrl.train(base, ROWS, score, **settings)


def lines(run):
    """The metrics of a run's file."""
    text = (Path(run) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def assert_same_runs(one, other):
    """The same metrics and exported weights, bit for bit."""
    assert lines(one) == lines(other)
    first, second = (load_file(Path(run) / "export" / "model.safetensors") for run in (one, other))
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


@pytest.fixture(scope="module")
def first(base):
    """A finished run."""
    return train(base, "runs/base")


def test_the_example_of_the_front_page(base):
    """story: the first example of the README, at most 15 lines, from an empty directory."""
    text = block("README.md", "ntkrl.train(")
    assert len([line for line in text.splitlines() if line.strip()]) <= 15
    names = executed(text, base)
    answers = names["score"](completions=["4 ", "5"], answer=["4", "4"], prompts=[])
    assert answers == [1.0, 0.0]
    run = names["run"]
    assert not run.stopped and run.metrics["step"] == [0, 1, 2, 3]
    assert (run.directory / "report" / "index.html").is_file()


def test_a_run(first):
    """story: metrics, model, ledger and export of a finished run; three readable lines each."""
    assert first.metrics["step"] == [0, 1, 2, 3] and not first.stopped
    assert np.isnan(first.metrics["reward"][0]) and np.isfinite(first.metrics["reward"][1:]).all()
    assert first.metrics["stage"] == [None, "classifier", "all", "all"]
    kernel = ntkrl.ntk.kernel(
        first.policy, first.params, ntkrl.ntk.last_positions(jax.numpy.array([[3, 4]]))
    )
    for value in (first, first.policy, kernel, first.ledger(2)):
        assert len(repr(value).splitlines()) == 3 and max(map(len, repr(value).splitlines())) < 200
    assert "finished after step 3" in repr(first) and "eval/reward" in repr(first)
    ledger = first.ledger(2)
    assert ledger.influence.shape == (len(ledger.actual["log_prob"]), 8)
    made = first.explain(2, "log_prob", completion=0)
    assert sum(part.change for part in made.parts) == pytest.approx(made.change, abs=1e-5)
    assert len(made.samples) == 5 and str(made) in str(first.explain(2, "log_prob", completion=0))
    for call in (first.ledger, first.explain):
        with pytest.raises(ValueError, match="no ledger of step 1; ledgers are of steps 2. probe."):
            call(1)
    again = ntkrl.open_run("runs/base")
    assert repr(again) == repr(first)
    assert (first.export("out") / "model.safetensors").is_file()


def test_the_same_bits_as_the_command_line(base, first):
    """story: the command line with the same settings writes the same metrics and weights."""
    Path("mine.py").write_text(SOURCE)
    (rows,) = Path("runs/base/data").iterdir()
    words = [f"--config.{name}={value}" for name, value in SMALL.items()]
    words += [f"--config.model.path={base}", f"--config.data.path={rows}", "--steps=3"]
    words += ["--config.reward.function=mine.py:score", "--run_dir=runs/line"]
    assert main(["train", "--config=cfrl", *words]) == 0
    assert_same_runs("runs/base", "runs/line")


def test_the_loop_of_the_readme(base, first):
    """law: the documented loop takes the steps of `ntkrl.train`, bit for bit."""
    text = block("ntkrl/api/README.md", "ntkrl.Steps(")
    assert len(text.splitlines()) <= 60
    names = executed(text, base)
    written = lines("runs/base")
    assert [line.pop("step") for line in written] == [0, 1, 2, 3]
    assert json.loads(json.dumps(names["lines"])) == written
    jax.tree.map(np.testing.assert_array_equal, names["params"], first.params)
    assert len(names["ledger"]) > 4 and ntkrl.open_run("runs/steps").ledger(2).step == 2
    assert len(repr(names["steps"]).splitlines()) == len(repr(names["at"]).splitlines()) == 3
    settings = {"method": "cfrl", "steps": 3, "config": SMALL}
    with pytest.raises(ValueError, match="runs/base is the run of a training command, whose"):
        ntkrl.Steps(base, ROWS, score, run_dir="runs/base", **settings)  # was accepted


def test_a_stopped_run_goes_on(base, first, capsys):
    """story: stopped by on_step in another thread; resumed by the command line, with a file."""
    steps, runs = [], []

    def on_step(step, metrics):
        steps.append((step, metrics["reward"]))
        return "stop"

    def work():
        runs.append(train(base, "runs/stopped", on_step=on_step))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    (run,) = runs
    # told of step 1 while step 2 was computed, so that it ends after that
    assert run.stopped and steps[0] == (1, lines("runs/base")[1]["reward"]) and len(steps) == 2
    assert "stopped after step 2" in repr(run) and run.params.keys() == first.params.keys()
    Path("mine.py").write_text(SOURCE)
    words = [f"--config.{name}={value}" for name, value in SMALL.items()]
    words += [f"--config.model.path={base}", f"--config.data.path={run.config.data.path}"]
    words += ["--steps=3", "--run_dir=runs/stopped", "--config=cfrl"]
    capsys.readouterr()
    assert main(["train", *words, "--config.reward.function=python:score"]) == 2
    assert "--config.reward.function=FILE.py:score" in capsys.readouterr().err
    assert main(["train", *words, "--config.reward.function=mine.py:score"]) == 0
    assert_same_runs("runs/base", "runs/stopped")
    assert not train(base, "runs/stopped").stopped  # finished, under either name


def test_an_interrupt_saves(base, first):
    """story: an interrupt saves and raises; handlers are Python's again; the call resumes."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def on_step(step, metrics):
        if step == 1:  # a second interrupt stops without saving
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="saved step 2"):
        train(base, "runs/interrupted", on_step=on_step)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not train(base, "runs/interrupted").stopped
    assert_same_runs("runs/base", "runs/interrupted")


def test_evaluations(base, first, capsys):
    """story: a run's checkpoint on other prompts; a model in memory; the progress rewards get."""
    states = []

    def seen(completions, trainer_state, **kwargs):
        states.append(trainer_state)
        return [len(text) for text in completions]

    few = {"eval.samples_per_prompt": 2, "eval.repeats": 1}
    metrics = first.evaluate(ROWS[:3], [seen], config=few)
    assert metrics["eval/reward"] > 0 and (states[0].global_step, states[0].max_steps) == (3, 3)
    small = {**SMALL, **few}
    loaded = ntkrl.evaluate(ntkrl.load(base), ROWS[:3], seen, config=small)
    assert loaded == ntkrl.evaluate(base, ROWS[:3], seen, config=small, run_dir="runs/other")
    assert Path("runs/evaluate/evaluations").is_dir() and states[-1].global_step == 0
    assert "trained on" not in capsys.readouterr().out  # was said of every evaluation
    ntkrl.Steps(base, ROWS, seen, eval_prompts=ROWS[:3], run_dir="runs/warned", config=small)
    assert "3 of 3 held-out prompts are trained on too" in capsys.readouterr().out


def test_kernels(base):
    """law: the arrays are those of the command, for a directory and for a model in memory."""
    texts = ["1+1=", "12"]
    Path("texts.txt").write_text("\n".join(texts))
    assert main(["kernel", str(base), "--prompts=texts.txt", "--out=kernel"]) == 0
    with np.load("kernel/kernel.npz") as file:
        written = {name: file[name] for name in file.files}
    for arrays in (ntkrl.kernels(base, texts), ntkrl.kernels(ntkrl.load(base), texts)):
        assert arrays.keys() == written.keys()
        for name in written:
            np.testing.assert_array_equal(arrays[name], written[name])


def test_changed_params_start_a_run(base):
    """story: params that differ from their files are written to the run; others are refused."""
    policy, params = ntkrl.load(base)
    changed = {**params, "head": {"weight": params["head"]["weight"] * 0.5}}
    settings = {"config": {**SMALL, "probe.every_steps": None}, "steps": 1}
    run = ntkrl.train((policy, changed), ROWS, score, run_dir="runs/changed", **settings)
    (start,) = Path("runs/changed").glob("start-*")
    assert run.config.model.path == str(start)
    np.testing.assert_array_equal(ntkrl.load(start)[1]["head"]["weight"], changed["head"]["weight"])
    with pytest.raises(ValueError, match="model.path: "):
        ntkrl.train((policy, params), ROWS, score, run_dir="runs/changed", **settings)
    with pytest.raises(ValueError, match="data.path: "):
        ntkrl.train((policy, changed), ROWS[:40], score, run_dir="runs/changed", **settings)
