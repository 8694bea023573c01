"""Settings that the configs of the paper share (Tomihari 2601.04670).

Reported by the paper: Pythia-2.8B, SFT on AlpacaFarm, RL on UltraFeedback's prompts with ArmoRM as
reward, one epoch of stage 1 and six epochs of RL, Adam, completions of up to 512 tokens, three
runs. Taken from the public code it builds on (princeton-pli/what-makes-good-rm, on TRL 0.12.1):
chat template, lengths, batches, rates, seeds, β, temperature, float32, no gradient clipping in RL,
reward scores shifted and scaled by 500 × 10 samples of the SFT policy, six checkpoints, evaluation
every 40 steps. Our choice: an epoch is a pass over the prompts (that code counts completions: with
two per prompt, its six epochs are three passes); all rows of the vocabulary are kept (that code
cuts Pythia's 50304 to 50279); probes; the number of prompts in an evaluation during training; the
mesh.

Every config here takes the name of one of VARIANTS after a colon, for example
--config=paper/rl:pythia-1b; the default is Pythia-2.8B. Each reads the files that the
part before it wrote to runs/paper (runs/paper-NAME for another model); launch/paper.sh runs all.
configs/paper/miniature.py has all of them for tiny models and synthetic data.

To plan another model, pass --model=meta-llama/Meta-Llama-3-8B or Qwen/Qwen3-8B, with
--config.model.template=None.
"""

from typing import NamedTuple

from ml_collections.config_dict import placeholder

from ntkrl.configs import base

PROMPTS = 12_227  # 20 % of train_prefs (61135): the part for RL, before filtering
TURNS = 3  # tokens that the template writes around a prompt: user, end of turn, assistant


class Variant(NamedTuple):
    """A model, and the settings that the public code changes for it.

    path: name on the hub. runs: directory of its runs. supervised: the data of SFT, or None for
    the chosen responses of the reward model's part. prompts_per_step: of RL. epochs: of RL.
    vocab_size: rows after SFT, or None to keep their number; larger if the template's two tokens
    would make it indivisible by any mesh (our choice). untie: copy the tied embedding into a
    separate head before RL, so that stage 1 trains the head alone (our choice). compute_dtype: of
    the policy's network and of the reward model; params and optimizer stay in float32.
    """

    path: str
    runs: str
    supervised: str | None
    prompts_per_step: int
    epochs: float
    vocab_size: int | None
    untie: bool
    compute_dtype: str = "float32"


VARIANTS = {
    # 32 completions on two GPUs, 2 of each prompt
    "pythia-2.8b": Variant(
        "EleutherAI/pythia-2.8b",
        "runs/paper",
        "data/alpaca_farm/sft",
        prompts_per_step=16,
        epochs=6.0,
        vocab_size=None,
        untie=False,
    ),
    # 64 completions, SFT on UltraFeedback
    "pythia-1b": Variant(
        "EleutherAI/pythia-1b",
        "runs/paper-pythia-1b",
        None,
        prompts_per_step=32,
        epochs=2.0,
        vocab_size=None,
        untie=False,
    ),
    "llama-3.2-1b": Variant(
        "meta-llama/Llama-3.2-1B",
        "runs/paper-llama-3.2-1b",
        None,
        prompts_per_step=32,
        epochs=2.0,
        vocab_size=128_512,
        untie=True,
    ),
}
# our choice: half the time on TPUs, by ntkrl plan
VARIANTS["pythia-2.8b-bfloat16"] = VARIANTS["pythia-2.8b"]._replace(
    runs="runs/paper-pythia-2.8b-bfloat16", compute_dtype="bfloat16"
)


def make_config(part, variant, files=()):
    """Return the shared settings.

    Args:
      part: the name of the run and of its directory.
      variant: a key of VARIANTS.
      files: (field, file or directory that another part wrote) pairs.

    Raises:
      ValueError: an unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"{variant!r} is not a variant; known: {', '.join(VARIANTS)}.")
    config, chosen = base.get_config(), VARIANTS[variant]
    config.name = f"paper-{part}" if variant == "pythia-2.8b" else f"{variant}-{part}"
    config.seed = 372
    config.model.path = chosen.path
    config.model.template = "pythia"
    config.data.max_prompt_tokens = 512 + TURNS
    config.data.prompts_per_step = chosen.prompts_per_step
    config.rollout.completions_per_prompt = 2
    config.rollout.max_completion_tokens = 512
    config.rollout.temperature = 1.0
    config.reward.function = "RLHFlow/ArmoRM-Llama3-8B-v0.1"
    # while training; the preferences are labelled in bfloat16
    config.reward.dtype = chosen.compute_dtype
    if chosen.compute_dtype != config.model.dtype:
        config.model.compute_dtype = chosen.compute_dtype
    # rollout.mesh is chosen: 16 chips sample Pythia-2.8B in 16 tensor parts
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.eval.every_steps = 40
    config.eval.prompts = 16  # while training; the paper's 500 are for the final evaluation
    config.eval.samples_per_prompt = 10
    # off: a ledger of all params needs 26.1 GiB on each of 16 chips, by ntkrl plan
    config.probe.ledger_every_steps = placeholder(int)
    config.checkpoint.keep = 6
    config.run_dir = f"{chosen.runs}/{part}"
    config.update_from_flattened_dict({field: f"{chosen.runs}/{name}" for field, name in files})
    return config


def stage(name, parameters, max_grad_norm=None, **length):
    """Return a stage with Adam as in the code's RL: no clipping, no decay, no warm-up."""
    return base.stage(name, None, parameters, max_grad_norm=max_grad_norm, **length)
