"""Runs through the command line: a user's files, other devices, mistakes."""

import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

import ntkrl
from ntkrl import data
from ntkrl.main import main
from ntkrl.training import RolloutSource
from tests.report.test_loggers import shown
from tests.toys import TINY, torch_neox

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "--config.data.prompts_per_step=4",
    "--config.data.max_prompt_tokens=8",
    "--config.rollout.completions_per_prompt=2",
    "--config.rollout.max_completion_tokens=5",
    "--config.eval.prompts=4",
    "--config.eval.samples_per_prompt=2",
    "--config.eval.every_steps=3",
    "--config.probe.prompts=2",
    "--config.probe.every_steps=2",
    "--config.checkpoint.every_steps=2",
    "--config.mesh.data=1",
]
UNWATCHED = [
    "--config.eval.every_steps=None",
    "--config.probe.every_steps=None",
    "--config.probe.ledger_every_steps=None",
]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny GPT-NeoX written by transformers, with the built-in task's tokenizer."""
    place = tmp_path_factory.mktemp("base")
    torch_neox(place, vocab_size=18, initializer_range=0.05)
    data.save_tokenizer(place)
    return place


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Runs of this file use one device of the eight, as a user's laptop would."""
    alone(monkeypatch)


def alone(patch):
    """Work in the checkout, with one device."""
    patch.chdir(ROOT)
    patch.setattr(jax, "devices", lambda: jax.local_devices()[:1])


def words(base, run, *more, config="rl"):
    """A train command."""
    return [
        "train",
        f"--config=configs/{config}.py",
        f"--config.model.path={base}",
        f"--config.run_dir={run}",
        f"--config.reward.function={ROOT / 'tests' / 'toy_rewards.py'}:score",
        *SMALL,
        *more,
    ]


def lines(run):
    """The metrics of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


STAGES = [
    "--config.stages[0].steps=4",
    "--config.stages[1].steps=6",
    "--config.stages[0].parameters=(('head/.*', 1e-2), ('.*', None))",
    "--config.stages[1].parameters=(('.*', 1e-3),)",
]


def check_lines_about_the_run(text, model, run):
    """Check that a run says what it will do, and where it ended."""
    for line in (
        f"model     {model}: 4.53 k parameters in float32",
        "prompts.jsonl: 11 prompts, 1 held out; 4 a step × 2 completions of ≤ 5 tokens",
        "my_rewards.py:even",
        "stages    all: 2 steps of adam, all parameters at 1e-06",
        "devices   1 × cpu",
        f"writes    {run}",
        f"exported to {run / 'export'}",
        f"next:\n  ntkrl report {run}\n  ntkrl evaluate --run={run}\n",
    ):
        assert line in text, text
    assert re.search(r"^  eval/reward +\S+ → \S+ \(steps 0 and 4\)$", text, re.MULTILINE), text


def test_a_users_own_model_prompts_and_rewards(tmp_path, capsys):
    """story: conversational prompts with a column, two reward functions, None, an export."""
    model = tmp_path / "model"
    torch_neox(model, vocab_size=18)
    data.save_tokenizer(model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}={% endif %}"
    )
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    rows = [{"prompt": [{"role": "user", "content": str(n)}], "answer": n} for n in range(10, 22)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewards = tmp_path / "my_rewards.py"
    rewards.write_text(
        "def short(completions, completion_ids, **kwargs):\n"
        "    assert completions[0][0]['role'] == 'assistant'\n"
        "    return [-0.1 * len(ids) for ids in completion_ids]\n"
        "def even(prompts, answer, log_metric, **kwargs):\n"
        "    log_metric('answers', sum(answer) / len(answer))\n"
        "    return [1.0 if a % 2 == 0 else None for a in answer]\n"
    )
    run = tmp_path / "run"
    arguments = words(
        model,
        run,
        f"--config.data.path={prompts}",
        f"--config.reward.function={rewards}:short,{rewards}:even",
        "--config.stages[0].steps=2",
        "--config.objective.preset=grpo",
        "--config.schedule.minibatches=2",
    )
    assert main(arguments) == 0, capsys.readouterr().err
    check_lines_about_the_run(capsys.readouterr().out, model, run)
    last = lines(run)[-1]
    assert last["step"] == 4 and last["rollout_step"] == 2  # two minibatches each
    assert last["rewards/even/mean"] == 1.0 and last["rewards/short/mean"] < 0
    assert 10 <= last["logged/answers"] <= 21
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(run / "export")
    _, params = ntkrl.load(run / "export")
    head = reloaded.get_output_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(np.asarray(params["head"]["weight"]), head)
    assert transformers.AutoTokenizer.from_pretrained(run / "export").eos_token_id == 0
    assert main(["report", str(run)]) == 0
    assert (run / "report" / "index.html").is_file()
    assert main(["export", str(run), str(tmp_path / "again")]) == 0
    for name, array in load_file(run / "export" / "model.safetensors").items():
        np.testing.assert_array_equal(
            load_file(tmp_path / "again" / "model.safetensors")[name], array
        )
    capsys.readouterr()
    assert main(arguments) == 0
    assert "is finished" in "".join(capsys.readouterr())


def test_event_files_hold_what_metrics_hold(base, tmp_path, monkeypatch, capsys):
    """story: TensorBoard shows every number of a run, which does not start without its package."""
    run = tmp_path / "run"
    more = ["--config.stages[0].steps=2", "--config.probe.every_steps=None"]
    more += ["--config.logging.tensorboard=True", "--config.logging.aliases=trl"]
    arguments = words(base, run, *more)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorboardX", None)
        assert main(arguments) == 2
    assert "pip install 'ntkrl[tensorboard]'" in capsys.readouterr().err
    assert not run.exists()
    assert main(arguments) == 0
    result = shown(run / "tensorboard")
    for line in lines(run):
        step, _ = line.pop("step"), line.pop("stage", None)
        for name, value in line.items():
            tag = name.replace("@", "_")  # a character that event files refuse
            assert result[tag][step] == np.float32(value), name
    assert result["stage"] == {1: "all"}  # logged once
    assert result["train/reward"] == result["reward"] and set(result["reward"]) == {1, 2}
    assert set(result["step_time"]) == {1, 2} and min(result["step_time"].values()) > 0
    assert "train/reward" not in (run / "metrics.jsonl").read_text()


def test_first_ratio_is_one_and_keys_are_fresh(base, tmp_path, monkeypatch):
    """law: sampler and trainer agree before each rollout's first update; no key is used twice."""
    keys, original = [], RolloutSource.batches

    def spy(self, context):
        keys.append(tuple(jax.random.key_data(context.key).tolist()))
        return original(self, context)

    monkeypatch.setattr(RolloutSource, "batches", spy)
    run = tmp_path / "run"
    assert main(words(base, run, "--config.stages[0].steps=3")) == 0
    gaps = [line["sampling/sampling_logp_difference/max"] for line in lines(run)[1:]]
    assert len(gaps) == 3 and max(gaps) < 2e-5
    assert lines(run)[1]["clip_ratio/region_mean"] == 0.0
    assert len(set(keys)) == 3


