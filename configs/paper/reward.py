r"""A Bradley–Terry reward model on the preferences not used for RL, in place of ArmoRM.

Command:
    ntkrl train --config=paper/reward --model=runs/paper/sft/export
Use it in RL with --reward=runs/paper/reward/export; it has separate statistics.
Hardware: 16 chips of v5e. Expected time: two texts for each of SFT's examples, 2.1 s a step by the
same lower bound, 1528 steps, 54 minutes; not measured.
From the public code: it starts from the SFT model, rate 5e-7, constant, batches of 32 pairs, one
epoch, centering coefficient 0.01, gradients clipped at norm 1 (the default of transformers'
Trainer), evaluation every 100 steps. Our choice: 500 pairs in an evaluation. The paper's runs use
ArmoRM itself.
"""

from ml_collections.config_dict import placeholder

from ntkrl.configs.paper import base

FILES = (("data.path", "data/reward.jsonl"), ("data.eval_path", "data/test.jsonl"))


def get_config(variant="pythia-2.8b"):
    """Return the config."""
    config = base.make_config("reward", variant, FILES)
    config.method = "reward"
    config.reward.function = None
    config.data.prompts_per_step = 32
    config.preference.centering_coefficient = 0.01
    config.stages = (base.stage("all", ((".*", 5e-7),), max_grad_norm=1.0, epochs=1.0),)
    config.eval.every_steps = 100
    config.eval.prompts = 500
    config.probe.every_steps = placeholder(int)
    return config
