"""Evaluation: measures by hand, then evaluations through the command line."""

import json
import math
import re

import numpy as np
import pytest

from ntkrl import data, runtime
from ntkrl.evaluation import comparison as against
from ntkrl.evaluation import sampling as evaluation
from ntkrl.evaluation.sampling import sampling_noise
from ntkrl.main import main
from ntkrl.report import is_known
from ntkrl.settings import EvalSettings
from tests.training.test_train import alone, base, lines, one_device, words

__all__ = ["base", "one_device"]  # fixtures

FIELDS = {
    "every_steps": 1,
    "prompts": 2,
    "samples_per_prompt": 4,
    "repeats": 1,
    "success_threshold": 1.0,
    "temperature": None,
    "base": None,
    "name": None,
}


def test_measures_of_prompts():
    """by hand: pass@k, best-of-N, n-grams and answers of two prompts with four samples each."""
    texts = ["a b", "a b", "a c", "", "so #### 7", "no #### 7.", "#### 8", r"\boxed{7}"]
    rewards = np.array([1, 0, 1, 0, 0, 0.5, 0, 0], np.float32)
    result = evaluation.prompt_measures(texts, rewards, EvalSettings(**FIELDS))
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
    assert result.keys() - expected.keys() == {"diversity/self_bleu"}
    for name, values in expected.items():
        np.testing.assert_allclose(result[name], values, rtol=1e-12, err_msg=name)
    assert all(map(is_known, result))


def test_noise_of_a_sampling():
    """by hand: two samplings of means 1 and 2; of one, √((1/2 + 2) / 2) / 2; none of one sample."""
    ones, twos = np.ones((2, 3)), np.full((2, 3), 2.0)
    assert sampling_noise([ones, twos]) == pytest.approx(math.sqrt(0.5))
    # variances of 1, 2 and of 1, 3 are 1/2 and 2
    one = np.array([[1.0, 2.0], [1.0, 3.0]])
    assert sampling_noise([one]) == pytest.approx(math.sqrt(1.25) / 2)
    assert sampling_noise([ones[:, :1]]) is None
    # law: of many samplings of 0 or 1 it is that of their means, √(1/4 / 8 / 16)
    rewards = np.random.default_rng(0).integers(0, 2, (400, 16, 8)).astype(float)
    several = sampling_noise(list(rewards))
    single = np.mean([sampling_noise([each]) for each in rewards])
    assert several == pytest.approx(math.sqrt(1 / 512), rel=0.1)  # 1/√800 is 0.035
    assert single == pytest.approx(math.sqrt(1 / 512), rel=0.01)


@pytest.mark.parametrize(("samples", "ks"), [(1, [1]), (8, [1, 2, 4, 8]), (10, [1, 2, 4, 8, 10])])
def test_numbers_of_draws(samples, ks):
    """by hand: powers of two up to the samples, and their number; one text has no self-BLEU."""
    assert against.powers(samples) == ks
    settings = EvalSettings(**FIELDS | {"samples_per_prompt": samples})
    result = evaluation.prompt_measures(["x"] * samples, np.ones(samples), settings)
    assert [name for name in result if "pass@" in name][2:] == [f"diversity/pass@{k}" for k in ks]
    assert ("diversity/self_bleu" in result) == (samples > 1)


def test_names_stay_in_their_directory():
    """law: the name of an evaluation is a file name."""
    assert EvalSettings(**FIELDS | {"name": "test-2.a"}).name == "test-2.a"
    for name in ("../x", "a/b", "", ".x"):
        with pytest.raises(ValueError, match="eval.name must be letters"):
            EvalSettings(**FIELDS | {"name": name})


def test_comparison():
    """by hand: wins, gaps and support of two samples for each of two prompts."""
    base = against.Samples([["1", "2"], ["x", "x"]], np.array([[0, 1], [0, 0]]))
    candidate = against.Samples([["3", "2"], ["y", "x"]], np.array([[1, 1], [0, 0]]))
    result = against.compare(base, candidate, 1.0)
    expected = {
        "eval/win_rate": (0.75 + 0.5) / 2,  # of four pairs two are won and two equal; all equal
        "eval/win_rate_low": 0.5,  # one of four resamples is twice the second prompt
        "eval/win_rate_high": 0.75,
        "eval/reward_difference": 0.25,
        "eval/reward_difference_low": 0.0,
        "eval/reward_difference_high": 0.5,
        # best of one: 0.5 before and 1 after for the first prompt; best of two: 1 and 1
        "diversity/gap_best_of_1": 0.25,
        "diversity/gap_best_of_1_low": 0.0,
        "diversity/gap_best_of_1_high": 0.5,
        **dict.fromkeys((f"diversity/gap_best_of_2{end}" for end in ("", "_low", "_high")), 0.0),
        "diversity/crossing_k": math.inf,  # 0.25 and 0.5 against 0.5 and 0.5
        "diversity/crossing_k_low": math.inf,
        "diversity/crossing_k_high": math.inf,
        "diversity/support_kept": 1,
        "diversity/support_lost": 0,
        "diversity/support_gained": 1,
        "diversity/support_neither": 0,
        "diversity/support_retention": 1,
        "diversity/support_discovery": 0.5,
        "diversity/support_score": 2 / 3,
        "diversity/support_change": 0.5,
    }
    assert result == pytest.approx(expected, rel=1e-12)
    assert all(map(is_known, result))
    turned = against.compare(candidate, base, 1.0)
    assert turned["eval/win_rate"] == 1 - result["eval/win_rate"]
    assert turned["diversity/crossing_k"] == 1.0 and turned["diversity/support_lost"] == 1
    assert math.isnan(against.compare(base, candidate, 9.0)["diversity/support_retention"])


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """The samples that an evaluation of the starting model saved."""
    place = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        alone(patch)
        assert main(["evaluate", *words(base, place)[1:]]) == 0
    return next(samples(place))


