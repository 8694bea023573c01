"""The command line: `ntkrl COMMAND …`, the same as `python -m ntkrl COMMAND …`."""

import dataclasses
import os
import shutil
import sys
from collections.abc import Mapping, Sequence

from ntkrl import durable_files, signals
from ntkrl.messages import printable

USAGE = """usage: ntkrl COMMAND ...

  train    --config=FILE [--config.section.field=value ...]   run or resume a training run
  evaluate --config=FILE [--config.section.field=value ...]   score a model on held-out prompts
  evaluate --run=RUN [--step=N|best] [--trust] [--config...]  or a checkpoint of a run
  prepare  --config=FILE [--config.section.field=value ...]   prepare published data
  plan     --config=FILE --topology=v5e:4x4 [--search] ...    memory and time of a run on a machine
  study    --config=FILE [--page] ...                         run a grid of runs, write its page
  kernel   MODEL --prompts=FILE [--out=DIR] ...               kernels of a model on prompts
  report   RUN [RUN ...] [--out=DIR]                          page, figures and table of runs
  report   --text RUN [RUN ...]                               the report as text
  report   --glossary                                         what every metric means, as Markdown
  export   RUN OUT [--step=N|best]                            a checkpoint as Hugging Face directory
  presets  [NAME ...]                                         objectives: formula, source, settings

plan also takes --limit=6 (candidates of --search), --json=FILE and, in place of --topology,
--table=FILE (models × machines). Topologies: v5e-16, v5p:2x2x4, …, h200, h100-8, a100, cpu:8, gpu;
no TPU or GPU is needed.
kernel also takes --positions=last|all --eigenpairs=8 --max_contexts=64 --limit=16 --layers
--dtype=float32|float64|bfloat16 --memory_gib=8.

Configs live in configs/; every field has its meaning in configs/base.py.
Set NTKRL_TRACEBACK=1 to see where an error came from.
Exit statuses: 0 done, 2 a mistake of the user's, 70 another process of the run failed or was lost,
75 a run saved and stopped after SIGTERM, SIGHUP or SIGINT (Ctrl-C), 130 interrupted: by a second
Ctrl-C, or another command by the first. 129 and 143: another command ended by SIGHUP or SIGTERM."""

