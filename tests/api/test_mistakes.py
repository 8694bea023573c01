"""By hand: every mistake in a call is one ValueError, which names the argument and the fix."""

import functools
import inspect
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import ntkrl
from ntkrl import data
from tests.api.conftest import ROWS
from tests.toys import toy_params, toy_policy


def score(completions, **kwargs):
    return [0.0] * len(completions)


def other():
    """Another function that is called score."""

    def score(completions, **kwargs):
        return [1.0] * len(completions)

    return score


class Scorer:
    """A class whose instances are functions."""

    def __call__(self, completions, **kwargs):
        return [0.0] * len(completions)


class Splits(dict):
    """A datasets.DatasetDict, as far as it is looked at."""


class Split:
    """A datasets.Dataset, as far as it is looked at."""

    column_names = ("prompt", "answer")

    def to_list(self):
        return [dict(row) for row in ROWS]


class Table:
    """A pandas.DataFrame, as far as it is looked at."""

    columns = ("prompt",)

    def to_dict(self, orient):
        return []


LENGTHS = {
    "data.prompts_per_step": 4,
    "data.max_prompt_tokens": 8,
    "rollout.max_completion_tokens": 5,
}
MISTAKES = [
    ({"model": 3}, "model is 3 (int); pass a directory"),
    ({"model": "missing"}, "missing"),
    ({"model": (1, 2)}, "model is (1, 2) (tuple)"),
    ({"model": " "}, "model is ' ' (str); pass a directory"),
    ({"model": toy_policy()}, "model is a policy without params; pass a directory"),
    ({"model": ({}, toy_policy())}, "model is (params, policy), in the wrong order"),
    ({"model": types.SimpleNamespace(save_pretrained=0)}, "whose save_pretrained(DIR) writes"),
    ({"prompts": 3}, "prompts is 3 (int); pass a list of dicts"),
    ({"prompts": []}, "prompts is empty"),
    ({"prompts": ROWS[0]}, "prompts is one dict; put it in a list"),
    ({"prompts": iter(ROWS)}, "pass a list of dicts"),
    ({"prompts": Splits(train=Split(), test=Split())}, "the splits train, test; pass one, as"),
    ({"prompts": Table()}, "prompts.to_dict('records')"),
    (
        {"prompts": ["1+1="]},
        'prompts row 0: expected a dict, found str; write {"prompt": text}',
    ),
    ({"prompts": [*ROWS[:4], {"question": "1"}]}, "prompts row 4: no 'prompt' (missing or null)"),
    ({"prompts": [*ROWS, {"prompt": " "}]}, "prompts row 81: empty prompt"),
    (
        {"prompts": [*ROWS, {"prompt": [{"role": "user", "content": "1"}]}]},
        "prompts row 81: mixed forms",
    ),
    ({"prompts": [{"prompt": "1+1=", 5: 1}]}, "column names must be text, not 5"),
    ({"prompts": [{"prompt": "1=", "x": object()}]}, "column 'x' fits neither JSON nor Parquet"),
    ({"prompts": "missing.jsonl"}, "missing.jsonl: no such file"),
    ({"prompts": ROWS[:2]}, "leaves 1 training prompts, fewer than"),
    ({"eval_prompts": 3}, "eval_prompts is 3 (int)"),
    ({"rewards": None}, "reward.function is missing"),
    ({"rewards": []}, "rewards is empty; pass a function"),
    ({"rewards": 3}, "rewards is 3 (int); expected a function"),
    ({"rewards": [score, 3]}, "rewards[1] is 3 (int); expected a function"),
    ({"rewards": Scorer}, "rewards is the class Scorer; pass an instance of it"),
    ({"rewards": [score, other()]}, "rewards[1] is named 'score', as another one is"),
    ({"rewards": [score, "expressionz"]}, "'expressionz' is not a reward function"),
    ({"rewards": lambda texts: [0.0]}, "lambda requires 'texts', which is not a column"),
    ({"rewards": len}, "len takes obj by position only"),
    ({"method": "rlo"}, "method is 'rlo'; it is one of rl, cfrl, sft, reward; did you mean 'rl'?"),
    ({"method": 3}, "method is 3; it is one of"),
    ({"method": "cfrl", "config": "rl"}, "leave out one of the two"),
    ({"learning_rate": "fast"}, "learning_rate='fast': expected a number above 0"),
    ({"learning_rate": -1.0}, "learning_rate=-1.0: expected a number above 0"),
    ({"steps": 0}, "steps=0: expected a whole number of at least 1"),
    ({"steps": 2.5}, "steps=2.5: expected a whole number"),
    ({"seed": -1}, "seed=-1: expected a whole number"),
    ({"seed": True}, "seed=True: expected a whole number"),
    ({"run_dir": 3}, "run_dir is 3 (int); pass the name of a directory"),
    ({"run_dir": ""}, "run_dir is '' (str)"),
    ({"run_dir": "file"}, "run_dir file: file is a file; name a directory"),
    ({"run_dir": "file/run"}, "run_dir file/run: file is a file; name a directory"),
    ({"run_dir": "runs/a,b"}, "run_dir 'runs/a,b' has a comma"),
    ({"on_step": 3}, "on_step is 3 (int); pass a function"),
    ({"on_step": lambda: None}, "on_step cannot be called with two values (too many positional"),
    ({"on_step": lambda a, b, c: None}, "as in def on_step(step, metrics)"),
    ({"config": {"model.path": "x"}}, "model and config 'model.path' set the same; leave out"),
    ({"config": {"reward": {"function": "x"}}}, "rewards and config 'reward.function' set the"),
    ({"config": {"stages": 5}}, "config 'stages' is 5 (int); expected tuple, as ("),
    ({"config": {"stages[5].steps": 5}}, "stages has 1 row, up to stages[0]; add more in a"),
    ({"config": {"temperature": 1.0}}, "mean 'eval.temperature' or 'rollout.temperature'?"),
    ({"config": 3}, "config is 3 (int); it is a dict of changes"),
    ({"config": "missing.py"}, "--config=missing.py: no such file"),
    ({"config": {"rollout.max_tokens": 3}}, "did you mean 'rollout.max_completion_tokens'?"),
    ({"config": {"rollout": {"temprature": 1.0}}}, "did you mean 'rollout.temperature'?"),
    ({"config": {"rollout": 3}}, "config 'rollout' is a section; name a setting"),
    (
        {"config": {"rollout.max_completion_tokens": "many"}},
        "config 'rollout.max_completion_tokens' is 'many' (str); expected int, as 512",
    ),
    ({"config": {"rollout.temperature": -1.0}}, "temperature"),
    (
        {"config": {**LENGTHS, "rollout.completions_per_prompt": 10**9}},
        "need at least",  # was allocated before it was counted
    ),
    ({"config": {"reward.weights": (1.0, 2.0)}}, "reward.weights has 2 entries for 1 reward"),
]


