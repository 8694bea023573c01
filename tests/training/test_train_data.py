"""Runs on several prompt files, and on packed rows."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from ntkrl.main import main
from tests.training.test_train import base, lines, one_device, words  # noqa: F401


def write(path, rows):
    """A JSON Lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path):
    """Write two files, each with a column that the other lacks."""
    short = [{"prompt": f"{n}=", "answer": n} for n in range(10, 22)]
    long = [{"prompt": f"{n}+{n}=", "hard": True} for n in range(10, 16)]
    return [write(tmp_path / "a.jsonl", short), write(tmp_path / "b.jsonl", long)]


def test_two_files_by_weight(base, files, tmp_path, capsys):  # noqa: F811
    """story: three rows of four come from the second file; each file's columns are None elsewhere.

    Held-out prompts are of both files although the first alone could fill the evaluation.
    """
    rewards = tmp_path / "my_rewards.py"
    rewards.write_text(
        "def mixed(prompts, answer, hard, log_metric, **kwargs):\n"
        "    assert [a is None for a in answer] == ['+' in p for p in prompts]\n"
        "    log_metric('hard', sum(h is True for h in hard) / len(hard))\n"
        "    return [0.0 if h is None else 1.0 for h in hard]\n"
    )
    run = tmp_path / "run"
    arguments = words(
        base,
        run,
        f"--config.data.path={files[0]}, {files[1]}",
        "--config.data.weights=(1,3)",
        "--config.data.held_out=0.35",
        f"--config.reward.function={rewards}:mixed",
        "--config.stages[0].steps=3",
    )
    assert main(arguments) == 0, capsys.readouterr().err
    result = lines(run)
    assert [line["logged/hard"] for line in result[1:]] == [0.75] * 3
    # of 4 and 2 held-out rows 4 are read: a, b, a, a; in file order all would be of a
    assert result[0]["eval/reward"] == 0.25


def test_packed_runs_learn_alike(tmp_path, capsys):
    """law: packed or not, a run has the same losses, tokens and weights, in small batches too."""
    rng = np.random.default_rng(0)
    sums = [
        {"prompt": f"{n}=", "completion": "+".join("1" * rng.integers(1, 5))} for n in range(10, 30)
    ]
    paths = [write(tmp_path / f"{i}.jsonl", sums[i::2]) for i in range(2)]

    def trained(packing):
        run = tmp_path / f"packed {packing}"
        arguments = [
            "train",
            "--config=configs/sft.py",
            f"--config.run_dir={run}",
            f"--config.data.path={paths[0]},{paths[1]}",
            "--config.data.weights=(0.2,0.6)",
            f"--config.data.packing={packing}",
            "--config.model.new.hidden_size=32",
            "--config.model.new.intermediate_size=32",
            "--config.model.new.num_hidden_layers=1",
            "--config.data.prompts_per_step=8",
            "--config.data.max_prompt_tokens=8",
            "--config.rollout.max_completion_tokens=12",
            "--config.schedule.minibatches=2",
            "--config.schedule.microbatches=2",
            "--config.stages[0].steps=4",
            "--config.stages[0].optimizer=sgd",
            "--config.stages[0].parameters=(('.*', 1e-1),)",
        ]
        assert main(arguments) == 0, capsys.readouterr().err
        return lines(run)[1:], load_file(run / "export" / "model.safetensors")

    (packed, moved), (apart, expected) = trained(True), trained(False)
    for line, other in zip(packed, apart, strict=True):
        assert 0.3 < line.pop("packing/fill") <= 1
        assert line.keys() == other.keys()
        for name in set(line) - {"stage"}:
            assert line[name] == pytest.approx(other[name], rel=1e-5), name
    assert packed[-1]["loss"] < packed[0]["loss"] and packed[-1]["step"] == 8
    for name in expected:
        np.testing.assert_allclose(moved[name], expected[name], atol=1e-6)


@pytest.mark.parametrize(
    ("more", "messages"),
    [
        (["path=no.jsonl,a.txt", "eval_path=gone"], ["no.jsonl: no", "a.txt: no", "gone: no"]),
        (["weights=(1,)", "path=x,y"], ["for each of the 2 files of data.path, not (1,); None"]),
        (["weights=(0,)"], ["data.weights must be a positive number for each of the 1 files"]),
        (["packing=True"], ["data.packing is for given completions (method sft); set it to False"]),
    ],
)
def test_mistakes(base, tmp_path, capsys, more, messages):  # noqa: F811
    """law: every file and every weight at fault is in one message."""
    arguments = [f"--config.data.{word}" for word in ["path=x.jsonl", *more]]
    assert main(words(base, tmp_path / "run", *arguments)) == 2
    output = capsys.readouterr().err
    assert all(message in output for message in messages) and "Traceback" not in output


def test_a_column_no_file_has(base, files, tmp_path, capsys):  # noqa: F811
    """law: a reward's column may be in one of the files, not in none."""
    rewards = tmp_path / "my_rewards.py"
    rewards.write_text("def score(answer, solution, **kwargs):\n    return [0.0 for _ in answer]\n")
    path = f"--config.data.path={files[0]},{files[1]}"
    arguments = words(base, tmp_path / "run", path, f"--config.reward.function={rewards}:score")
    assert main(arguments) == 2
    output = capsys.readouterr().err
    assert "score requires 'solution', which is not a column" in output
    assert "Columns are: answer, hard" in output and "requires 'answer'" not in output