PREEMPTED = 75
"""Exit status of a run that a signal ended, and of a study whose runs it ended: EX_TEMPFAIL, try
again."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status.

    0: done. 2: a user's mistake, or a full disk. 75: a run saved and stopped after SIGTERM, SIGHUP
    or SIGINT; a study stopped, and its runs so. 130: interrupted, by SIGINT or, in a run, by a
    second one. 129, 143: another command ended by SIGHUP or SIGTERM. After all but 2 the same
    command resumes. If one of several processes fails, it ends at once and the others exit with 70
    (see runtime.distributed_session).

    Args:
      argv: words after the program's name; None for the process's own.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    commands = {
        "train": _train,
        "evaluate": _evaluate,
        "prepare": _prepare,
        "plan": _plan,
        "study": _study,
        "kernel": _kernel,
        "report": _report,
        "export": _export,
        "presets": _presets,
    }
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if words[0] not in commands:
        print(f"ntkrl: unknown command {words[0]!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        with signals.command_signals():
            status = commands[words[0]](words[1:])
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from what is saved", file=sys.stderr)
        return signals.INTERRUPTED
    except signals.StopRequest as request:
        print(f"\nntkrl {words[0]}: stopped by {request.signal.name}", file=sys.stderr)
        return PREEMPTED if words[0] == "study" else 128 + request.signal
    except Exception as error:
        full = durable_files.full_disk(error)
        if "NTKRL_TRACEBACK" in os.environ or (
            full is None and not isinstance(error, ValueError | OSError)
        ):
            raise
        message = f"ntkrl {words[0]}: {error if full is None else full}"
        print(printable(message), file=sys.stderr)
        return 2
    return 0 if status is None else status


def _train(words: Sequence[str]) -> int | None:
    from ntkrl import runtime
    from ntkrl.training import train

    config = runtime.read_config(words)
    with runtime.distributed_session(f"train {config.run_dir}"):
        runtime.enable_compile_cache()
        try:
            train(config)
        except runtime.PreemptedError as error:
            print(f"ntkrl train: {error}", file=sys.stderr)
            return PREEMPTED
    return None


def _evaluate(words: Sequence[str]) -> None:
    from ntkrl import runtime
    from ntkrl.evaluation import commands

    chosen = [word for word in words if word.startswith(("--run", "--step", "--trust"))]
    options, _ = _options(chosen, ("run", "step"), ("trust",))
    if "step" in options and "run" not in options:
        raise ValueError("--step names a checkpoint of a run; give --run=RUN too.")
    if "trust" in options and "run" not in options:
        raise ValueError("--trust is about the code that a run's config names; give --run=RUN too.")
    run = options["run"] if "run" in options else None
    saved = None if run is None else commands.config_of(run)
    config = runtime.read_config([word for word in words if word not in chosen], saved)
    with runtime.distributed_session(f"evaluate {config.run_dir}"), signals.restored():
        runtime.enable_compile_cache()
        commands.evaluate(config, run, _step(options), "trust" in options)


def _prepare(words: Sequence[str]) -> None:
    from ntkrl import prepare, runtime

    config = runtime.read_config(words)
    with runtime.distributed_session(f"prepare {config.run_dir}"), signals.restored():
        runtime.enable_compile_cache()
        prepare.prepare(config)


def _plan(words: Sequence[str]) -> None:
    from ntkrl import plan, runtime
    from ntkrl.settings import read_settings

    config_words = [word for word in words if word.startswith("--config")]
    others = [word for word in words if word not in config_words]
    options, places = _options(others, ("topology", "limit", "json", "table"), ("search",))
    if places:
        raise ValueError(f"plan takes options only, not {' '.join(places)}.")
    settings = read_settings(runtime.read_config(config_words))
    if "table" in options:
        if len(options) > 1:
            raise ValueError("plan --table=FILE takes no other option: its machines are fixed.")
        plan.write_table(options["table"], settings, f"ntkrl plan {' '.join(words)}")
        return
    if "topology" not in options:
        raise ValueError("plan needs --topology=NAME, for example v5e-16, h200 or cpu:8.")
    plan.plan(settings, plan.read_options(options))


def _study(words: Sequence[str]) -> None:
    from ntkrl import runtime, study

    _alone("study")
    config_words = runtime.join_config_flag([word for word in words if word != "--page"])
    config = runtime.read_config(config_words)
    named = [word for word in config_words if word.startswith("--config=")]
    file = named[-1].removeprefix("--config=")
    print(f"page: {study.run_study(config, file, '--page' in words)}")


def _kernel(words: Sequence[str]) -> None:
    from ntkrl import runtime
    from ntkrl.evaluation import kernel_command

    _alone("kernel")
    names = [field.name for field in dataclasses.fields(kernel_command.KernelSettings)]
    known = [name for name in names if name not in ("model", "layers")]
    options, places = _options(words, known, ("layers",))
    if len(places) != 1:
        raise ValueError("kernel needs one model directory, and --prompts=FILE.")
    settings = kernel_command.read_settings(places[0], options)
    runtime.enable_compile_cache()
    kernel_command.compute_kernels(settings)


def _alone(command: str) -> None:
    from ntkrl import runtime

    if runtime.is_distributed():
        raise ValueError(f"{command} works in one process; start it once, outside the run's own.")


def _report(words: Sequence[str]) -> None:
    from ntkrl import report

    options, runs = _options(words, ("out",), ("glossary", "text"))
    if "glossary" in options:
        if len(words) > 1:
            raise ValueError("report --glossary takes no runs and no other option.")
        print(report.format_glossary())
        return
    if not runs:
        raise ValueError("report needs at least one run directory, for example runs/rl.")
    if "text" in options:
        if "out" in options:
            raise ValueError("report --text writes no files; leave --out away, or --text.")
        columns, encoding = shutil.get_terminal_size((100, 24)).columns, sys.stdout.encoding
        print(report.format_text(runs, columns, encoding))
        return
    out = options["out"] if "out" in options else os.path.join(runs[0], "report")
    page = report.write_report(runs, out)
    print(report.format_table([report.read_run(run) for run in runs]))
    print(f"\nreport: {page}")


def _export(words: Sequence[str]) -> None:
    from ntkrl.evaluation import commands

    _alone("export")
    options, places = _options(words, ("step",))
    if len(places) != 2:
        raise ValueError("export needs a run directory and an output directory.")
    commands.export(places[0], places[1], _step(options))


def _step(options: Mapping[str, str]) -> int | str | None:
    """Parse --step; None is the newest checkpoint."""
    step = options["step"] if "step" in options else None
    if step is not None and step.isdigit():
        return int(step)
    if step not in (None, "best"):
        raise ValueError(f"--step={step} must be a whole number, or best.")
    return step


def _presets(words: Sequence[str]) -> None:
    from ntkrl import update

    unknown = [word for word in words if word not in update.PRESETS]
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: no such preset; there are {', '.join(update.PRESETS)}."
        )
    for name in words if words else update.PRESETS:
        print(f"{name}\n    {update.FORMULAS[name].strip()}\n")
        print(f"    {update.describe(update.PRESETS[name])}\n")


def _options(
    words: Sequence[str], known: Sequence[str], switches: Sequence[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """Split words into `--name=value` options (and `--switch` ones, with no value) and the rest."""
    options, others = {}, []
    for word in words:
        if not word.startswith("--"):
            others.append(word)
            continue
        name, _, value = word[2:].partition("=")
        if word[2:] not in switches and (name not in known or not value):
            allowed = ", ".join(
                [f"--{option}=…" for option in known] + [f"--{switch}" for switch in switches]
            )
            raise ValueError(f"{word} is not understood; allowed are {allowed}.")
        options[name] = value
    return options, others
