"""Supervised training of your model on prompts with completions.

Command:
    ntkrl train --config=sft --model=DIR --data=pairs.jsonl
Rows have "prompt" and "completion", in TRL's standard or conversational format.
"""

from ml_collections.config_dict import placeholder

from ntkrl.configs import base


def get_config():
    """Return the config."""
    config = base.get_config()
    config.name = "sft"
    config.run_dir = "runs/sft"
    config.method = "sft"
    config.data.prompts_per_step = 32
    config.stages = (base.stage("all", 200, ((".*", 1e-5),)),)
    config.eval.every_steps = placeholder(int)
    config.probe.every_steps = placeholder(int)
    config.probe.ledger_every_steps = placeholder(int)
    return config
