"""Classifier-first RL on the quickstart's base model; as many rollouts as plain RL.

Command: ntkrl train --config=quickstart/cfrl
"""

from ntkrl.configs import base
from ntkrl.configs.quickstart import rl


def get_config():
    """Return the config."""
    config = rl.get_config()
    config.name = "cfrl"
    config.run_dir = "runs/quickstart/cfrl-0"
    config.stages = (
        base.stage("classifier", 50, (("head/.*", 1e-3), (".*", None))),
        base.stage("all", 150, ((".*", 3e-4),)),
    )
    return config
