"""GRPO in place of RLOO, one of the paper's variants.

Command: as configs/paper/rl.py, with --config=configs/paper/grpo.py.
From the public code: that there is such a driver. Our choice: groups of eight, on as many
completions per step, with the preset's β.
"""

from configs.paper import rl


def get_config():
    """Return the config."""
    config = rl.get_config()
    config.name = "paper-grpo"
    config.run_dir = "runs/paper/grpo"
    config.objective.preset = "grpo"
    config.data.prompts_per_step = 4
    config.rollout.completions_per_prompt = 8
    return config