@pytest.fixture(scope="module")
def run(base, saved, tmp_path_factory):
    """A run of four steps, of which 2 and 4 are kept, and 4 is exported."""
    place = tmp_path_factory.mktemp("runs") / "own"
    more = ["--config.stages[0].steps=4", "--config.stages[0].parameters=(('.*', 1e-2),)"]
    more += ["--config.eval.every_steps=2", "--config.checkpoint.keep_best=1"]
    more += ["--config.checkpoint.best_metric=eval/reward", f"--config.eval.base={saved}"]
    more += ["--config.probe.every_steps=None"]
    with pytest.MonkeyPatch.context() as patch:
        alone(patch)
        assert main(words(base, place, *more)) == 0
    return place


def samples(place):
    """The samples of an evaluation, as written."""
    return (place / "evaluations").glob("*.jsonl")


def test_checkpoints_of_a_run(run, base, tmp_path, capsys):
    """story: a checkpoint scores the same as its export, by the run's config or another."""
    assert main(["evaluate", f"--run={run}", "--trust"]) == 0, capsys.readouterr().err
    (newest,) = samples(run)
    assert newest.name == "own-step-4.jsonl"
    exported = [f"--config.run_dir={tmp_path}", "--config.eval.every_steps=2"]
    assert main(["evaluate", *words(run / "export", tmp_path)[1:], *exported]) == 0
    (again,) = samples(tmp_path)
    assert again.read_text() == newest.read_text()
    other = ["--step=2", f"--config.run_dir={tmp_path}", "--config.eval.prompts=3"]
    other += ["--config.reward.normalisation=None", "--config.rollout.stop=('+',)"]
    assert main(["evaluate", f"--run={run}", "--trust", *other]) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (again.parent / "own-step-2.jsonl").open()]
    assert (
        len(rows) == 6
        and [row["reward"] for row in rows]
        != [json.loads(line)["reward"] for line in newest.open()][:6]
    )
    assert main(["evaluate", f"--run={run}", "--trust", "--step=best"]) == 0
    output = capsys.readouterr().out
    assert "4 prompts × 2 samples against" in output


def test_against_a_base(run, saved, base, tmp_path, capsys):
    """story: training and evaluation report wins over the base, whose rewards are recombined."""
    scores = [line for line in lines(run) if "eval/reward" in line]
    assert [line["rollout_step"] for line in scores[1:]] == [2, 4]
    before = json.loads(saved.with_suffix(".json").read_text())["eval/reward"]
    for line in scores:
        assert line["eval/win_rate_low"] <= line["eval/win_rate"] <= line["eval/win_rate_high"]
        gap = line["eval/reward"] - before
        assert line["eval/reward_difference"] == pytest.approx(gap, abs=1e-6)
    weighed = ["--config.reward.weights=(3.0,)", f"--config.eval.base={saved}"]
    assert main(["evaluate", *words(base, tmp_path, *weighed)[1:]]) == 0
    (result,) = (tmp_path / "evaluations").glob(saved.with_suffix(".json").name)
    measured = json.loads(result.read_text())
    assert measured["eval/reward"] == pytest.approx(3 * before) and before > 0
    assert measured["eval/win_rate"] == 0.5 and measured["eval/reward_difference"] == 0.0
    assert measured["eval/reward_low"] < measured["eval/reward"] < measured["eval/reward_high"]
    assert all(map(is_known, measured))
    assert measured["diversity/crossing_k"] is None  # equal curves do not cross
    assert re.search(r"eval/win_rate +0.5000 +0\.\d+ to 0\.\d+\n", capsys.readouterr().out)


