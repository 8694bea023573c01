"""Training, evaluation and kernels as calls, with the settings that people change as arguments."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ntkrl import data, runtime, training
from ntkrl.api import model_files, overrides, rows
from ntkrl.api.call import Arguments, Call, read_call
from ntkrl.api.keywords import with_hints
from ntkrl.api.saved_run import TrainingRun
from ntkrl.evaluation import commands, kernel_command
from ntkrl.types import Params, Policy

PREEMPTED = 75
"""Exit status of a program whose run SIGTERM or SIGHUP ended, as of the command line."""
Model = str | os.PathLike | tuple[Policy, Params]


@with_hints
def train(
    model: Model | None = None,
    prompts: Any = None,
    rewards: Any = None,
    method: str = "rl",
    *,
    learning_rate: float | None = None,
    steps: int | None = None,
    seed: int | None = None,
    run_dir: str | os.PathLike | None = None,
    eval_prompts: Any = None,
    on_step: Callable[[int, dict[str, Any]], Any] | None = None,
    config: Any = None,
) -> TrainingRun:
    """Run or resume a training run, as `ntkrl train` does with the same settings.

    Args:
      model: Hugging Face directory, hub name, GGUF file, or `(policy, params)` of `ntkrl.load`.
      prompts: list of dicts, `datasets.Dataset`, or a path; rows in memory are also written to the
        run directory.
      rewards: functions of TRL's signature, which are called in this process, or names as in
        `reward.function`; one or several.
      method: "rl", "cfrl" (classifier first), "sft" or "reward" (a reward model).
      learning_rate: of the last stage; the other stages keep their ratio to it.
      steps: rollout steps of all stages.
      seed: ≥ 0.
      run_dir: directory of the run; a run that was stopped there resumes.
      eval_prompts: held-out prompts, in the forms of `prompts`; None holds out some of those.
      on_step: called with the optimizer steps and the metrics of every rollout step when they are
        written, one step late; the run is saved and stopped where it returns "stop".
      config: changes of settings, `{"rollout.max_completion_tokens": 64}`; or another config in
        place of the method's: its name, its file or a ConfigDict.

    Returns:
      The run; `stopped` is true where steps are left.

    Raises:
      ValueError: a mistake in the arguments, or what the run itself raises.
      KeyboardInterrupt: it was interrupted; the run was saved, and the same call resumes it.
    """
    call = read_call(
        Arguments(
            model=model,
            prompts=prompts,
            rewards=rewards,
            method=method,
            learning_rate=learning_rate,
            steps=steps,
            seed=seed,
            run_dir=run_dir,
            eval_prompts=eval_prompts,
            on_step=on_step,
            config=config,
        )
    )
    with runtime.distributed_session(f"train {call.config.run_dir}"):
        runtime.enable_compile_cache()
        _train(call)
    return TrainingRun(call.config.run_dir, call.inputs)


def _train(call: Call) -> None:
    call.save_start()
    try:
        training.train(call.config, call.inputs)
    except runtime.PreemptedError as error:
        message = str(error).replace("the same command", "the same call")
        if error.signal == signal.SIGINT:
            raise KeyboardInterrupt(message) from None
        if error.signal is not None:
            print(f"ntkrl: {message}", file=sys.stderr)
            sys.exit(PREEMPTED)
        runtime.log(message)


@with_hints
def evaluate(
    model: Model,
    prompts: Any,
    rewards: Any,
    *,
    seed: int | None = None,
    run_dir: str | os.PathLike = "runs/evaluate",
    config: Any = None,
) -> dict[str, float]:
    """Sample and reward completions of prompts, as `ntkrl evaluate` does.

    Args:
      model, prompts, rewards: as for `train`; all prompts are sampled unless `config` changes
        `eval.prompts`.
      seed: ≥ 0.
      run_dir: `evaluations/NAME.json` (metrics) and `.jsonl` (every sample) are written there.
      config: as for `train`.

    Returns:
      The `eval/…` and `diversity/…` metrics, with `_low` and `_high` ends of 95 % intervals.

    Raises:
      ValueError: a mistake in the arguments.
    """
    for name, value in (("model", model), ("prompts", prompts), ("rewards", rewards)):
        if value is None:
            raise ValueError(f"{name} is None; evaluate needs a model, prompts and rewards.")
    arguments = Arguments(model, prompts, rewards, seed=seed, run_dir=run_dir, config=config)
    call = read_call(arguments)
    values = call.config
    path, named = values.data.path, call.inputs.rows
    size = rows.count_rows(named[path] if path in named else path)
    values.data.eval_path = path
    # no step is taken: any number that the prompts fill
    values.data.prompts_per_step = max(min(values.data.prompts_per_step, size), 1)
    values.schedule.minibatches, values.eval.every_steps = 1, 1
    if not overrides.changes_setting(config, "eval.prompts"):
        values.eval.prompts = max(size, 1)
    with runtime.distributed_session(f"evaluate {values.run_dir}"):
        runtime.enable_compile_cache()
        call.save_start()
        return commands.evaluate(values, inputs=call.inputs)


@with_hints
def kernels(
    model: Model,
    texts: Sequence[Any] | str | os.PathLike,
    *,
    positions: str = "last",
    max_contexts: int = 64,
    eigenpairs: int = 8,
    layers: bool = False,
    dtype: str = "float32",
    memory_gib: float = 8.0,
) -> dict[str, np.ndarray]:
    """Compute kernels of a model on texts, as `ntkrl kernel` does; nothing is written.

    Args:
      model: Hugging Face directory, hub name, GGUF file, or `(policy, params)` of `ntkrl.load`.
      texts: texts or lists of messages, or the path of a file of prompts.
      positions: "last" for one context per text, "all" for one per token.
      max_contexts: contexts at most, evenly spaced among all.
      eigenpairs: eigenvalues of the body and the full kernel, ≥ 1.
      layers: traces per layer too.
      dtype: "float32", "float64" or "bfloat16", of a model that is loaded here.
      memory_gib: memory that the computation may use beyond the params (GiB).

    Returns:
      Arrays by name: `texts`, `endings`, contexts, and the head, body and full kernels' inner
      products, cosines, traces, shares, norms and eigenvalues.

    Raises:
      ValueError: a mistake in the arguments.
    """
    source = model_files.read_model(model)
    loaded = None if isinstance(source, str) else source
    directory = source if isinstance(source, str) else str(source[0].source)
    prompts = _texts(texts)
    settings = kernel_command.KernelSettings(
        directory,
        "",
        positions=positions,
        max_contexts=max_contexts,
        eigenpairs=eigenpairs,
        layers=layers,
        dtype=dtype,
        memory_gib=memory_gib,
        limit=len(prompts.prompts),
    )
    return kernel_command.kernels(settings, prompts, loaded)


def _texts(texts: Any) -> data.PromptSet:
    """Return texts as prompts.

    Raises:
      ValueError: of another type, none, or empty ones.
    """
    if isinstance(texts, str | os.PathLike):
        path = Path(texts)
        if not path.exists() and isinstance(texts, str):
            raise ValueError(
                f"texts is {texts!r:.80}, which is no file; pass a list for texts themselves, as "
                "[text]."
            )
        return data.read_prompts(path)
    if not isinstance(texts, list | tuple) or not texts:
        raise ValueError(
            f"texts is {texts!r:.80} ({type(texts).__name__}); pass a list of texts or of lists "
            "of messages, or the path of a file of prompts."
        )
    numbered = [(number, {"prompt": text}) for number, text in enumerate(texts)]
    return data.validate_rows(data.Rows("texts", "row", numbered, []))