@pytest.mark.parametrize(("mistake", "words"), MISTAKES)
def test_mistakes(base, mistake, words):
    """by hand: nothing is written, and the message has the argument, its value and the fix."""
    Path("file").touch()
    arguments = {"model": base, "prompts": ROWS, "rewards": score, "run_dir": "run", **mistake}
    with pytest.raises(ValueError) as error:
        ntkrl.train(**{"config": {"data.prompts_per_step": 4}, **arguments})
    message = str(error.value)
    assert words in message and len(message.splitlines()) <= 6, message
    assert not Path("run").exists() or not any(Path("run").iterdir())


def test_all_mistakes_at_once(base):
    """by hand: one message names everything."""
    with pytest.raises(ValueError) as error:
        ntkrl.train(base, 3, [4], on_step=5, run_dir="run", steps=0, seed=-1)
    for words in ("prompts is 3", "rewards[0] is 4", "on_step is 5", "steps=0", "seed=-1"):
        assert words in str(error.value)


def test_other_calls(base):
    """by hand: mistakes in the other calls, and in runs that do not exist."""
    policy, loaded = toy_policy(), ntkrl.load(base)
    for call, words in (
        (
            lambda: ntkrl.train((policy, toy_params(policy)), ROWS, score),
            "was not loaded from files",
        ),
        (lambda: ntkrl.evaluate(base, ROWS, None), "rewards is None; evaluate needs"),
        (lambda: ntkrl.evaluate(base, [], score), "prompts is empty"),
        (lambda: ntkrl.kernels(base, "1+1="), "no file; pass a list for texts themselves"),
        (lambda: ntkrl.kernels(base, []), "pass a list of texts"),
        (lambda: ntkrl.kernels(base, ["1", ""]), "texts row 1: empty prompt"),
        (lambda: ntkrl.kernels(base, ["1"], positions="first"), "--positions must be last or all"),
        (lambda: ntkrl.kernels(3, ["1"]), "model is 3 (int)"),
        (lambda: ntkrl.open_run("nowhere"), "nowhere is not a run directory"),
        (lambda: ntkrl.open_run(3), "directory is 3"),
        (lambda: ntkrl.load(None), "path is None (NoneType); pass a directory of Hugging Face"),
        (lambda: ntkrl.load(base, "bf16"), "dtype is 'bf16'; pass one of floating point, such"),
        (lambda: ntkrl.load(base, np.int32), "pass one of floating point, such as 'float32'"),
        (lambda: ntkrl.load_scorer(3), "path is 3 (int); pass a directory"),
        (
            lambda: ntkrl.kernels(base, ["1" * 65]),
            "texts row 0: 65 tokens, and the model reads at most 64",
        ),
        (lambda: ntkrl.train((loaded[0], {}), ROWS, score), "the params do not fit the policy ("),
        (lambda: ntkrl.Steps(base, ROWS, method="sft"), "steps are those of RL"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ntkrl.train(temperature=0.8), "mean config={'rollout.temperature': …}?"),
        (lambda: ntkrl.train(lr=1e-5), "train has no argument 'lr'; did you mean 'learning_rate'?"),
        (lambda: ntkrl.train(reward_funcs=score), "did you mean 'rewards'?"),
        (lambda: ntkrl.Steps(num_generations=8), "config={'rollout.completions_per_prompt': …}?"),
        (lambda: ntkrl.evaluate(modle=3), "evaluate has no argument 'modle'; did you mean 'model'"),
        (lambda: ntkrl.kernels(xyz=3), "'xyz'; there are model, texts, positions, max_contexts"),
    ],
)
def test_arguments_that_do_not_exist(call, words):
    """by hand: TRL's names and those of settings lead to ours; the signature stays."""
    with pytest.raises(TypeError, match=re.escape(words)):
        call()
    assert "learning_rate" in inspect.signature(ntkrl.train).parameters


