"""The study: the paper's claims, each with a number, on models that two CPU cores can train.

Command:
    ntkrl study --config=study
    ntkrl study --config=study:gpu
One of its runs alone (the study prints and stores all of these commands):
    ntkrl train --config=study:small/cfrl,seed=1,head=1e-3,body=3e-4
Hardware: two CPU cores; with `:gpu`, which has four sizes and more seeds, one GPU.

Two tasks. "Expressions" (built in): the reward checks if a completion evaluates to its target. Of
the 30 training targets, 6 are set aside for choosing learning rates; the 10 test targets are never
used for a choice. "rlhf": a reward model is trained on pairs of the base model's completions,
labelled by the reward of the expressions; RL uses the reward model alone.

Every seed trains a separate base model, so that intervals cover all randomness. All lengths, sizes
and grids are our choice. Learning rates of RL and of CF-RL are chosen from grids of equal size, on
separate seeds, by the reward on the targets set aside; other arms use RL's.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ntkrl.configs import base
from ntkrl.configs.evidence.run_words import read_run_words
from ntkrl.configs.quickstart import base as quickstart_base
from ntkrl.configs.quickstart import rl as quickstart_rl

SIZES = {  # hidden size, layers: 0.33, 1.8, 6.4 and 11 million parameters
    "small": (96, 3),
    "medium": (192, 4),
    "large": (320, 5),
    "larger": (384, 6),
}
STEPS, BASE_STEPS = 200, 1800
GPU = {"run_dir": "runs/study-gpu", "jobs": 1, "seeds": tuple(range(1, 11))}
"""Settings of the variant for a GPU, beside its sizes."""


def get_config(variant=None):
    """Return the plan of the study, of its variant "gpu", or the config of one run of it."""
    if variant in (None, "gpu"):
        return _plan({} if variant is None else GPU)
    return _run(variant)


def get_study(config, file):
    """Return the study that `ntkrl study` runs: its phases of runs, and its page of verdicts."""
    from ntkrl import runtime
    from ntkrl.configs.evidence.arm_study import StudySettings
    from ntkrl.configs.evidence.paper_study import PaperStudy

    settings = runtime.parse_section(StudySettings, config, "study")
    return PaperStudy(settings, file)


def _plan(changes):
    plan = ConfigDict(
        {
            "run_dir": "runs/study",
            "jobs": 2,  # runs at a time, each on separate cores
            "seeds": (1, 2, 3, 4, 5, 6),  # a sign-flip test of five cannot reach p = 0.05
            "tuning_seeds": (101, 102),
            "steps": STEPS,
            "task": "expressions",
            "fields": {"base_steps": BASE_STEPS},
            "control_seeds": placeholder(int),
            "samples": 64,  # of a test prompt; an evaluation draws them twice
            "tuned": "small",  # where rates are chosen
            # factor on them, inverse to the width
            "scales": {size: SIZES["small"][0] / width for size, (width, _) in SIZES.items()},
        }
    )
    larger = [size for size in SIZES if size != "small"] if changes else ["medium"]
    plan.arms = ConfigDict(
        {
            "small": tuple(name for name in ARMS if name not in PREPARED),
            **dict.fromkeys(larger, ("rl", "cfrl")),
        }
    )
    # rates by grid: equally many points for both
    plan.grids = ConfigDict(
        {
            "rl": {"body": (5e-5, 1e-4, 1.5e-4, 2e-4, 3e-4, 4e-4, 5e-4, 7e-4, 1e-3)},
            "cfrl": {"head": (1e-3, 3e-3, 1e-2), "body": (2e-4, 3e-4, 5e-4)},
        }
    )
    rates = (0.003, 0.01, 0.03, 0.1)
    plan.step_rates = ConfigDict({"sgd": rates, "sgd_head": rates})
    plan.update(changes)
    return plan


def _run(text):
    """Read `SIZE/ARM,key=value,…` with seed, root, steps, base_steps, samples and rates."""
    known = {"seed": 1, "root": "runs/study", "steps": STEPS, "base_steps": BASE_STEPS}
    known |= {"samples": 64, "head": 1e-3, "body": 3e-4, "part": "test"}
    size, arm, values = read_run_words(text, SIZES, ARMS, known)
    config = ARMS[arm](size, values)
    config.name, config.seed = arm, values["seed"]
    return config


def _place(size, values, arm):
    return f"{values['root']}/{size}/{arm}-{values['seed']}"


def base_model(size, values):
    """Return the base model's supervised run."""
    config = quickstart_base.get_config()
    config.run_dir = _place(size, values, "base")
    width, layers = SIZES[size]
    config.model.new.hidden_size, config.model.new.intermediate_size = width, 4 * width
    config.model.new.num_hidden_layers = layers
    # larger models need fewer steps
    steps = values["base_steps"] if size == "small" else 2 * values["base_steps"] // 3
    config.stages[0].steps = max(steps, 1)
    config.eval.every_steps = max(steps, 1)
    config.eval.repeats = 1
    return config