def test_a_mesh_of_eight_trains_alike(base, tmp_path, monkeypatch):
    """law: data 2 × fsdp 2 × tensor 2 samples the same tokens and learns the same weights."""
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    # SGD: Adam would turn rounding of gradients that are zero into steps of a full rate
    more = [
        "--config.stages[0].steps=3",
        "--config.stages[0].optimizer=sgd",
        "--config.stages[0].parameters=(('.*', 1e-1),)",
        "--config.probe.ledger_every_steps=2",
    ]
    assert main(words(base, alone, *more)) == 0
    monkeypatch.setattr(jax, "devices", jax.local_devices)
    mesh = [f"--config.mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")]
    assert main(words(base, spread, *more, *mesh)) == 0
    for single, eight in zip(lines(alone), lines(spread), strict=True):
        assert single.keys() == eight.keys()
        for name in set(single) - {"stage"}:
            # ratios of rounding
            if not name.startswith(("predict/", "sampling/", "ledger/", "weights/unchanged")):
                assert eight[name] == pytest.approx(single[name], rel=1e-3, abs=1e-5), name
    ledgers = [np.load(run / "ledger" / "step_000002.npz") for run in (alone, spread)]
    assert ledgers[0].files == ledgers[1].files
    for name in ledgers[0].files:
        np.testing.assert_allclose(*(ledger[name] for ledger in ledgers), rtol=1e-3, atol=1e-5)
    first, second = (load_file(run / "export" / "model.safetensors") for run in (alone, spread))
    start = load_file(base / "model.safetensors")
    moved = max(np.abs(first[name] - start[name]).max() for name in first)
    assert moved > 1e-3
    for name in first:
        np.testing.assert_allclose(second[name], first[name], atol=1e-5)


