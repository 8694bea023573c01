"""TRL's trainers as installed: one step on fixed tokens, and timed steps.

`one_step` compares one update number by number; `timed_steps` measures complete training steps.
Both build TRL's GRPOTrainer or RLOOTrainer, float32 on the CPU, from a Hugging Face directory of a
causal language model with rotary positions (TRL counts padding as positions, to which those are
invariant).

`KINDS` maps losses to TRL's arguments; `options` are further arguments of GRPOConfig or RLOOConfig
by name. Prompts pass through TRL's tokenisation as text: its tokenizer has the words <0>, <1>, …
for the token ids 0, 1, …

    python -m tests.bench.trl_peer --check          compares one_step with tests.bench.trl_by_hand
    python -m tests.bench.trl_peer --json ARGUMENTS prints what timed_steps(**ARGUMENTS) returns
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import safetensors.numpy
import tokenizers
import torch
import transformers
import trl
from datasets import Dataset

from tests.bench import measure

KINDS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "dapo": {"loss_type": "dapo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "cispo": {"loss_type": "cispo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "rloo": {},
}


@dataclasses.dataclass(frozen=True)
class Batch:
    """Completions to train on; the N completions of a prompt are consecutive rows.

    tokens: `[B, T]` ids, left-padded prompt then completion.
    mask: `[B, T]` bool, True on real tokens.
    completion_mask: `[B, C]` bool, one True or more and then only False in each row.
    old_log_probs: `[B, C]` log-probs under the policy that sampled (nats).
    ref_log_probs: `[B, C]` log-probs under the reference policy (nats).
    rewards: `[B]`, before any KL term.
    """

    tokens: np.ndarray
    mask: np.ndarray
    completion_mask: np.ndarray
    old_log_probs: np.ndarray
    ref_log_probs: np.ndarray
    rewards: np.ndarray

    def prompts(self, group_size: int) -> list[list[int]]:
        """Return the ids of each prompt: those of the first row of its group."""
        columns = self.tokens.shape[1] - self.completion_mask.shape[1]
        rows = zip(self.tokens[:, :columns], self.mask[:, :columns], strict=True)
        prompts = [tokens[mask].tolist() for tokens, mask in rows]
        self._check(prompts, group_size)
        return prompts[::group_size]

    def completions(self) -> list[list[int]]:
        """Return the ids of each completion without padding."""
        tokens_BC = self.tokens[:, -self.completion_mask.shape[1] :]
        rows = zip(tokens_BC, self.completion_mask, strict=True)
        return [tokens[mask].tolist() for tokens, mask in rows]

    def _check(self, prompts: list[list[int]], group_size: int) -> None:
        mask_BC = self.mask[:, -self.completion_mask.shape[1] :]
        starts = [prompts[i - i % group_size] for i in range(len(prompts))]
        first_B1 = self.completion_mask[:, :1]
        falling_BC = self.completion_mask[:, 1:] <= self.completion_mask[:, :-1]
        wrong = {
            "rows are no multiple of the group size": len(prompts) % group_size,
            "prompts differ within a group": prompts != starts,
            "a prompt is empty": not all(prompts),
            "a completion mask is not ones and then zeros": not (first_B1 & falling_BC).all(),
            "mask and completion_mask differ": (mask_BC != self.completion_mask).any(),
        }
        if any(wrong.values()):
            raise ValueError("batch: " + "; ".join(name for name, is_so in wrong.items() if is_so))


class _Quiet:
    """A trainer without network access and standard output."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.remove_callback(transformers.PrinterCallback)

    def _send_telemetry(self) -> None:
        pass


class _Fixed(_Quiet):
    """A trainer with fixed completions, old and reference log-probs."""

    completions: list[list[int]]
    old: torch.Tensor
    ref: torch.Tensor

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        return (self.completions, None) if isinstance(self, trl.GRPOTrainer) else self.completions

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> tuple:
        if torch.is_grad_enabled():  # the loss
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        return self.ref if model is self.ref_model else self.old, None, None

    def _generate_and_score_completions(self, inputs: list) -> dict:
        scored = super()._generate_and_score_completions(inputs)
        # GRPOTrainer omits them from a batch that it has just sampled
        if isinstance(self, trl.GRPOTrainer):
            scored["old_per_token_logps"] = self.old
        return scored


