"""Runs in several processes: one process's numbers, one writer, and an end in any case.

Limits and devices of the processes are in tests/hosts.py; a run of one process takes four of this
one's devices.
"""

import signal
import socket
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from ntkrl import data
from ntkrl.main import main
from tests.hosts import ends, start
from tests.models.test_scorers import torch_scorer
from tests.training.test_train import ROOT, UNWATCHED, base, lines, words  # noqa: F401
from tests.training.test_train_models import preferences

MESH = ["--config.mesh.data=2", "--config.mesh.fsdp=2"]
HOST = socket.gethostname()


@pytest.fixture
def four_devices(monkeypatch):
    """Let this process be the one of a run with four devices."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:4])


def alike(single, several, steps):
    """Compare the files of two runs: metrics to rounding, exported parameters to 1e-5."""
    assert len(lines(single)) == steps + 1
    for mine, theirs in zip(lines(single), lines(several), strict=True):
        assert mine.keys() == theirs.keys()
        for name in set(mine) - {"stage"}:
            # ratios and differences of rounding are not
            if not name.startswith(("predict/relative", "sampling/", "signal/noise_scale")):
                assert theirs[name] == pytest.approx(mine[name], rel=1e-5, abs=1e-6), name
        assert mine.get("stage") == theirs.get("stage")
    exported = [load_file(run / "export" / "model.safetensors") for run in (single, several)]
    assert exported[0].keys() == exported[1].keys()
    for name, array in exported[0].items():
        np.testing.assert_allclose(exported[1][name], array, atol=1e-5)


def train(arguments, count, devices, **settings):
    """Run a command in separate processes to success; return the first one's output."""
    result = ends(start(count, ["-m", "ntkrl", *arguments], devices, **settings), seconds=400)
    assert [status for status, _ in result] == [0] * count, result
    return result[0][1]


def rl(base, run, scorer):  # noqa: F811
    """A run of both stages with everything that happens in one, rewarded by code and a model."""
    rewards = ROOT / "tests" / "toy_rewards.py"
    return [
        *words(base, run, config="cfrl"),
        *MESH,
        f"--config.reward.function={rewards}:score,{rewards}:absent,{scorer}",
        "--config.reward.weights=(1.0,1.0,0.1)",
        "--config.rollout.mesh.tensor=2",
        "--config.stages[0].steps=2",
        "--config.stages[0].parameters=(('head/.*', 1e-1), ('.*', None))",
        "--config.stages[1].steps=2",
        "--config.stages[1].parameters=(('.*', 1e-1),)",
        # Adam would turn rounding of gradients that are zero into steps of a full rate
        "--config.stages[0].optimizer=sgd",
        "--config.stages[1].optimizer=sgd",
        "--config.logging.tensorboard=True",
        "--config.probe.ledger_every_steps=4",
    ]


@pytest.fixture(scope="session")
def scorer(tmp_path_factory):
    """A reward model with the built-in task's tokenizer."""
    place = tmp_path_factory.mktemp("scorer")
    torch_scorer("gpt-neox", place, vocab_size=20)
    data.save_tokenizer(place)
    return place


SPREAD = [(2, 2), pytest.param((4, 1), marks=pytest.mark.slow)]


@pytest.mark.parametrize("shape", SPREAD, ids=str)
def test_rl_in_several_processes(base, scorer, tmp_path, four_devices, shape):  # noqa: F811
    """law: four devices of one process, of two or of four sample and learn the same."""
    single, several = tmp_path / "one", tmp_path / "several"
    assert main(rl(base, single, scorer)) == 0
    output = train(rl(base, several, scorer), *shape)
    assert output.count("stage 'classifier' ends") == 1
    alike(single, several, 4)
    moved, initial = (load_file(r / "model.safetensors") for r in (single / "export", base))
    assert max(np.abs(moved[name] - initial[name]).max() for name in initial) > 1e-3
    for place in ("", "probes", "ledger", "tensorboard", "export", "checkpoints"):
        kinds = [sorted(entry.name for entry in (r / place).iterdir()) for r in (single, several)]
        if place == "tensorboard":  # files are called by their time
            kinds = [len(names) for names in kinds]
        assert kinds[0] == kinds[1]
    for path in sorted(single.glob("[pl]*/*.npz")):
        for name, array in np.load(path).items():
            theirs = np.load(several / path.relative_to(single))[name]
            if name.startswith("direction/"):  # of power iteration, which stops at √ε
                np.testing.assert_allclose(np.sum(theirs * array, axis=-1), 1, atol=1e-4)
                continue
            np.testing.assert_allclose(theirs, array, rtol=1e-4, atol=1e-5)


def sft(run, steps):
    """A new model, whose tokenizer the run itself writes, taught by examples."""
    return [
        "train",
        "--config=configs/sft.py",
        f"--config.run_dir={run}",
        "--config.model.new.hidden_size=32",
        "--config.model.new.intermediate_size=32",
        "--config.model.new.num_hidden_layers=1",
        "--config.data.examples=200",
        "--config.data.max_prompt_tokens=8",
        "--config.rollout.max_completion_tokens=12",
        f"--config.stages[0].steps={steps}",
        "--config.stages[0].parameters=(('.*', 1e-1),)",
        "--config.stages[0].optimizer=sgd",
        "--config.checkpoint.every_steps=2",
    ]


def test_supervised_in_four_processes(tmp_path, four_devices):
    """law: four processes of one device each match one process of four devices."""
    single, several = tmp_path / "one", tmp_path / "several"
    assert main([*sft(single, 5), *MESH]) == 0
    train([*sft(several, 5), *MESH], 4, 1)
    alike(single, several, 5)


