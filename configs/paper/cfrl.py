"""Classifier-first RL: the unembedding alone, then everything.

Command: as configs/paper/rl.py, with --config=configs/paper/cfrl.py.
From the paper: the two stages. Our choice: length and rate of the first, which are not known here;
its rate is ten times the second's, and both together take the baseline's six epochs.
"""

from configs.paper import base, rl


def get_config():
    """Return the config."""
    config = rl.get_config()
    config.name = "paper-cfrl"
    config.run_dir = "runs/paper/cfrl"
    config.stages = (
        base.stage("classifier", (("head/.*", 1e-6), (".*", None)), epochs=1.0),
        base.stage("all", ((".*", 1e-7),), epochs=5.0),
    )
    return config
