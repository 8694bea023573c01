r"""RLOO, the paper's baseline: all parameters for six epochs.

Command:
    ntkrl train --config=configs/paper/rl.py --config.model.path=runs/paper/sft/export
Hardware: 16 chips of v5e, 9 of 15.75 GiB each. Expected time (`ntkrl plan`, a lower bound, not
measured): 30 s a step, nearly all of it decoding, 4584 steps, 38 hours. Pythia-1B: 14.5 s, 764
steps, 3.1 hours. Llama-3.2-1B: 19.5 s, 4.1 hours. All in float32; model.compute_dtype=bfloat16 is
faster.
Reported by the paper: six epochs. From the public code: rate 1e-7, constant, β = 0.05 with k1 in
the reward, clip 0.2 on the ratio per completion, two completions per prompt, two minibatches,
no whitening; for the 1B models two epochs of 32 prompts a step. Our choice: see base.py; Llama's
tied head is untied before RL.
"""

from configs.paper import base

FILES = (
    ("data.path", "data/rl.jsonl"),
    ("data.eval_path", "data/test.jsonl"),
    ("reward.normalisation", "sft/evaluations/statistics.rewards.json"),
)


def get_config(variant="pythia-2.8b", part="rl"):
    """Return the config."""
    config, chosen = base.get_config(part, variant, FILES), base.VARIANTS[variant]
    config.model.untie = chosen.untie
    config.objective.preset = "rloo_trl012"
    config.schedule.minibatches = 2
    config.stages = (base.stage("all", ((".*", 1e-7),), epochs=chosen.epochs),)
    # one an epoch
    config.checkpoint.every_steps = base.PROMPTS // config.data.prompts_per_step
    return config
