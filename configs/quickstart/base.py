"""A small GPT-NeoX base model for the built-in task, by supervised training.

Command: ntkrl train --config=quickstart/base
Hardware: two CPU cores.
"""

from ml_collections.config_dict import placeholder

from ntkrl.configs import base


def get_config():
    """Return the config."""
    config = base.get_config()
    config.name = "base"
    config.run_dir = "runs/quickstart/base"
    config.method = "sft"
    config.model.new.hidden_size = 96
    config.model.new.intermediate_size = 384
    config.model.new.num_hidden_layers = 2
    config.reward.function = "expressions"
    config.data.examples = 60_000
    config.data.prompts_per_step = 128
    config.data.max_prompt_tokens = 8
    config.rollout.max_completion_tokens = 12
    row = base.stage("all", 1800, ((".*", 3e-3),))
    row.b2 = 0.95
    config.stages = (row,)
    config.checkpoint.every_steps = 100
    config.eval.every_steps = 600
    config.eval.samples_per_prompt = 16
    config.eval.repeats = 4
    config.probe.every_steps = placeholder(int)
    config.probe.ledger_every_steps = placeholder(int)
    return config
