"""RL on a pretrained model: RLOO on all parameters.

Command: bash launch/pretrained.sh
"""

from ntkrl.configs import base as defaults
from ntkrl.configs.pretrained import base


def get_config():
    """Return the config."""
    config = base.get_config()
    config.name = "rl"
    config.run_dir = f"{base.RUNS}/rl"
    config.stages = (defaults.stage("all", base.STEPS, ((".*", base.RATE),)),)
    return config
