"""RL of your model on your prompts: RLOO on all parameters.

Command:
    ntkrl train --config=rl --model=DIR --data=prompts.jsonl --reward=my_rewards.py:score
Hardware: one or several GPUs, or a CPU for small models; the mesh uses all devices.
"""

from ntkrl.configs import base


def get_config():
    """Return the config."""
    config = base.get_config()
    config.name = "rl"
    config.run_dir = "runs/rl"
    config.stages = (base.stage("all", 200, ((".*", 1e-6),)),)  # TRL's default rate
    return config
