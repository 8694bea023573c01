"""GRPO in place of RLOO, one of the paper's variants.

Command: as configs/paper/rl.py, with --config=paper/grpo.
Hardware and time: as RLOO's, for as many steps of as many completions.
From the public code: its GRPO driver, whose epochs count completions. Our choice: groups of eight,
with as many completions per step and in total as RLOO, so that six of its epochs are one and a half
passes over the prompts; the preset's β.
"""

from ntkrl.configs.paper import base, rl

GROUP = 8


def get_config(variant="pythia-2.8b"):
    """Return the config."""
    config = rl.get_config(variant, "grpo")
    fewer = GROUP // config.rollout.completions_per_prompt
    config.objective.preset = "grpo"
    config.data.prompts_per_step //= fewer
    config.rollout.completions_per_prompt = GROUP
    row = config.stages[0]
    config.stages = (base.stage(row.name, row.parameters, epochs=row.epochs / fewer),)
    return config
