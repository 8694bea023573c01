"""Training of a reward model on preferences.

Command:
    ntkrl train --config=reward --model=DIR --data=pairs.jsonl
Rows have "prompt", "chosen" and "rejected", in TRL's standard or conversational format. DIR is a
language model, which gets a new head, or a sequence classifier with one label. The learning rate is
that of princeton-pli/what-makes-good-rm.
"""

from ntkrl.configs import base


def get_config():
    """Return the config."""
    config = base.get_config()
    config.name = "reward"
    config.run_dir = "runs/reward"
    config.method = "reward"
    config.data.prompts_per_step = 32
    config.stages = (base.stage("all", 200, ((".*", 5e-7),)),)
    return config