def one_step(
    kind: str, directory: str, batch: Batch, options: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Let TRL take one step of plain SGD on fixed completions.

    Computed by TRL: the loss of its forward pass with its gradient, the clipping, KL terms, masks
    and denominators, advantages (and RLOO's KL penalty) from rewards, padding of lists of ids to a
    batch, the shuffle of its rows, transformers' training loop and SGD. Replaced by `batch`: the
    sampled completions (`_generate_single_turn`), the log-probs computed without a gradient before
    the update (`_get_per_token_logps_and_entropies` under no_grad), the old ones also if
    GRPOTrainer is on-policy and computes none, and the rewards. One batch, no accumulation, no
    gradient clipping, no dropout, no weight decay.

    Args:
      kind: one of KINDS.
      directory: of the model; TRL also builds its unused reference model from it.
      batch: the completions.
      options: `num_generations`, the group size, and `learning_rate`, and any others of TRL's;
        `max_completion_length`, dr_grpo's denominator, is C by default.

    Returns:
      All weights after the step, by the names that `save_pretrained` gives them.

    Raises:
      ValueError: the batch does not have the form that `Batch` requires.
    """
    prompts, completions = batch.prompts(options["num_generations"]), batch.completions()
    longest = max(map(len, completions))

    def masked(log_probs_BC: np.ndarray) -> torch.Tensor:
        masked_BC = np.where(batch.completion_mask, log_probs_BC, 0.0)[:, :longest]
        return torch.tensor(masked_BC, dtype=torch.float32)

    def reward(completions: list, **columns: Any) -> list[float]:
        return batch.rewards.tolist()

    settings = {
        "max_completion_length": batch.completion_mask.shape[1],
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "max_steps": 1,
        **options,
    }
    with tempfile.TemporaryDirectory() as place:
        trainer = _trainer(_Fixed, kind, directory, prompts, reward, place, settings)
        trainer.completions = completions
        trainer.old, trainer.ref = masked(batch.old_log_probs), masked(batch.ref_log_probs)
        trainer.train()
        trainer.model.save_pretrained(place)
        return safetensors.numpy.load_file(f"{place}/model.safetensors")


class _Timed(_Quiet):
    """A trainer that records the time of sampling, and of sampling and scoring together."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.sampling: list[float] = []
        self.collecting: list[float] = []

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        made = super()._generate(*args, **kwargs)
        self.sampling.append(time.perf_counter() - start)
        short = [len(ids) for ids in made[1] if len(ids) != self.max_completion_length]
        if short:
            raise RuntimeError(f"completions ended early, at {short} tokens")
        return made

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> dict:
        start = time.perf_counter()
        made = super()._generate_and_score_completions(*args, **kwargs)
        self.collecting.append(time.perf_counter() - start)
        return made


class _Marks(transformers.TrainerCallback):
    """A recorder of the start of training and the end of each step."""

    def __init__(self):
        self.times: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())


def timed_steps(
    kind: str,
    directory: str,
    prompts: Sequence[Sequence[int]],
    options: Mapping[str, Any],
    steps: int = 5,
    warm_up_steps: int = 1,
    threads: int = 2,
) -> dict[str, Any]:
    """Train with TRL, sampling by transformers' `generate`, and time its steps.

    Defaults are TRL's: AdamW (torch's fused one), gradients clipped to norm 1, the trainer's β,
    which means a reference model for RLOO and none for GRPO. Every step samples anew for the same
    prompts, the end of sequence suppressed, so that all completions have the full length. Gradient
    checkpointing, TRL's default, is off: it trades time for memory. The reward is the share of even
    ids. Run it in a separate process: the memory peak is that of the process.

    Args:
      kind: one of KINDS.
      directory: of the model.
      prompts: ids of each prompt, one batch.
      options: `num_generations`, the group size, and `max_completion_length`, the tokens of every
        completion, and any others of TRL's.
      steps: number of timed steps, after `warm_up_steps` that are not timed.
      threads: of torch.

    Returns:
      The settings, and medians over steps: `step_seconds`, from the end of one step to the end of
      the next, and its parts `generation_seconds`, `scoring_seconds` (rewards, reference and for
      RLOO also old log-probs, advantages) and `update_seconds` (everything else);
      `tokens_per_second`, sampled tokens over the time of complete steps; `peak_rss_mib` of the
      process, and `rss_before_mib`, after all imports and before any model is loaded.
    """
    before = measure.status_mib("VmRSS")
    torch.set_num_threads(threads)
    length, marks = options["max_completion_length"], _Marks()

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]

    settings = {
        "generation_kwargs": {"min_new_tokens": length},
        "max_steps": warm_up_steps + steps,
        **options,
    }
    with tempfile.TemporaryDirectory() as place:
        trainer = _trainer(_Timed, kind, directory, prompts, reward, place, settings)
        trainer.add_callback(marks)
        trainer.train()
    medians = _medians(trainer, marks, warm_up_steps)
    completions = len(prompts) * options["num_generations"]
    return {
        "kind": kind,
        "versions": {name: version(name) for name in ("trl", "transformers", "torch")},
        "completions": completions,
        "completion_tokens": length,
        "steps": steps,
        "threads": torch.get_num_threads(),
        **medians,
        "tokens_per_second": completions * length / medians["step_seconds"],
        "peak_rss_mib": measure.status_mib("VmHWM"),
        "rss_before_mib": before,
    }