def reward_model(size, values):
    """Return the reward model's run, on pairs of the base model's completions."""
    config = base.get_config()
    config.method = "reward"
    config.run_dir = _place(size, values, "reward")
    config.model.path = f"{_place(size, values, 'base')}/export"
    config.data.path = f"{_place(size, values, 'data')}/preferences.jsonl"
    config.data.prompts_per_step = 32
    config.stages = (base.stage("all", 2 * values["steps"], ((".*", 3e-4),)),)
    config.eval.every_steps = max(values["steps"] // 4, 1)
    config.eval.prompts = 256
    config.probe.every_steps = placeholder(int)
    config.probe.ledger_every_steps = placeholder(int)
    return config


def rl(size, values):
    """Return plain RL: RLOO on everything."""
    config, steps = quickstart_rl.get_config(), values["steps"]
    config.run_dir = _place(size, values, "rl")
    config.model.path = f"{_place(size, values, 'base')}/export"
    data = f"{values['root']}/data"
    config.data.path, config.data.eval_path = (
        f"{data}/train.jsonl",
        f"{data}/{values['part']}.jsonl",
    )
    config.data.prompts_per_step = 12  # half of the training targets
    config.stages = (base.stage("all", steps, ((".*", values["body"]),)),)
    config.checkpoint.every_steps = max(steps, 1)
    config.eval.every_steps = max(steps // 8, 1)
    config.eval.samples_per_prompt, config.eval.repeats = values["samples"], 2
    config.probe.every_steps = max(steps // 20, 1)
    config.probe.ledger_every_steps = max(steps // 4, 1)
    config.probe.kernel_every_steps = None
    if values["part"] == "test":
        config.eval.base = (
            f"{_place(size, values, 'base')}/test/evaluations/base-{values['seed']}.jsonl"
        )
    return config


def _arm(name, change=lambda config, values: None, of=rl):
    """Return an arm: another run, with a change and a separate directory."""

    def arm(size, values):
        config = of(size, values)
        config.run_dir = _place(size, values, name)
        change(config, values)
        return config

    return arm


def _classifier_first(first, rest):
    """Return the change to `first` of the steps on the head, then `rest` of them on everything."""

    def change(config, values):
        steps, head = values["steps"], ((r"head/.*", values["head"]), (r".*", None))
        config.stages = (
            base.stage("classifier", max(int(first * steps), 1), head),
            base.stage("all", max(int(rest * steps), 1), ((r".*", values["body"]),)),
        )

    return change


def _preset(name):
    def change(config, values):
        config.objective.preset = name

    return change


def _signs(which):
    def change(config, values):
        config.objective.signs = which

    return change


def _whitened(config, values):
    place = config.model.path.removesuffix("/export")
    config.model.whiten = f"{place}/train/evaluations/base-{values['seed']}.jsonl"
    rates = (("whitening/.*", None), (".*", values["body"]))
    config.stages = (base.stage("all", values["steps"], rates),)


def _learned_reward(config, values):
    learned = config.model.path.replace("/base-", "/reward-")
    config.reward.function = f"{learned},expressions"
    config.reward.weights = (1.0, 0.0)  # the true reward is logged, but RL does not see it
    config.eval.base = None  # separate evaluations compare by the true reward


def _supervised(config, values):
    """Train on right answers of a single form, which the base model has not seen."""
    config.method = "sft"
    config.data.path = f"{values['root']}/data/supervised.jsonl"
    config.data.prompts_per_step = 96
    config.eval.base = None


def _supervised_first(config, values):
    _supervised(config, values)
    _classifier_first(0.25, 0.75)(config, values)


def _one_step(parameters):
    """Return the change to one unclipped step of SGD; its first-order error grows with the rate."""

    def change(config, values):
        rates = tuple((name, values["body"] if moves else None) for name, moves in parameters)
        row = base.stage("all", 1, rates, optimizer="sgd", max_grad_norm=None)
        config.stages = (row,)
        config.eval.base = None
        config.eval.prompts, config.eval.samples_per_prompt, config.eval.repeats = 1, 1, 1
        config.probe.every_steps = 1
        config.probe.ledger_every_steps = placeholder(int)

    return change


PREPARED = {"base": base_model, "reward": reward_model}
ARMS = {
    **PREPARED,
    "rl": rl,
    "cfrl": _arm("cfrl", _classifier_first(0.25, 0.75)),
    "cfrl_short": _arm("cfrl_short", _classifier_first(0.05, 0.95)),
    "cfrl_long": _arm("cfrl_long", _classifier_first(0.5, 0.5)),
    "cfrl_more": _arm("cfrl_more", _classifier_first(0.25, 1.0)),  # as many full steps as RL
    "grpo": _arm("grpo", _preset("grpo")),
    "reinforce": _arm("reinforce", _preset("reinforce")),
    "whitened": _arm("whitened", _whitened),
    "negative": _arm("negative", _signs("negative")),
    "positive": _arm("positive", _signs("positive")),
    "sft": _arm("sft", _supervised),
    "sft_first": _arm("sft_first", _supervised_first),
    "rlhf": _arm("rlhf", _learned_reward),
    "rlhf_first": _arm("rlhf_first", _learned_reward, of=_arm("", _classifier_first(0.25, 0.75))),
    "sgd": _arm("sgd", _one_step(((".*", True),))),
    "sgd_head": _arm("sgd_head", _one_step((("head/.*", True), (".*", False)))),
}
