"""Classifier-first RL on a pretrained model; as many rollouts as plain RL.

Command: bash launch/pretrained.sh
"""

from ntkrl.configs import base as defaults
from ntkrl.configs.pretrained import base


def get_config():
    """Return the config."""
    config = base.get_config()
    config.name = "cfrl"
    config.run_dir = f"{base.RUNS}/cfrl"
    rest = base.STEPS - base.CLASSIFIER_STEPS
    config.stages = (
        defaults.stage("classifier", base.CLASSIFIER_STEPS, (("head/.*", 1e-4), (".*", None))),
        defaults.stage("all", rest, ((".*", base.RATE),)),
    )
    return config
