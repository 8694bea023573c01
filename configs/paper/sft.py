"""Supervised fine-tuning of Pythia-2.8B on AlpacaFarm's 10k examples, where RL starts.

Command:
    ntkrl train --config=configs/paper/sft.py --config.data.path=alpaca_farm_sft.jsonl
From the public code: rate 1e-6, constant, batches of 32, one epoch, loss on assistant tokens only.
Our choice: the longest completion, which the code bounds together with its prompt.
"""

from configs.paper import base


def get_config():
    """Return the config."""
    config = base.get_config()
    config.name = "paper-sft"
    config.run_dir = "runs/paper/sft"
    config.method = "sft"
    config.reward.function = None
    config.data.prompts_per_step = 32
    config.data.held_out = 0.0
    config.schedule.minibatches = 1
    config.stages = (base.stage("all", ((".*", 1e-6),), epochs=1.0),)
    config.eval.every_steps = None
    config.probe.every_steps = None
    return config
