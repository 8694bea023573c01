"""Classifier-first RL: policy gradient on the head alone, then on everything.

Command: as configs/rl.py, with --config=configs/cfrl.py.
The length and rate of the first stage are our choice: the paper's are not known here. With
plateau_window=10 in the first row it ends where the reward stops rising, with
optimizer_state="keep" in the second the head goes on with its moments.
"""

from configs import base, rl


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
