"""Supervised fine-tuning before RL: Pythia-2.8B on AlpacaFarm's 10k examples.

Command:
    ntkrl train --config=paper/sft
Hardware: 16 chips of v5e, 10 of 15.75 GiB each. Expected time (`ntkrl plan`, a lower bound, not
measured): 1.1 s a step at full length, 312 steps, 6 minutes; Pythia-1B 0.4 s, 1528 steps, 9
minutes.
From the public code: rate 1e-6, constant, batches of 32, one epoch, loss on assistant tokens only,
gradients clipped at norm 1 (the default of transformers' Trainer), seed 372; Pythia-1B and
Llama-3.2-1B learn from the chosen responses of the reward model's part of UltraFeedback. Our
choice: separate limits for prompt and completion, which the code limits together.
"""

from ml_collections.config_dict import placeholder

from ntkrl.configs.paper import base


def get_config(variant="pythia-2.8b"):
    """Return the config."""
    config = base.make_config("sft", variant, (("data.path", "data/sft.jsonl"),))
    config.method = "sft"
    config.model.vocab_size = base.VARIANTS[variant].vocab_size
    config.reward.function = None
    config.data.prompts_per_step = 32
    config.data.held_out = 0.0
    config.rollout.max_completion_tokens = 512 + 1  # and the end of the turn
    config.stages = (base.stage("all", ((".*", 1e-6),), max_grad_norm=1.0, epochs=1.0),)
    config.eval.every_steps = placeholder(int)
    config.probe.every_steps = placeholder(int)
    return config