def _medians(trainer: _Timed, marks: _Marks, skip: int) -> dict[str, float]:
    """Return the median time of a step and of its parts, without the first `skip`."""
    step = np.diff(marks.times)
    sampling, collecting = np.array(trainer.sampling), np.array(trainer.collecting)
    parts = {
        "step_seconds": step,
        "generation_seconds": sampling,
        "scoring_seconds": collecting - sampling,
        "update_seconds": step - collecting,
    }
    return {name: statistics.median(each[skip:]) for name, each in parts.items()}


def _trainer(
    mixin: type,
    kind: str,
    directory: str,
    prompts: Sequence[Sequence[int]],
    reward: Any,
    place: str,
    settings: Mapping[str, Any],
) -> Any:
    """Build TRL's trainer: one optimizer step per batch of all prompts, float32, on the CPU."""
    name = "RLOO" if kind == "rloo" else "GRPO"
    trainer_class, config_class = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    config = transformers.AutoConfig.from_pretrained(directory)
    fixed = {
        "output_dir": place,
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        "per_device_train_batch_size": len(prompts) * settings["num_generations"],
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 1,
        "num_iterations": 1,
        "shuffle_dataset": False,
        "disable_dropout": True,
        "gradient_checkpointing": False,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return type(f"{mixin.__name__}{name}Trainer", (mixin, trainer_class), {})(
        model=directory,
        reward_funcs=reward,
        args=config_class(**{**fixed, **KINDS[kind], **settings}),
        train_dataset=Dataset.from_dict({"prompt": [_text(prompt) for prompt in prompts]}),
        processing_class=_tokenizer(config.vocab_size, config.eos_token_id),
    )


def _text(ids: Sequence[int]) -> str:
    return " ".join(f"<{i}>" for i in ids)


def _tokenizer(vocab_size: int, end: int) -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of the words <0>, <1>, …: ids as text and back without loss."""
    # brackets, as special tokens are matched inside words too: 0 would be in 10
    words = tokenizers.models.WordLevel({f"<{i}>": i for i in range(vocab_size)})
    backend = tokenizers.Tokenizer(words)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=f"<{end}>", pad_token=f"<{end}>", padding_side="left"
    )


def main() -> None:
    """Print a check or a timing."""
    parser = argparse.ArgumentParser()
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--check", action="store_true")
    chosen.add_argument("--json", metavar="ARGUMENTS", type=json.loads)
    arguments = parser.parse_args()
    if arguments.check:
        from tests.bench import trl_by_hand  # imports jax, which would count as TRL's memory

        print("\n".join(trl_by_hand.check()))
    else:
        print(json.dumps(timed_steps(**arguments.json)))


if __name__ == "__main__":
    main()