MISTAKES = {
    "no run": (["--run=/nowhere"], "/nowhere is not a run directory"),
    "step alone": (["--step=3"], "--step names a checkpoint of a run; give --run=RUN too"),
    "step": (["--run=RUN", "--step=3"], "has no checkpoint of step 3; kept are: 2, 4."),
    "word": (["--run=RUN", "--step=last"], "--step=last must be a whole number, or best."),
    "trust alone": (["--trust"], "--trust is about the code that a run's config names"),
    "two configs": (["--run=RUN", "--config=configs/rl.py"], "the run has its own config"),
    "key": (["--run=RUN", "--config.eval.promts=3"], "did you mean '--config.eval.prompts'?"),
    "type": (["--run=RUN", "--config.eval.prompts=many"], "many"),
    "counts": (
        ["--run=RUN", "--config.eval.samples_per_prompt=0", "--config.eval.repeats=0"],
        "eval.samples_per_prompt must be ≥ 1, not 0; eval.repeats must be ≥ 1, not 0.",
    ),
    "no base": (["--run=RUN", "--config.eval.base=/none.jsonl"], "/none.jsonl: no such file"),
    "no samples": (["--run=RUN", "--config.eval.base=x.json"], "x.json is not a file of samples"),
    "prompts": (["--run=RUN", "--config.eval.prompts=6"], "other prompts: 2 of the 6 used here"),
    "samples": (
        ["--run=RUN", "--config.eval.samples_per_prompt=4"],
        "holds 2 samples of a prompt, and 4 are drawn here",
    ),
    "rewards": (
        ["--run=RUN", "--config.reward.function=repetition"],
        "has rewards of score, this config of repetition",
    ),
}


def test_code_named_by_a_run_needs_trust(run, capsys):
    """story: the file is named and not executed, unless the user names it, or says so."""
    assert main(["evaluate", f"--run={run}"]) == 2
    text = capsys.readouterr().err
    assert f"{run}/config.json names code that would be executed with your rights" in text
    assert "toy_rewards.py:score, and the directory is outside" in text and "add --trust" in text
    nothing = ["--config.reward.function=expressions", "--step=3"]
    assert main(["evaluate", f"--run={run}", *nothing]) == 2
    assert "has no checkpoint of step 3" in capsys.readouterr().err
    assert main(["evaluate", f"--run={run}", "--step=3", "--trust"]) == 2
    text = capsys.readouterr().err
    assert f"toy_rewards.py:score, named by {run}/config.json" in text


@pytest.mark.parametrize("command", [["evaluate", "--run=MODEL"], ["export", "MODEL", "out"]])
def test_a_model_directory_is_no_run(tmp_path, monkeypatch, capsys, command):
    """by hand: its config.json is transformers', and what scores it is named."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"model_type": "llama"}')
    assert main([word.replace("MODEL", "m") for word in command]) == 2
    text = capsys.readouterr().err
    assert "m is a Hugging Face directory, not a run directory" in text
    assert "--config.model.path=m` scores it" in text and len(text.splitlines()) == 1


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_one_message(run, capsys, mistake):
    """law: exit status 2, the cause and the way out, no trace."""
    arguments, message = mistake
    trust = ["--trust"] if "--run=RUN" in arguments else []
    arguments = [*(word.replace("RUN", str(run)) for word in arguments), *trust]
    assert main(["evaluate", *arguments]) == 2
    text = capsys.readouterr().err
    assert message in text and "Traceback" not in text


def test_mistakes_of_a_base_are_told_together(run, saved, tmp_path, capsys):
    """law: lost rewards and other prompts are in one message, with the config's other errors."""
    path = tmp_path / "sft.jsonl"
    path.write_text(saved.read_text().replace('"prompt": "1', '"prompt": "0'))
    arguments = [f"--config.eval.base={path}", "--config.reward.function=exact_match"]
    assert main(["evaluate", f"--run={run}", "--trust", *arguments]) == 2
    text = capsys.readouterr().err
    for message in (
        f"{path} is of other prompts",
        "sft.rewards.json cannot be read",
        "requires 'answer'",
    ):
        assert message in text
    path.with_suffix(".rewards.json").write_text('{"rewards": {"score": [0.5, null]}}')
    assert main(["evaluate", f"--run={run}", "--trust", f"--config.eval.base={path}"]) == 2
    assert "has 8 samples, and rewards beside it are 2 of score" in capsys.readouterr().err
    path.with_suffix(".rewards.json").write_text('{"rewards": {"score": [[]]}}')
    assert main(["evaluate", f"--run={run}", "--trust", f"--config.eval.base={path}"]) == 2
    assert "'score' is not a list of numbers" in capsys.readouterr().err


