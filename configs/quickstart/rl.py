"""RL on the quickstart's base model: RLOO on all parameters.

Command: ntkrl train --config=quickstart/rl
"""

from ntkrl.configs import base


def get_config():
    """Return the config."""
    config = base.get_config()
    config.name = "rl"
    config.run_dir = "runs/quickstart/rl-0"
    config.model.path = "runs/quickstart/base/export"
    config.reward.function = "expressions"
    config.data.prompts_per_step = 15
    config.data.max_prompt_tokens = 8
    config.rollout.max_completion_tokens = 12
    config.stages = (base.stage("all", 200, ((".*", 3e-4),)),)
    config.checkpoint.every_steps = 50
    config.eval.every_steps = 20
    config.eval.samples_per_prompt = 32
    config.eval.repeats = 8
    config.probe.every_steps = 10
    config.probe.kernel_every_steps = 100
    return config
