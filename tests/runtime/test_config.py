"""Config files and overrides: valid forms, and messages for mistakes."""

import json

import pytest

from ntkrl import runtime
from ntkrl.runtime.config import differences
from ntkrl.settings import read_settings


def read(*words):
    """Read the default config with a model, a reward and overrides."""
    return runtime.read_config(
        [
            "--config=configs/base.py",
            "--config.reward.function=expressions",
            "--config.model.path=somewhere",
            *words,
        ]
    )


def test_overrides_reach_sections():
    """story: dotted overrides, of stages too, arrive as typed settings."""
    config = read(
        "--config.seed=3",
        "--config.data.prompts_per_step=4",
        "--config.objective.preset=grpo",
        "--config.objective.kl_coefficient=0.0",
        "--config.stages[0].steps=7",
    )
    result = read_settings(config)
    assert (result.seed, result.data.prompts_per_step, result.stages[0].steps) == (3, 4, 7)
    # 0.0 is a value, not "unset": the preset's 0.04 must not come back
    assert (result.objective.kl_coefficient, result.objective.kl_place) == (0.0, "loss")


def test_config_after_a_blank():
    """Law: `--config FILE` is `--config=FILE`."""
    result = runtime.read_config(["--config", "configs/base.py", "--config.seed=4"])
    assert result.seed == 4


def test_round_trip_through_json():
    """law: a config read back from config.json gives the same settings."""
    config = read()
    values = runtime.to_json(config)
    assert runtime.to_json(runtime.from_json(values)) == values
    again, first = read_settings(runtime.from_json(values)), read_settings(config)
    assert again.model == first.model and again.objective == first.objective
    assert again.stages[0].name == first.stages[0].name


@pytest.mark.parametrize(
    "words,message",
    [
        ([], "--config=NAME is missing"),
        (["--config=configs/nope.py"], "configs/nope.py: no such file"),
        (
            ["--config=configs/base.py", "--config.modle.path=x"],
            "did you mean '--config.model.path'",
        ),
        (
            ["--config=configs/base.py", "--config.model.paht=x"],
            "did you mean '--config.model.path'",
        ),
        (["--config=configs/base.py", "--config.seed=two"], "seed"),
        (
            ["--config=configs/base.py", "--config.sed=2", "--config.data.pth=x"],
            "config.sed does not exist.*\n.*config.data.pth does not exist.*config.data.path'",
        ),
        (["--config=configs/base.py", "--config.stages[3].steps=2"], r"stages has 1 rows?, up to"),
        (
            ["--config=configs/base.py", "--config.temperature=2"],  # of two sections
            "did you mean '--config.eval.temperature' or '--config.rollout.temperature'",
        ),
        (
            ["--config=configs/base.py", "--config.eval.sample=2"],  # the start of a name
            "did you mean '--config.eval.samples_per_prompt'",
        ),
        (["--config=configs/base.py", "--config.stages[0].stepz=2"], r"stages\[0\].steps'"),
        (["--config=configs/base.py", "--config.stages.steps=2"], r"the first by .*stages\[0\].st"),
        (["--config=configs/base.py", "--config.stages[a].steps=2"], "numbered from 0, as --conf"),
        (["--config=configs/base.py", "--config.stages[-5].steps=2"], "stages has 1 rows?, up to"),
        (["--config=configs/base.py", "--config.rollout=1"], "is a section; name a setting in it"),
        (["--config=configs/base.py", "--config.stages[0]=1"], "is a row; name a setting in it"),
        (["--config=configs/base.py", "train"], "train is not a flag"),
        (["--config=configs/base.py", "--confg.seed=1"], "confg"),
    ],
)
def test_mistakes_on_the_command_line(words, message):
    """law: the message names the key or the file, with the nearest known one."""
    with pytest.raises(ValueError, match=message):
        runtime.read_config(words)


def test_a_config_file_that_is_not_python(tmp_path):
    """law: a syntax error in a config is a message, not a trace."""
    path = tmp_path / "bad.py"
    path.write_text("def get_config(:\n")
    with pytest.raises(ValueError, match="bad.py is not valid Python"):
        runtime.read_config([f"--config={path}"])


def test_problems_of_all_sections_at_once():
    """law: one message has the problems of every section."""
    config = read(
        "--config.model.dtype=int8",
        "--config.objective.preset=rlo",
        "--config.schedule.minibatches=0",
        "--config.stages[0].optimizer=lion",
        "--config.method=rlhf",
    )
    with pytest.raises(ValueError) as caught:
        read_settings(config)
    text = str(caught.value)
    for part in (
        "model.dtype 'int8' is not among",
        "objective.preset 'rlo' is not among cispo, dapo, dr_grpo",
        "schedule.minibatches must be ≥ 1",
        "optimizer 'lion' is not among",
        "method 'rlhf' is not among rl, sft",
    ):
        assert part in text, part


