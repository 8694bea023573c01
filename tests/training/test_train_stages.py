"""Runs in stages that end early, keep moments or move their reference; tied heads."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import ntkrl
from ntkrl import data, trees
from ntkrl.main import main
from ntkrl.models import ModelOptions
from ntkrl.training import RolloutSource
from tests.toys import torch_neox
from tests.training.test_train import UNWATCHED, base, lines, one_device, words  # noqa: F401


class KilledError(Exception):
    """The end of a run at a chosen rollout step."""


def killed_at(monkeypatch, step):
    """Let the next run die when it requests the batches of a rollout step, or of none."""
    original = RolloutSource.batches

    def batches(self, context):
        if context.rollout_step == step:
            raise KilledError
        return original(self, context)

    monkeypatch.setattr(RolloutSource, "batches", batches)


def test_a_stage_that_ends_early_resumes_alike(base, tmp_path, monkeypatch, capsys):  # noqa: F811
    """story: plateau, kept moments, schedule and moving reference, the same bits after a kill."""
    constant = tmp_path / "constant.py"
    constant.write_text(
        "def score(completions, **kwargs):\n"
        "    return [float(i % 2) for i, _ in enumerate(completions)]\n"
    )
    more = [
        *UNWATCHED,
        f"--config.reward.function={constant}:score",
        "--config.checkpoint.every_steps=1",
        "--config.schedule.minibatches=2",
        "--config.schedule.reference_sync_steps=3",
        "--config.objective.kl_estimator=k3",
        "--config.stages[0].steps=50",
        "--config.stages[0].plateau_window=2",  # the mean reward never moves: 4 steps
        "--config.stages[0].parameters=(('head/.*', 1e-2), ('.*', None))",
        "--config.stages[1].steps=3",
        "--config.stages[1].optimizer_state=keep",
        "--config.stages[1].schedule=linear",
        "--config.stages[1].parameters=(('head/.*', 1e-2), ('.*', 1e-3))",
    ]
    uninterrupted, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(words(base, uninterrupted, *more, config="cfrl")) == 0, capsys.readouterr().err
    output = capsys.readouterr()
    assert (
        "stage 'classifier' ends: mean reward of the last 2 steps is 0.5" in output.out + output.err
    )
    for step in (3, 5):  # inside the window, at the hand-over
        with monkeypatch.context() as patch, pytest.raises(KilledError):
            killed_at(patch, step)
            main(words(base, broken, *more, config="cfrl"))
    assert main(words(base, broken, *more, config="cfrl")) == 0
    assert (uninterrupted / "metrics.jsonl").read_bytes() == (broken / "metrics.jsonl").read_bytes()
    for name in ("export", "export_reference"):
        first, other = (run / name / "model.safetensors" for run in (uninterrupted, broken))
        assert first.read_bytes() == other.read_bytes()
    result = lines(uninterrupted)[1:]
    assert [line["stage"] for line in result] == ["classifier"] * 4 + ["all"] * 3
    rates = [line["learning_rate"] for line in result]
    # two optimizer steps each: of six, the second, fourth and last
    assert rates == pytest.approx([1e-2] * 4 + [1e-2 * left / 6 for left in (5, 3, 1)])
    # after steps 3 and 6 the reference has come along, so the next step is nearer to it
    spent = [line["kl"] for line in result]
    assert spent[0] < spent[1] < spent[2] > spent[3] < spent[4] < spent[5] > spent[6]
    start, end, reference = (
        load_file(place / "model.safetensors")
        for place in (base, uninterrupted / "export", uninterrupted / "export_reference")
    )
    head = "embed_out.weight"
    assert not np.array_equal(reference[head], start[head])
    assert not np.array_equal(reference[head], end[head])


def test_lengths_budgets_and_rounding(base, tmp_path, capsys):  # noqa: F811
    """story: a stage over its KL budget, one of half an epoch, a warning for bfloat16."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{n}="}) + "\n" for n in range(10, 34)))
    run = tmp_path / "run"
    more = [
        *UNWATCHED,
        f"--config.data.path={prompts}",
        "--config.data.held_out=0.0",
        "--config.model.dtype=bfloat16",
        "--config.schedule.log_ratio_tolerance=1e9",
        "--config.objective.kl_coefficient=0.0",  # a budget reads the reference all the same
        "--config.stages[0].steps=50",
        "--config.stages[0].kl_budget=1e-4",
        "--config.stages[0].parameters=(('head/.*', 1e-1), ('.*', None))",
        "--config.stages[1].steps=None",
        "--config.stages[1].epochs=0.5",  # of 24 prompts, 4 a step
        "--config.stages[1].parameters=(('.*', 1e-7),)",
    ]
    assert main(words(base, run, *more, config="cfrl")) == 0, capsys.readouterr().err
    written = "".join(capsys.readouterr())
    assert "exceeds its budget of 0.0001" in written
    assert "stage 'all' ends: its 3 steps are done" in written
    assert written.count("of the trained bfloat16 entries cannot move") == 1
    stages = [line["stage"] for line in lines(run)[1:]]
    budgeted = stages.count("classifier")
    assert stages[budgeted:] == ["all"] * 3 and 1 < budgeted < 50
    spent = [line["kl"] for line in lines(run)[1:]]
    assert max(spent[: budgeted - 1]) <= 1e-4 < spent[budgeted - 1]