def test_names_of_functions():
    """by hand: functions, partial ones, objects and lambdas have names in the config."""
    from ntkrl.api.functions import read_rewards

    partial = functools.partial(other(), scale=2)
    spec, functions = read_rewards([score, Scorer(), "expressions", lambda completions: [0.0]])
    assert spec == "python:score,python:Scorer,expressions,python:lambda"
    assert functions["python:score"] is score
    assert read_rewards(partial)[0] == "python:score"
    two = [lambda completions: [0.0], lambda completions: [1.0]]
    assert read_rewards(two)[0] == "python:lambda_1,python:lambda_2"


def test_configs(base):
    """law: changes are made by dotted names or by sections; a ConfigDict is copied."""
    from ntkrl.api.overrides import read_config

    changes = {
        "rollout.max_completion_tokens": np.int64(7),
        "rollout": {"temperature": 1},
        "stages[1].steps": 9,
        "reward.weights": [1.0, 2.0],
        "eval.every_steps": None,
    }
    config = read_config("cfrl", changes)
    assert config.rollout.max_completion_tokens == 7 and config.rollout.temperature == 1.0
    assert type(config.rollout.temperature) is float and config.stages[1].steps == 9
    assert config.reward.weights == (1.0, 2.0) and config.eval.every_steps is None
    copied = read_config("rl", config)
    copied.seed = 5
    assert config.seed == 0 and copied.name == "cfrl"