def test_unknown_and_missing_fields():
    """law: a misspelt field in a section of a config file is named."""
    config = read()
    with config.unlocked():
        config.rollout.temprature = 1.0
        del config.rollout["temperature"]
    with pytest.raises(ValueError, match="rollout.temprature does not exist; did you mean 'temp"):
        read_settings(config)
    with pytest.raises(ValueError, match="rollout.temperature is missing"):
        read_settings(config)


@pytest.mark.parametrize("values", [("3", "None", "5"), ("None", "5", "None"), ("5", "5")])
def test_the_last_of_several_values_counts(values):
    """law: as of every other flag, also where one of them is None."""
    config = read(*(f"--config.eval.every_steps={value}" for value in values))
    assert str(config.eval.every_steps) == values[-1]


def test_none_on_the_command_line():
    """law: None turns off settings that can be turned off; others are refused by name."""
    settings = read_settings(
        read(
            "--config.eval.every_steps=None",
            "--config.stages[0].max_grad_norm=None",
            "--config.model.path=m",
            "--config.reward.function=expressions",
        )
    )
    assert settings.evaluation.every_steps is None and settings.stages[0].max_grad_norm is None
    with pytest.raises(ValueError, match="rollout.temperature must not be None"):
        read_settings(read("--config.rollout.temperature=None"))
    with pytest.raises(ValueError, match="seed"):
        read("--config.seed=None")


def test_differences_names_fields():
    """by hand: nested, changed, absent."""
    saved, requested = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "e": 4}
    assert differences(saved, requested) == [
        "a.c: 2 -> 5",
        "d: 3 -> '(absent)'",
        "e: '(absent)' -> 4",
    ]


def test_logging_may_change_on_resume(tmp_path):
    """law: a run is resumed with other loggers, as it was begun otherwise in no setting at all."""
    runtime.claim_run_dir(tmp_path, runtime.to_json(read()))
    other = runtime.to_json(read("--config.logging.tensorboard=True", "--config.logging.wandb=p"))
    assert runtime.check_run_dir(tmp_path, other)
    runtime.claim_run_dir(tmp_path, other)
    assert json.loads((tmp_path / "config.json").read_text()) == other
    other["probe"]["prompts"] = 3
    with pytest.raises(ValueError, match=r"another config: probe.prompts: 8 -> 3\. Undo these"):
        runtime.check_run_dir(tmp_path, other)


@pytest.mark.parametrize(
    "word,message",
    [
        ("aliases=tlr", "logging.aliases 'tlr' is not among trl, trl012, verl"),
        ("aliases=trl", "logging.aliases needs logging.tensorboard, logging.wandb or"),
        ("wandb=", "logging.wandb is empty"),
    ],
)
def test_logging_mistakes(word, message):
    """law: a destination that cannot be written is an error before the run."""
    with pytest.raises(ValueError, match=message):
        read_settings(read(f"--config.logging.{word}"))


def test_checkpoint_mistakes():
    """law: all impossible retention and ranking settings are errors before the run."""
    with pytest.raises(ValueError) as caught:
        read_settings(
            read(
                "--config.checkpoint.keep_best=0",
                "--config.checkpoint.best_metric=rewrad",
                "--config.checkpoint.best_mode=most",
            )
        )
    for part in ("keep_best must be ≥ 1, not 0", "'rewrad' is not a metric", "max, min or None"):
        assert part in str(caught.value)
    never = ["--config.eval.every_steps=None", "--config.checkpoint.best_metric=eval/reward"]
    with pytest.raises(ValueError, match="'eval/reward' is never measured"):
        read_settings(read(*never, "--config.checkpoint.keep_best=1"))


def test_ranking():
    """by hand: the metric that ranks checkpoints if the config does not set one."""
    sft = read_settings(read("--config.checkpoint.keep_best=2")).checkpoint
    assert sft.ranking("loss") == runtime.Best(2, "loss", "min")
    assert sft.ranking("reward") == runtime.Best(2, "reward", "max")
    arguments = ["--config.checkpoint.best_metric=kl", "--config.checkpoint.best_mode=min"]
    other = read_settings(read("--config.checkpoint.keep_best=1", *arguments)).checkpoint
    assert other.ranking("reward") == runtime.Best(1, "kl", "min")
    assert read_settings(read()).checkpoint.ranking("reward") is None


@pytest.mark.parametrize("name", ["sft", "paper/sft", "paper/reward", "quickstart/base"])
def test_what_a_config_turns_off_can_be_turned_on(name):
    """by hand: probes that a config leaves out are requested on the command line."""
    word = f"--config=configs/{name}.py"
    assert runtime.read_config([word]).probe.every_steps is None
    assert runtime.read_config([word, "--config.probe.every_steps=3"]).probe.every_steps == 3
