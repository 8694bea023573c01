"""Classifier-first RL: the unembedding for one epoch, then all parameters for six.

Command: as configs/paper/rl.py, with --config=paper/cfrl.
Hardware and time: as RLOO's, and 764 steps of stage 1, whose updates are smaller: at most 70
minutes more at RLOO's 5.5 s a step. Pythia-1B and Llama-3.2-1B have 382 of them.
Reported by the paper: the two stages, one additional epoch for the first and six for the second.
Our choice: the learning rate of the first, which is not published: ten times the second's.
"""

from ntkrl.configs.paper import base, rl


def get_config(variant="pythia-2.8b"):
    """Return the config."""
    config = rl.get_config(variant, "cfrl")
    config.stages = (
        base.stage("classifier", (("head/.*", 1e-6), (".*", None)), epochs=1.0),
        base.stage("all", ((".*", 1e-7),), epochs=base.VARIANTS[variant].epochs),
    )
    return config
