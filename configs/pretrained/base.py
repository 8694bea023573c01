"""Settings that RL and CF-RL share: SmolLM2-135M-Instruct, lists of members of categories.

The head is untied from the embedding, so that both methods have the same parameters. Sampling is at
temperature 0.7, at which the model starts with right lists for a part of the categories.
"""

from pathlib import Path

from ml_collections.config_dict import placeholder

from ntkrl.configs import base

RUNS = "runs/pretrained"
STEPS, CLASSIFIER_STEPS = 30, 9
RATE = 2e-5


def get_config():
    """Return the config."""
    config = base.get_config()
    config.model.path = f"{RUNS}/model.gguf"
    config.model.untie = True
    config.data.path = f"{RUNS}/data/train.jsonl"
    config.data.eval_path = f"{RUNS}/data/test.jsonl"
    config.data.prompts_per_step = 4
    config.data.max_prompt_tokens = 56
    config.rollout.completions_per_prompt = 4
    config.rollout.max_completion_tokens = 16
    config.rollout.temperature = 0.7
    config.reward.function = f"{Path(__file__).with_name('lists.py')}:reward"
    config.checkpoint.every_steps = 10
    config.eval.every_steps = STEPS
    config.eval.samples_per_prompt = 8
    config.probe.every_steps = 15
    config.probe.prompts = 4
    config.probe.completions_per_prompt = 1
    config.probe.ledger_every_steps = placeholder(int)  # a copy of all parameters per term
    return config
