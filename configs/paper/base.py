"""What the four configs of the paper's setting share: Tomihari 2601.04670 on Pythia-2.8B.

Reported by the paper: Pythia-2.8B, SFT on AlpacaFarm, RL on UltraFeedback's prompts with ArmoRM as
reward. Taken from the public code it builds on (princeton-pli/what-makes-good-rm, on TRL 0.12.1):
chat template, lengths, batches, rates, seeds, β, temperature, float32, no gradient clipping, reward
scores shifted and scaled by 500 × 10 samples of the SFT policy, six checkpoints, evaluation every
40 steps. Our choice: all 50304 rows of the vocabulary stay, where that code cuts them to 50279;
probes; how many prompts an evaluation during training reads; the mesh.

Another model is planned by --config.model.path=meta-llama/Meta-Llama-3-8B or Qwen/Qwen3-8B, with
--config.model.template=None.
"""

from ml_collections.config_dict import placeholder

from configs import base

PROMPTS = 48_908  # 80 % of train_prefs (61135): the part that RL is given; filtered ones fewer


def get_config():
    """Return the shared settings."""
    config = base.get_config()
    config.seed = 372
    config.model.path = "EleutherAI/pythia-2.8b"
    config.model.template = "pythia"
    config.data.max_prompt_tokens = 512
    config.data.prompts_per_step = 16  # 32 completions on two GPUs, 2 of each prompt
    config.rollout.completions_per_prompt = 2
    config.rollout.max_completion_tokens = 512
    config.rollout.temperature = 1.0
    config.reward.function = "RLHFlow/ArmoRM-Llama3-8B-v0.1"
    config.reward.dtype = "float32"  # while training; the preferences were labelled in bfloat16
    config.schedule.minibatches = 2
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.eval.every_steps = 40
    config.eval.prompts = 16  # while training; the paper's 500 are for the final evaluation
    config.eval.samples_per_prompt = 10
    # of all params it does not fit 16 chips: 26.1 GiB each by ntkrl plan
    config.probe.ledger_every_steps = placeholder(int)
    config.checkpoint.keep = 6
    return config


def stage(name, parameters, **length):
    """One row with Adam as the code has it: no clipping, no decay, no warm-up."""
    return base.stage(name, None, parameters, max_grad_norm=None, **length)
