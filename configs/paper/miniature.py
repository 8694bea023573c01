"""The paper's recipe in miniature: tiny models and synthetic data, seconds per part.

Commands, after `python -m ntkrl.configs.paper.made_up runs/miniature/inputs`:
    ntkrl prepare --config=paper/miniature:data
    ntkrl train --config=paper/miniature:sft
    ntkrl train --config=paper/miniature:rl:pythia-1b
or all parts by `MINIATURE=1 bash launch/paper.sh`. The argument is PART or PART:VARIANT. Values
that are not set below are those of configs/paper/PART.py.
Hardware: any CPU. Expected time: minutes for all parts, most of it compilation.
"""

from ml_collections.config_flags import config_path

from ntkrl.configs.paper import base, cfrl, data, evaluation, grpo, reward, rl, sft

RUNS = "runs/miniature"
INPUTS = f"{RUNS}/inputs"  # written by configs/paper/made_up.py

PARTS = {
    "data": data,
    "sft": sft,
    "reward": reward,
    "rl": rl,
    "grpo": grpo,
    "cfrl": cfrl,
    "evaluation": evaluation,
}
COMMON = {
    "data.max_prompt_tokens": 32 + base.TURNS,
    "rollout.max_completion_tokens": 8,
    "eval.prompts": 4,
    "eval.samples_per_prompt": 2,
    "checkpoint.every_steps": 2,
}
PUBLISHED = f"{INPUTS}/ultrafeedback_binarized"
DATA = {
    "reward.function": f"{INPUTS}/reward",
    "reward.batch_size": 16,
    "prepare.preferences": f"{PUBLISHED}/train_prefs",
    "prepare.test": f"{PUBLISHED}/test_prefs",
    "prepare.max_tokens": 32,
    "prepare.selected": 4,
}
SFT = {"data.prompts_per_step": 8, "rollout.max_completion_tokens": 32 + 1}
REWARD = {"model.path": f"{RUNS}/sft/export", "data.prompts_per_step": 8}
RL = {
    "reward.function": f"{INPUTS}/reward",
    "probe.every_steps": 4,
    "probe.prompts": 2,
    "model.path": f"{RUNS}/sft/export",
    "data.prompts_per_step": 4,
}
SMALL = {"data": DATA, "sft": SFT, "reward": REWARD, "grpo": {**RL, "data.prompts_per_step": 2}}
RUN_FILES = ("run_dir", "data.path", "data.eval_path", "reward.normalisation")


def get_config(argument="rl"):
    """Return the config of a part, of one of the variants of configs/paper/base.py."""
    part, _, variant = argument.partition(":")
    variant = variant or "pythia-2.8b"
    if part not in PARTS:
        raise ValueError(f"{part!r} is not a part of the recipe; known: {', '.join(PARTS)}.")
    config = PARTS[part].get_config(variant)
    llama = variant.startswith("llama")
    values = {"model.path": f"{INPUTS}/{'llama' if llama else 'pythia'}", **COMMON}
    values |= SMALL.get(part, RL)
    if part == "sft":
        values["model.vocab_size"] = 264 if llama else None
    if part == "data" and config.prepare.supervised is not None:
        values["prepare.supervised"] = f"{INPUTS}/alpaca_farm/sft"
    for name in RUN_FILES:
        value = config_path.get_value(name, config)
        if isinstance(value, str):
            values[name] = value.replace(f"{base.VARIANTS[variant].runs}/", f"{RUNS}/")
    with config.ignore_type():
        for name, value in values.items():
            config_path.set_value(name, config, value)
    return config
