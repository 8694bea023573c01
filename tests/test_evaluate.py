"""Evaluation: measures by hand, then whole evaluations through the command line."""

import json
import math

import numpy as np
import pytest

from ntkrl.assembly import evaluation
from ntkrl.assembly.settings import EvalSettings
from ntkrl.main import main
from ntkrl.report.names import is_known
from tests.test_train import alone, base, one_device, words

__all__ = ["base", "one_device"]  # fixtures

GIVEN = {
    "every_steps": 1,
    "prompts": 2,
    "samples_per_prompt": 4,
    "repeats": 1,
    "success_threshold": 1.0,
    "temperature": None,
}


def test_measures_of_prompts():
    """by hand: pass@k, best-of-N, n-grams and answers of two prompts with four samples each."""
    texts = ["a b", "a b", "a c", "", "so #### 7", "no #### 7.", "#### 8", r"\boxed{7}"]
    rewards = np.array([1, 0, 1, 0, 0, 0.5, 0, 0], np.float32)
    found = evaluation.prompt_measures(texts, rewards, EvalSettings(**GIVEN))
    expected = {
        "eval/reward": [0.5, 0.125],
        "eval/pass@1": [0.5, 0],
        "eval/pass@k": [1, 0],
        "eval/distinct_solutions": [2, 0],
        "eval/distinct_completions": [0.75, 1],
        "diversity/pass@1": [0.5, 0],
        "diversity/pass@2": [5 / 6, 0],  # of the six pairs one has no success
        "diversity/pass@4": [1, 0],
        "diversity/best_of_1": [0.5, 0.125],
        "diversity/best_of_2": [5 / 6, 0.25],  # three of the six pairs hold the 0.5
        "diversity/best_of_4": [1, 0.5],
        "diversity/distinct_1": [3 / 6, 7 / 9],
        "diversity/distinct_2": [2 / 3, 1],
        "diversity/distinct_answers": [3, 2],
        "diversity/answer_entropy": [1.5 * math.log(2), 2 * math.log(2) - 0.75 * math.log(3)],
    }
    assert found.keys() - expected.keys() == {"diversity/self_bleu"}
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-12, err_msg=name)
    assert all(map(is_known, found))


@pytest.mark.parametrize(("samples", "ks"), [(1, [1]), (8, [1, 2, 4, 8]), (10, [1, 2, 4, 8, 10])])
def test_numbers_of_draws(samples, ks):
    """by hand: powers of two up to the samples, and their number; one text has no self-BLEU."""
    assert evaluation.powers(samples) == ks
    settings = EvalSettings(**GIVEN | {"samples_per_prompt": samples})
    found = evaluation.prompt_measures(["x"] * samples, np.ones(samples), settings)
    assert [name for name in found if "pass@" in name][2:] == [f"diversity/pass@{k}" for k in ks]
    assert ("diversity/self_bleu" in found) == (samples > 1)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A run of four steps, of which 2 and 4 are kept, and 4 is exported."""
    place = tmp_path_factory.mktemp("runs") / "own"
    more = ["--config.stages[0].steps=4", "--config.stages[0].parameters=(('.*', 1e-2),)"]
    more += ["--config.eval.every_steps=2", "--config.checkpoint.keep_best=1"]
    more += ["--config.checkpoint.best_metric=eval/reward", "--config.probe.every_steps=None"]
    with pytest.MonkeyPatch.context() as patch:
        alone(patch)
        assert main(words(base, place, *more)) == 0
    return place


def samples(place):
    """The samples of an evaluation, as written."""
    return (place / "evaluations").glob("*.jsonl")


def test_checkpoints_of_a_run(run, base, tmp_path, capsys):
    """story: a checkpoint scores what its export scores, by the run's own config or another."""
    assert main(["evaluate", f"--run={run}"]) == 0, capsys.readouterr().err
    (newest,) = samples(run)
    assert newest.name == "own-step-4.jsonl"
    exported = [f"--config.run_dir={tmp_path}", "--config.eval.every_steps=2"]
    assert main(["evaluate", *words(run / "export", tmp_path)[1:], *exported]) == 0
    (again,) = samples(tmp_path)
    assert again.read_text() == newest.read_text()
    other = ["--step=2", f"--config.run_dir={tmp_path}", "--config.eval.prompts=3"]
    other += ["--config.reward.normalisation=None", "--config.rollout.stop=('+',)"]
    assert main(["evaluate", f"--run={run}", *other]) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (again.parent / "own-step-2.jsonl").open()]
    assert (
        len(rows) == 6
        and [row["reward"] for row in rows]
        != [json.loads(line)["reward"] for line in newest.open()][:6]
    )
    assert main(["evaluate", f"--run={run}", "--step=best"]) == 0
    capsys.readouterr()


MISTAKES = {
    "no run": (["--run=/nowhere"], "/nowhere is no run directory"),
    "step alone": (["--step=3"], "--step names a checkpoint of a run; give --run=RUN too"),
    "step": (["--run=RUN", "--step=3"], "has no checkpoint of step 3; kept are: 2, 4."),
    "word": (["--run=RUN", "--step=last"], "--step=last must be a whole number, or best."),
    "two configs": (["--run=RUN", "--config=configs/rl.py"], "a run has a config of its own"),
    "key": (["--run=RUN", "--config.eval.promts=3"], 'Did you mean "prompts"'),
    "type": (["--run=RUN", "--config.eval.prompts=many"], "many"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_one_message(run, capsys, mistake):
    """law: exit status 2, the cause and the way out, no trace."""
    given, message = mistake
    assert main(["evaluate", *(word.replace("RUN", str(run)) for word in given)]) == 2
    text = capsys.readouterr().err
    assert message in text and "Traceback" not in text
