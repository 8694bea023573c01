"""The study of the paper's claims on a pretrained model: lists by category, SmolLM2-135M.

Commands (the first fetches the model):
    bash launch/pretrained.sh
    ntkrl study --config=pretrained/study
    ntkrl study --config=pretrained/study:gpu
Hardware: two CPU cores; with `:gpu`, which has more steps and seeds, one GPU.

As `configs/study.py`, with one starting model for all seeds, which differ in prompts and samples.
Of the training categories every fourth chooses rates; the test categories are used for no choice.
The head is untied from the embedding (`smollm2`), so that both methods have the same parameters,
except in the arms `tied_…`. Grids, lengths and rates of controls are our choice.
"""

from ml_collections import ConfigDict

from ntkrl.configs import base as defaults
from ntkrl.configs.evidence.run_words import read_run_words
from ntkrl.configs.pretrained import base

SIZE = "smollm2"
STEPS = 20
GPU = {
    "run_dir": "runs/pretrained-study-gpu",
    "jobs": 1,
    "seeds": tuple(range(1, 11)),
    "control_seeds": 6,
    "steps": 100,
}
"""Settings of the variant for a GPU."""


def get_config(variant=None):
    """Return the plan of the study, of its variant "gpu", or the config of one run of it."""
    if variant in (None, "gpu"):
        return _plan({} if variant is None else GPU)
    return _run(variant)


def get_study(config, file):
    """Return the study that `ntkrl study` runs: its phases of runs, and its page of verdicts."""
    from ntkrl import runtime
    from ntkrl.configs.evidence.arm_study import StudySettings
    from ntkrl.configs.evidence.pretrained_study import PretrainedStudy

    settings = runtime.parse_section(StudySettings, config, "study")
    return PretrainedStudy(settings, file)


def _plan(changes):
    plan = ConfigDict(
        {
            "run_dir": "runs/pretrained-study",
            "jobs": 2,  # runs at a time, each on separate cores
            "seeds": (1, 2, 3, 4, 5, 6),
            "tuning_seeds": (101,),
            "control_seeds": 3,
            "steps": STEPS,
            "task": "lists",
            "samples": 16,
            "tuned": SIZE,
            "scales": {SIZE: 1.0},
            "fields": {"model": f"{base.RUNS}/model.gguf"},
        }
    )
    plan.arms = ConfigDict({SIZE: tuple(ARMS)})
    plan.grids = ConfigDict(
        {
            "rl": {"body": (1e-5, 2e-5, 4e-5, 8e-5, 1.6e-4, 3.2e-4)},
            "cfrl": {"head": (1e-4, 3e-4), "body": (2e-5, 4e-5, 8e-5)},
        }
    )
    plan.step_rates = ConfigDict({"adam": (3e-6, 1e-5, 3e-5, 1e-4)})
    plan.update(changes)
    return plan


def _run(text):
    """Read `SIZE/ARM,key=value,…` with seed, root, steps, samples, model, part and rates."""
    known = {"seed": 1, "root": "runs/pretrained-study", "steps": STEPS, "samples": 16}
    known |= {"model": "", "head": 3e-4, "body": 2e-5, "part": "test"}
    _, arm, values = read_run_words(text, (SIZE,), ARMS, known)
    config = _rl(arm, values)
    ARMS[arm](config, values)
    config.name, config.seed = arm, values["seed"]
    return config


def _rl(arm, values):
    """Return plain RL."""
    config, steps, root = base.get_config(), values["steps"], values["root"]
    config.run_dir = f"{root}/{SIZE}/{arm}-{values['seed']}"
    config.model.path = f"{root}/model"
    config.data.path = f"{root}/data/train.jsonl"
    config.data.eval_path = f"{root}/data/{values['part']}.jsonl"
    config.stages = (defaults.stage("all", steps, ((".*", values["body"]),)),)
    config.checkpoint.every_steps = max(steps, 1)
    config.eval.every_steps = max(steps // 2, 1)
    config.eval.samples_per_prompt, config.eval.repeats = values["samples"], 1
    config.probe.every_steps = max(steps // 3, 1)
    config.probe.prompts = 8
    if values["part"] == "test":
        config.eval.base = _base_samples(values)
    return config


def _base_samples(values):
    """Return the samples of the starting model on the test categories."""
    place = f"{values['root']}/{SIZE}/base-{values['seed']}"
    return f"{place}/test/evaluations/base-{values['seed']}.jsonl"


def _unchanged(config, values):
    pass


def _classifier_first(rest, head=r"head/.*"):
    """Return the change to a quarter of the steps on the head, then `rest` of them on all."""

    def change(config, values):
        steps = values["steps"]
        rates = ((head, values["head"]), (r".*", None))
        config.stages = (
            defaults.stage("classifier", max(steps // 4, 1), rates),
            defaults.stage("all", max(int(rest * steps), 1), ((r".*", values["body"]),)),
        )

    return change


def _whitened(directions):
    def change(config, values):
        config.model.whiten = _base_samples(values)
        config.model.whiten_directions = directions
        rates = (("whitening/.*", None), (".*", values["body"]))
        config.stages = (defaults.stage("all", values["steps"], rates),)

    return change


def _signs(which):
    def change(config, values):
        config.objective.signs = which

    return change


def _supervised(config, values):
    config.method = "sft"
    config.data.path = f"{values['root']}/data/supervised.jsonl"
    config.data.prompts_per_step = 16
    config.eval.base = None


def _supervised_first(config, values):
    _supervised(config, values)
    _classifier_first(0.75)(config, values)


def _tied(config, values):
    config.model.untie = False


def _tied_first(config, values):
    """Train the matrix that is both embedding and head, then everything."""
    _tied(config, values)
    _classifier_first(0.75, r"embed/.*")(config, values)


def _one_step(config, values):
    """Take one unclipped step of Adam; its first-order error grows with the rate."""
    row = defaults.stage("all", 1, ((".*", values["body"]),), max_grad_norm=None)
    config.stages = (row,)
    config.eval.base = None
    config.eval.prompts, config.eval.samples_per_prompt = 1, 1
    config.probe.every_steps = 1


ARMS = {
    "rl": _unchanged,
    "cfrl": _classifier_first(0.75),
    "cfrl_more": _classifier_first(1.0),  # as many full steps as RL
    "whitened": _whitened("all"),
    "shrunk": _whitened("mean"),
    "negative": _signs("negative"),
    "positive": _signs("positive"),
    "sft": _supervised,
    "sft_first": _supervised_first,
    "tied_rl": _tied,
    "tied_cfrl": _tied_first,
    "adam": _one_step,
}