@pytest.mark.parametrize("untie", [False, True])
def test_a_tied_head_by_choice(tmp_path, capsys, untie):
    """story: the shared matrix trains alone, or a copy of it does; the reference follows by α."""
    model, run = tmp_path / "model", tmp_path / "run"
    torch_neox(model, vocab_size=18, tie_word_embeddings=True)
    data.save_tokenizer(model)
    rows = "(('head/.*', 1e-2), ('.*', None))"
    arguments = words(
        model,
        run,
        *UNWATCHED,
        "--config.stages[0].steps=1",
        "--config.schedule.reference_sync_steps=1",
        "--config.schedule.reference_mixup_alpha=0.25",
    )
    assert main([*arguments, f"--config.stages[0].parameters={rows}"]) == 2
    output = capsys.readouterr().err
    assert "'embed/embedding'" in output and "--config.model.untie=true" in output
    if untie:
        arguments.append("--config.model.untie=true")
    else:
        rows = rows.replace("head/.*", "embed/embedding")
    assert main([*arguments, f"--config.stages[0].parameters={rows}"]) == 0, capsys.readouterr().err
    before = trees.named_leaves(ntkrl.load(model, options=ModelOptions(untie=untie))[1])
    policy, params = ntkrl.load(run / "export")
    assert policy.tied != untie
    after = trees.named_leaves(params)
    moved = [n for n in after if not np.array_equal(np.asarray(before[n]), np.asarray(after[n]))]
    assert moved == ["head/weight" if untie else "embed/embedding"]
    reference = trees.named_leaves(ntkrl.load(run / "export_reference")[1])[moved[0]]
    mixed = 0.25 * after[moved[0]] + 0.75 * before[moved[0]]
    np.testing.assert_allclose(reference, mixed, atol=1e-7)


MISTAKES = {
    "rules without a reward": (
        ["--config.method=sft", "--config.stages[1].plateau_window=3"],
        "plateau_window and kl_budget need a reward and a reference: method 'sft'",
    ),
    "keeping another optimizer's": (
        ["--config.stages[1].optimizer_state=keep", "--config.stages[0].optimizer=muon"],
        "its optimizer is 'adam', the other's 'muon'",
    ),
    "both rows": (
        ["--config.stages[0].momentum=0.5", "--config.stages[1].warmup_steps=-1"],
        "warmup_steps must be ≥ 0, not -1",
    ),
    "mixing": (
        ["--config.schedule.reference_mixup_alpha=0.0"],
        "schedule.reference_mixup_alpha must be in (0, 1], not 0.0",
    ),
    "syncing": (
        ["--config.schedule.reference_sync_steps=0"],
        "schedule.reference_sync_steps must be ≥ 1 or None",
    ),
    "warm-up": (["--config.stages[1].warmup_steps=999"], "fewer than its warmup_steps = 999"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes(base, tmp_path, capsys, mistake):  # noqa: F811
    """law: exit status 2, a sentence, no trace."""
    more, message = mistake
    assert main(words(base, tmp_path / "run", *more, config="cfrl")) == 2
    output = capsys.readouterr().err
    assert message in output and "Traceback" not in output
