r"""RLOO as the paper's baseline: everything trained for six epochs.

Command:
    ntkrl train --config=configs/paper/rl.py --config.model.path=runs/paper/sft/export \
        --config.data.path=ultrafeedback_prompts.jsonl --config.reward.normalisation=FILE
From the public code: rate 1e-7, constant, β = 0.05 with k1 in the reward, clip 0.2 on the ratio of
whole completions, two completions per prompt, two minibatches, no whitening.
"""

from configs.paper import base


def get_config():
    """Return the config."""
    config = base.get_config()
    config.name = "paper-rl"
    config.run_dir = "runs/paper/rl"
    config.objective.preset = "rloo_trl012"
    config.stages = (base.stage("all", ((".*", 1e-7),), epochs=6.0),)
    config.checkpoint.every_steps = base.PROMPTS // config.data.prompts_per_step
    return config