def test_a_reward_model_in_two_processes(base, tmp_path, four_devices):  # noqa: F811
    """law: training on preferences is the same in two processes as in one."""
    pairs = tmp_path / "pairs.jsonl"
    preferences(pairs, 40)
    single, several = tmp_path / "one", tmp_path / "several"

    def arguments(run):
        return [
            "train",
            "--config=configs/reward.py",
            f"--config.model.path={base}",
            f"--config.run_dir={run}",
            f"--config.data.path={pairs}",
            "--config.data.prompts_per_step=8",
            "--config.stages[0].steps=3",
            "--config.stages[0].parameters=(('.*', 1e-2),)",
            "--config.stages[0].optimizer=sgd",
            *MESH,
        ]

    assert main(arguments(single)) == 0
    train(arguments(several), 2, 2)
    alike(single, several, 3)


def struck_after(processes, run, count, victim, blow=signal.SIGKILL):
    """Send one process a signal once the run has written so many lines."""
    path, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not (path.exists() and path.read_text().count("\n") >= count):
        assert time.monotonic() < deadline and processes[0].poll() is None
        time.sleep(0.01)
    processes[victim].send_signal(blow)
    return ends(processes, seconds=120)


def test_killed_and_resumed_in_two_processes(tmp_path):
    """story: a worker is killed, the other names it and the last checkpoint; resumed, same bits.

    The save of step 20 waits for that of step 10, so that one of them is there.
    """
    uninterrupted, broken = tmp_path / "whole", tmp_path / "broken"
    train([*sft(uninterrupted, 40), "--config.checkpoint.every_steps=10"], 2, 1)
    arguments = [*sft(broken, 40), "--config.checkpoint.every_steps=10"]
    processes = start(2, ["-m", "ntkrl", *arguments], SILENCE="3")
    (status, text), (killed, _) = struck_after(processes, broken, 24, victim=1)
    assert killed == -signal.SIGKILL and status == 70, text
    message = text[text.rindex("\nntkrl: ") :]
    assert f"process 1 ({HOST}) sent no heartbeat for 3 s" in message
    assert "Run the same command again: it resumes after rollout step " in message
    assert int(message.split("rollout step ")[-1].strip(" .\n")) in range(10, 40, 10)
    assert "resuming" in train(arguments, 2, 1)
    assert (uninterrupted / "metrics.jsonl").read_bytes() == (broken / "metrics.jsonl").read_bytes()
    exported = [run / "export" / "model.safetensors" for run in (uninterrupted, broken)]
    assert exported[0].read_bytes() == exported[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("blow", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_one_process_asked_to_leave(tmp_path, blow):
    """story: a signal to one is heard by both, which save the same step, name it, end with 75."""
    run = tmp_path / "run"
    processes = start(2, ["-m", "ntkrl", *sft(run, 400)])
    result = struck_after(processes, run, 10, victim=1, blow=blow)
    assert [status for status, _ in result] == [75, 75], result
    assert all(f"stopped by {blow.name}" in text for _, text in result)
    saved = {text.split("saved step ")[1].split(";")[0] for _, text in result}
    assert len(saved) == 1 and (run / "checkpoints" / saved.pop()).is_dir()


def test_a_reward_that_hangs_on_one_host(base, tmp_path):  # noqa: F811
    """story: the host whose reward hangs reports it and ends with 2, the other with 70 and why."""
    rewards = tmp_path / "mine.py"
    rewards.write_text(
        "import os, time\n"
        "def score(completions):\n"
        "    time.sleep(1000 if os.environ['JAX_PROCESS_ID'] == '1' else 0)\n"
        "    return [0.0 for _ in completions]\n"
    )
    more = [f"--config.reward.function={rewards}:score", "--config.reward.timeout=3"]
    more += [*UNWATCHED, "--config.mesh.data=2"]
    result = ends(start(2, ["-m", "ntkrl", *words(base, tmp_path / "run", *more)]))
    (first, other_output), (second, hung_output) = result
    assert (first, second) == (70, 2), result
    cause = f"reward function {rewards}:score did not answer within 3 s"
    assert f"process 1 ({HOST}) failed: {cause}" in other_output and cause in hung_output
    assert "it starts over, since there is no checkpoint yet" in other_output
    assert "Traceback" not in other_output + hung_output


def test_configs_that_differ(tmp_path):
    """story: different seeds are reported by both processes before anything is trained."""
    run = tmp_path / "run"
    code = "import os, sys; from ntkrl.main import main; own = os.environ['JAX_PROCESS_ID']; "
    code += "sys.exit(main([*sys.argv[1:], f'--config.seed={own}']))"
    for status, text in ends(start(2, ["-c", code, *sft(run, 5)])):
        assert status == 2 and f"process 1 ({HOST}): seed: 0 -> 1" in text, text
    assert not run.exists()


def test_evaluation_in_two_processes(base, tmp_path, four_devices):  # noqa: F811
    """law: the scores of one process, written once."""
    wrote = []
    for count in (1, 2):
        run = tmp_path / str(count)
        arguments = ["evaluate", *words(base, run)[1:], *MESH]
        if count == 1:
            assert main(arguments) == 0
        else:
            output = train(arguments, 2, 2)
            assert output.count("eval/pass@k") == 1
        wrote.append({p.name: p.read_text() for p in (run / "evaluations").iterdir()})
    assert len(wrote[0]) == 3 and wrote[0] == wrote[1]


def test_commands_of_one_process(capsys, monkeypatch):
    """law: kernel and export are refused in several processes."""
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    for command in ("kernel", "export"):
        assert main([command, "a", "b"]) == 2
        assert f"{command} works in one process" in capsys.readouterr().err