def test_evaluate(base, tmp_path, capsys):
    """story: scores of a directory are printed and saved with every sample."""
    run = tmp_path / "run"
    arguments = ["evaluate", *words(base, run, "--config.eval.repeats=2")[1:]]
    assert main(arguments) == 0
    assert "eval/pass@k" in capsys.readouterr().out
    saved, rewards = sorted((run / "evaluations").glob("*.json"), key=lambda p: len(p.name))
    assert len(json.loads(rewards.read_text())["rewards"]["score"]) == 16
    assert 0 <= json.loads(saved.read_text())["eval/reward"] <= 1
    rows = [json.loads(line) for line in saved.with_suffix(".jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 2 * 2  # prompts, samples, repeats
    assert set(rows[0]) == {"prompt", "completion", "reward", "repeat"}
    # in parts of three prompts and one; one sample of a prompt at a time
    for parts in ("data.prompts_per_step=3", "rollout.completions_per_prompt=1"):
        place = f"--config.run_dir={tmp_path / parts}"
        assert main([*arguments, place, f"--config.{parts}"]) == 0
        again = tmp_path / parts / "evaluations" / saved.with_suffix(".jsonl").name
        assert again.read_text() == saved.with_suffix(".jsonl").read_text()
    assert main(["evaluate", "--config=configs/rl.py", "--config.reward.function=expressions"]) == 2
    assert "model.path is missing" in capsys.readouterr().err
    assert main(["export", str(tmp_path), str(tmp_path / "x")]) == 2
    assert "is not a run directory" in capsys.readouterr().err


def test_supervised_training_learns(tmp_path):
    """story: a new model from nothing lowers its loss and exports."""
    run = tmp_path / "sft"
    arguments = [
        "train",
        "--config=configs/sft.py",
        f"--config.run_dir={run}",
        "--config.model.new.hidden_size=32",
        "--config.model.new.intermediate_size=32",
        "--config.model.new.num_hidden_layers=1",
        "--config.data.examples=200",
        "--config.data.max_prompt_tokens=8",
        "--config.rollout.max_completion_tokens=12",
        "--config.stages[0].steps=25",
        "--config.stages[0].parameters=(('.*', 1e-2),)",
        "--config.mesh.data=1",
    ]
    assert main(arguments) == 0
    losses = [line["loss"] for line in lines(run) if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    assert ntkrl.load(run / "export")[0].vocab_size == 18


MISTAKES = {
    "no model": (["--config.model.path=/nowhere"], "'/nowhere' is not a directory"),
    "no reward": (["--config.reward.function=nope.py:score"], "nope.py"),
    "group of one": (
        ["--config.rollout.completions_per_prompt=1"],
        "needs at least 2 of them, not 1; raise rollout.completions_per_prompt",
    ),
    "prompt too long": (["--config.data.max_prompt_tokens=2"], "max_prompt_tokens"),
    "pattern": (
        ["--config.stages[0].parameters=(('layers/.*', 1e-3),)"],
        "no pattern covers embed/embedding",
    ),
    "key": (["--config.model.pth=x"], "did you mean '--config.model.path'?"),
    "minibatches": (["--config.schedule.minibatches=3"], "must divide data.prompts_per_step = 4"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_one_message(base, tmp_path, capsys, mistake):
    """law: exit status 2, the cause and the way out, no trace, and no run left behind."""
    more, message = mistake
    assert main(words(base, tmp_path / "run", *more)) == 2
    text = capsys.readouterr().err
    assert message in text and "Traceback" not in text
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_reward_that_fails(base, tmp_path, capsys):
    """law: a reward that raises names itself, and the same command resumes once it is mended."""
    rewards = tmp_path / "my_rewards.py"
    rewards.write_text("def score(completions, **kwargs):\n    return [1 / 0]\n")
    arguments = words(base, tmp_path / "run", f"--config.reward.function={rewards}:score")
    arguments += ["--config.stages[0].steps=1"]
    assert main(arguments) == 2
    text = capsys.readouterr().err
    assert "my_rewards.py:score raised ZeroDivisionError" in text and "Traceback" not in text
    rewards.write_text("def score(completions, **kwargs):\n    return [0.0 for _ in completions]\n")
    assert main(arguments) == 0


def test_not_finite_stops(base, tmp_path, capsys):
    """law: a loss that is not finite names the step and the last good checkpoint."""
    more = [
        "--config.stages[0].steps=6",
        "--config.stages[0].optimizer=sgd",
        "--config.stages[0].parameters=(('.*', 1e30),)",
        "--config.stages[0].max_grad_norm=1e30",
        "--config.checkpoint.every_steps=1",
        "--config.schedule.log_ratio_tolerance=1e9",
        "--config.reward.function=" + str(tmp_path / "r.py:score"),
    ]
    (tmp_path / "r.py").write_text(
        "def score(completion_ids, **kwargs):\n    return [float(sum(i)) for i in completion_ids]\n"
    )
    assert main(words(base, tmp_path / "run", *more)) == 2
    text = capsys.readouterr().err
    assert "not finite at step" in text and "last good checkpoint is step" in text
    assert "Lower the stage's learning rate" in text


def test_another_config_in_the_same_directory(base, tmp_path, capsys):
    """law: a run directory is not continued with other settings; the change is named."""
    run = tmp_path / "run"
    assert main(words(base, run, "--config.stages[0].steps=1")) == 0
    assert main(words(base, run, "--config.stages[0].steps=2", "--config.seed=5")) == 2
    assert "seed: 0 -> 5" in capsys.readouterr().err


def test_command_line_itself(capsys):
    """law: help lists the commands; an unknown one is status 2."""
    assert main([]) == 0 and "usage: ntkrl" in capsys.readouterr().out
    assert main(["trian"]) == 2 and "unknown command 'trian'" in capsys.readouterr().err
    assert main(["report"]) == 2 and "at least one run directory" in capsys.readouterr().err
    assert main(["report", "x", "--ot=y"]) == 2 and "'--out'" in capsys.readouterr().err
    assert main(["report", "--glossary"]) == 0 and "| `reward` |" in capsys.readouterr().out
    assert main(["report", "--glossary", "x"]) == 2 and "no runs" in capsys.readouterr().err


def test_tiny_config_is_a_pythia(base):
    """law: the model that these runs train is the one transformers wrote."""
    assert ntkrl.load(base)[0].config.num_hidden_layers == TINY["num_hidden_layers"]
