"""Stories: runs that are continued for more steps, that fail before a step, or do not evaluate."""

import json

import numpy as np
from safetensors.numpy import load_file

from ntkrl.main import main
from tests.training.test_train import UNWATCHED, base, lines, one_device, words

__all__ = ["base", "one_device"]  # fixtures
FAILS = "def score(completions):\n    return ['good' for _ in completions]\n"


def test_more_steps_go_on(base, tmp_path, capsys):  # noqa: F811
    """story: two steps and then two more are the four of one run, in bits; fewer are refused."""
    once, again = tmp_path / "once", tmp_path / "again"

    def steps(run, number):
        return main(words(base, run, *UNWATCHED, f"--config.stages[0].steps={number}"))

    assert steps(once, 4) == 0 and steps(again, 2) == 0
    capsys.readouterr()
    assert steps(again, 4) == 0
    text = capsys.readouterr().out
    assert "stages[0].steps: 2 -> 4 (the run goes on)" in text
    assert "resuming" in text and "after rollout step 2" in text
    for run in (once, again):
        assert json.loads((run / "finished").read_text())["rollout_steps"] == 4
    assert [line["rollout_step"] for line in lines(again)[1:]] == [1, 2, 3, 4]
    first, second = (load_file(run / "export" / "model.safetensors") for run in (once, again))
    for name, array in first.items():
        np.testing.assert_array_equal(second[name], array)
    assert steps(again, 4) == 0 and "is finished; give it more steps" in capsys.readouterr().out
    assert steps(again, 3) == 2
    assert "stages[0].steps: 4 -> 3 (a run goes on for more steps" in capsys.readouterr().err


def test_a_run_that_failed_before_its_first_step(base, tmp_path, capsys):  # noqa: F811
    """story: its reward fails; another config may use the directory, and the lines name rows."""
    rewards, prompts, run = tmp_path / "mine.py", tmp_path / "rows.jsonl", tmp_path / "run"
    rewards.write_text(FAILS)
    prompts.write_text("\n" + "".join(f'{{"prompt": "{n}="}}\n' for n in range(10, 20)))
    common = [f"--config.data.path={prompts}", "--config.stages[0].steps=1"]
    bad = [*common, f"--config.reward.function={rewards}:score"]
    assert main(words(base, run, *bad)) == 2
    error = capsys.readouterr().err
    assert f"  {prompts}:" in error and "is 'good' for the completion" in error
    places = [line.split()[0] for line in error.splitlines() if line.startswith(f"  {prompts}:")]
    assert {int(place.rpartition(":")[2]) for place in places} <= {*range(2, 12)}
    assert main(words(base, run, *common, "--config.seed=3")) == 0
    assert "under which nothing was trained: beginning anew" in capsys.readouterr().out
    assert main(words(base, run, *common, "--config.seed=4")) == 2
    error = capsys.readouterr().err
    assert "was begun with another config: seed: 3 -> 4. Undo" in error


def test_without_evaluations_probes_and_ledgers_stay(base, tmp_path, capsys):  # noqa: F811
    """story: held-out prompts are read for them alone."""
    run = tmp_path / "run"
    watched = ["--config.eval.every_steps=None", "--config.probe.ledger_every_steps=2"]
    assert main(words(base, run, *watched, "--config.stages[0].steps=2")) == 0
    first, *_, last = lines(run)
    assert "probe/entropy" in first and "predict/correlation" in last
    assert not any(name.startswith("eval/") for line in lines(run) for name in line)
    assert [path.suffix for path in sorted((run / "ledger").iterdir())] == [".json", ".npz"]
    capsys.readouterr()
    assert main(["evaluate", f"--run={run}", "--trust"]) == 2
    assert "nothing to evaluate on: set eval.every_steps" in capsys.readouterr().err
