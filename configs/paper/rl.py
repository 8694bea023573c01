r"""RLOO, the paper's baseline: all parameters for six epochs.

Command:
    ntkrl train --config=paper/rl --model=runs/paper/sft/export
Hardware: 16 chips of v5e, 9 of 15.75 GiB each. Expected time (`ntkrl plan`, not measured): 5.5
s a step in float32, 4584 steps, 7 hours; 2.1 s with :pythia-2.8b-bfloat16 and
--config.mesh.tensor=4. Pythia-1B has 764 steps, Llama-3.2-1B as many.
Reported by the paper: six epochs. From the public code: rate 1e-7, constant, β = 0.05 with k1 in
the reward, clip 0.2 on the ratio per completion, two completions per prompt, two minibatches,
no whitening; for the 1B models two epochs of 32 prompts a step. Our choice: see base.py; Llama's
tied head is untied before RL.
"""

from ntkrl.configs.paper import base

FILES = (
    ("data.path", "data/rl.jsonl"),
    ("data.eval_path", "data/test.jsonl"),
    ("reward.normalisation", "sft/evaluations/statistics.rewards.json"),
)


def get_config(variant="pythia-2.8b", part="rl"):
    """Return the config."""
    config, chosen = base.make_config(part, variant, FILES), base.VARIANTS[variant]
    config.model.untie = chosen.untie
    config.objective.preset = "rloo_trl012"
    config.schedule.minibatches = 2
    config.stages = (base.stage("all", ((".*", 1e-7),), epochs=chosen.epochs),)
    # one an epoch
    config.checkpoint.every_steps = base.PROMPTS // config.data.prompts_per_step
    return config
