r"""The final evaluation of a model: ten completions of each of 500 prompts.

Commands for the SFT model on training prompts (its rewards are the statistics that normalise those
of RL), and for the model after RL on test prompts, compared with the SFT model's samples there:
    ntkrl evaluate --config=paper/evaluation --model=runs/paper/sft/export \
        --config.run_dir=runs/paper/sft --config.eval.name=statistics \
        --config.data.eval_path=runs/paper/data/rl_selected.jsonl --config.reward.normalisation=None
    ntkrl evaluate --config=paper/evaluation --model=runs/paper/rl-0/export \
        --config.run_dir=runs/paper/rl-0 --config.eval.name=test \
        --config.eval.base=runs/paper/sft/evaluations/test.jsonl
Hardware: 16 chips of v5e. Expected time (`ntkrl plan`, not measured): 5000 completions at 32 in
3.6 s, ten minutes.
From the public code: 500 training and 500 test prompts, ten samples each, temperature 1, 512
tokens. Our choice: one sampling of them (eval.repeats).
"""

from ntkrl.configs.paper import rl


def get_config(variant="pythia-2.8b"):
    """Return the config."""
    config = rl.get_config(variant)
    config.eval.prompts = 500
    config.eval.samples_per_prompt = 10
    config.eval.repeats = 1
    config.data.eval_path = config.data.eval_path.replace("test", "test_selected")
    return config