def test_samples_of_conversations_are_data(base, tmp_path, monkeypatch):
    """story: samples of conversations are rows in TRL's form, and a base to compare with."""
    alone(monkeypatch)
    prompts = tmp_path / "prompts.jsonl"
    turns = [[{"role": "user", "content": text}] for text in ("12=", "7=")]
    prompts.write_text("".join(json.dumps({"prompt": turn}) + "\n" for turn in turns))
    (tmp_path / "reward.py").write_text(
        "def score(completions, **kwargs):\n"
        "    return [float(len(turn[0]['content'])) for turn in completions]\n"
    )
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    arguments = [
        f"--config.data.path={prompts}",
        f"--config.data.eval_path={prompts}",
        f"--config.reward.function={tmp_path / 'reward.py'}:score",
        f"--config.model.template={tmp_path / 'plain.jinja'}",
        "--config.data.prompts_per_step=2",
    ]
    assert main(["evaluate", *words(base, tmp_path / "first", *arguments)[1:]]) == 0
    path = next(samples(tmp_path / "first"))
    rows = data.read_set(path, ("prompt", "completion"))
    assert rows.conversational and rows.prompts[0] == turns[0]
    assert [message["role"] for message in rows.columns["completion"][0]] == ["assistant"]
    compared = [*arguments, f"--config.eval.base={path}"]
    assert main(["evaluate", *words(base, tmp_path / "second", *compared)[1:]]) == 0
    metrics = json.loads(next(samples(tmp_path / "second")).with_suffix(".json").read_text())
    assert metrics["eval/reward_difference"] == 0


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_checkpoints_that_are_not_finite(run, tmp_path, monkeypatch, capsys, command):
    """law: a checkpoint with NaN is named, and neither scored as zeros nor exported."""
    restore = runtime.Checkpoints.restore_params

    def spoiled(*args):
        params = restore(*args)
        params["embed"]["embedding"] = params["embed"]["embedding"].at[3, 1].set(math.nan)
        return params

    monkeypatch.setattr(runtime.Checkpoints, "restore_params", spoiled)
    evaluated = command == "evaluate"
    words = [f"--run={run}", "--trust"] if evaluated else [str(run), str(tmp_path / "out")]
    assert main([command, *words]) == 2
    text = capsys.readouterr().err
    assert f"step 4 of {run} holds NaN or infinity in embed/embedding; kept are: 2, 4." in text
    assert not (tmp_path / "out").exists()


def test_exports_keep_away_from_runs(run, base, tmp_path, capsys):
    """law: an output in a run directory, or with files of the user, is refused before loading."""
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    (tmp_path / "notes").write_text("x")
    for out, message in (
        (run, "is in the run directory"),
        (run / "export", "is in the run directory"),
        (run / "checkpoints" / "4", "is in the run directory"),
        (run / "mine" / "deep", "is in the run directory"),
        (tmp_path, "holds files that no export wrote, or that were changed since: notes"),
        (base, "which the model was read from"),
    ):
        assert main(["export", str(run), str(out)]) == 2
        text = capsys.readouterr().err
        assert message in text and "Traceback" not in text, text
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_training_does_not_begin_what_it_could_not_export(base, tmp_path, monkeypatch, capsys):
    """law: files of the user in RUN/export stop a run before its first step, a resumed one too."""
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "thesis.tex").write_text("years")
    assert main(words(base, tmp_path)) == 2
    assert "export" in capsys.readouterr().err
    monkeypatch.setattr(runtime, "check_run_dir", lambda *_: [])  # as if begun before
    assert main(words(base, tmp_path)) == 2
    assert "export holds files that no export wrote" in capsys.readouterr().err
    assert (tmp_path / "export" / "thesis.tex").read_text() == "years"
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", '{"model": 3}', '{"name": null', '{"a": 1, "a": 2}', "[" * 10**5),
        *('{"mesh": [], "stages": {}, "model": {"path": []}}', '{"a.b": {"": 1}, "": []}'),
    ],
    ids=lambda content: content[:20],
)
def test_damaged_configs_of_runs(tmp_path, capsys, content):
    """law: every command that reads config.json of a run names it, in one sentence."""
    (tmp_path / "config.json").write_text(content)
    for command in (["evaluate", f"--run={tmp_path}"], ["export", str(tmp_path), "x"]):
        assert main(command) == 2
        text = capsys.readouterr().err
        assert "Traceback" not in text and len(text) < 1500
    assert main(["report", "--text", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["remove", 3, "x", [], {}, None])
def test_damaged_sections_of_runs(run, tmp_path, capsys, change):
    """law: a section or a field of another type is a sentence, whichever it is."""
    raw = json.loads((run / "config.json").read_text())
    for name in raw:
        values = {key: value for key, value in raw.items() if key != name or change != "remove"}
        if change != "remove":
            values[name] = change
        (tmp_path / "config.json").write_text(json.dumps(values))
        assert main(["export", str(tmp_path), str(tmp_path.parent / "x")]) == 2, name
        assert "Traceback" not in capsys.readouterr().err