def test_data_sets(base):
    """law: a datasets.Dataset gives the rows of a list, whose file has the digest as its name."""
    from ntkrl.api.rows import path_in_run, read_rows

    file, same = read_rows(Split(), "prompts"), read_rows(ROWS, "prompts")
    assert file.content == same.content and isinstance(file, data.RowFile)
    assert re.fullmatch(r"runs/x/data/prompts-[0-9a-f]{12}\.jsonl", path_in_run(file, "runs/x"))


def test_public_names():
    """law: the package shows its calls and nothing else, without loading JAX."""
    names = ["Run", "Steps", "build", "evaluate", "export", "kernels", "load", "load_scorer"]
    names += ["ntk", "open_run", "train"]
    assert dir(ntkrl) == names
    program = f"import sys, ntkrl; assert dir(ntkrl) == {names}; assert 'jax' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
    for name in names:
        assert inspect.getdoc(getattr(ntkrl, name))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = ntkrl.trian


@pytest.mark.parametrize("changes", [{"eval.prompts": 2}, {"eval": {"prompts": 2}}])
def test_evaluations_of_a_part(base, changes, monkeypatch):
    """by hand: `eval.prompts` counts in both forms of `config`; all 81 prompts without it."""
    from ntkrl.api import front

    settings = []
    monkeypatch.setattr(front.commands, "evaluate", lambda values, **_: settings.append(values))
    ntkrl.evaluate(base, ROWS, score, config=changes)
    ntkrl.evaluate(base, ROWS, score)
    assert [values.eval.prompts for values in settings] == [2, 81]  # nested ones were ignored: 81


def test_a_model_in_memory_in_two_processes(base, tmp_path, monkeypatch):
    """law: every process takes part in an export that process 0 lacks, and waits for its end."""
    from ntkrl.api import model_files

    policy, params = ntkrl.load(base)
    changed = {**params, "head": {"weight": params["head"]["weight"] * 0.5}}
    exchanges, exports = [], []

    def exchange(name, value=None):
        exchanges.append((name, len(exports)))
        return [False, value]  # of process 0, and of this one

    monkeypatch.setattr(model_files.runtime, "allgather_object", exchange)
    monkeypatch.setattr(model_files.models, "export", lambda *arguments: exports.append(arguments))
    directory = model_files.export_start(policy, changed, str(tmp_path))
    assert directory == exports[0][0].as_posix()
    exports[0][0].mkdir()  # process 0 was faster
    model_files.export_start(policy, changed, str(tmp_path))
    assert len(exports) == 2 and [count for _, count in exchanges] == [0, 1, 1, 2]


def test_values_of_other_steps(base):
    """by hand: what no function returned, and a position whose arrays are gone."""
    settings = {"data.prompts_per_step": 4, "data.max_prompt_tokens": 8}
    sizes = {"rollout.max_completion_tokens": 5, "probe.every_steps": None}
    steps = ntkrl.Steps(base, ROWS, score, steps=1, run_dir="s", config={**settings, **sizes})
    start = steps.start()
    at = steps.begin(start)
    for call, words in (
        (lambda: steps.sample(start), "at has begun no rollout step; pass the position that b"),
        (lambda: steps.left(3), "left: at is 3 (int); pass the position that start, begin"),
        (lambda: steps.reward(at, None), "reward: sampled is None; pass what sample returned"),
        (lambda: steps.reward(at, at), "(RunPosition); pass what sample returned"),
        (lambda: steps.advantages(at, [1.0]), "rewarded is [1.0] (list); pass what reward ret"),
        (lambda: steps.update(at, at, 3), "data is 3 (int); pass the second value that advan"),
        (lambda: steps.ledger(None), "ledger: reading is None; pass what probe returned"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            call()
    rewarded = steps.reward(at, steps.sample(at))
    after, step = steps.advantages(at, rewarded)
    assert steps.snapshot(after, step.batches[0], step) is None
    after, result = steps.update(after, step.batches[0], step, None)
    steps.summary(after, [result])
    for leaf in jax.tree.leaves(at.state.params):
        leaf.delete()  # as an accelerator does with what it was given
    with pytest.raises(ValueError, match="at was donated to update; pass the position that upd"):
        steps.sample(at)
