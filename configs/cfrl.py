"""Classifier-first RL: policy gradient on the head alone, then on all parameters.

Command: as configs/rl.py, with --config=cfrl.
Length and learning rate of the first stage are our choice: we do not know the paper's. With
plateau_window=10 in the first stage it ends when the reward stops rising; with
optimizer_state="keep" in the second the head keeps its moments.
"""

from ntkrl.configs import base, rl


def get_config():
    """Return the config."""
    config = rl.get_config()
    config.name = "cfrl"
    config.run_dir = "runs/cfrl"
    config.stages = (
        base.stage("classifier", 40, (("head/.*", 1e-5), (".*", None))),
        base.stage("all", 160, ((".*", 1e-6),)),
    )
    return config
