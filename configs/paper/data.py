r"""AlpacaFarm and UltraFeedback as inputs of the other configs: examples, preferences, prompts.

Command:
    ntkrl prepare --config=paper/data \
        --config.prepare.supervised=DATA/alpaca_farm/sft \
        --config.prepare.preferences=DATA/ultrafeedback_binarized/train_prefs \
        --config.prepare.test=DATA/ultrafeedback_binarized/test_prefs
Hardware: room for ArmoRM in bfloat16 (15 GB), such as 16 chips of v5e. Expected time: ArmoRM scores
126 thousand texts, 1.9e18 FLOP, ten minutes at those chips' peak rate; not measured. With
prepare.relabel off, minutes on a CPU.
From the public code: instruction and input of AlpacaFarm joined by a line break; prompts and
responses of at most 512 tokens each; labels by ArmoRM in bfloat16, pairs swapped if it prefers the
rejected one; a fifth of the pairs for RL and the rest for reward models, by seed 1283; the 500
prompts of statistics and evaluation by seeds 237 and 238; the 1B models' SFT on chosen responses.
Our choice: AlpacaFarm's examples are filtered by the same lengths (the code truncates them at
2048); ArmoRM's heads stay in float32; lengths for Llama are in Llama's tokens (the code counts
Pythia's; see prepare.tokenizer).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ntkrl.configs.paper import base


def get_config(variant="pythia-2.8b"):
    """Return the config."""
    config = base.make_config("data", variant)
    config.reward.dtype = "bfloat16"
    config.reward.batch_size = 128
    config.prepare = ConfigDict(
        {
            # rows of instruction, input and output; None: the chosen responses of the reward part
            "supervised": placeholder(str),
            # rows of prompt, chosen and rejected, to train on and to evaluate on
            "preferences": "data/ultrafeedback_binarized/train_prefs",
            "test": "data/ultrafeedback_binarized/test_prefs",
            "tokenizer": placeholder(str),  # for the length limits; None: the model's
            "max_tokens": 512,  # of a prompt, and of a response, without the template's
            "relabel": True,  # by the reward function; False: keep the published order
            "reward_share": 0.8,  # of the preferences, for reward models; the others are for RL
            "split_seed": 1283,
            "selected": 500,  # prompts for statistics and evaluation
            "selection_seed": 237,  # of the training prompts; one more for the test prompts
        }
    )
    config.prepare.supervised = base.VARIANTS[variant].supervised
    return config
