"""The command line: `ntkrl COMMAND …`, the same as `python -m ntkrl COMMAND …`."""

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ntkrl import command_line, durable_files, settings_list, signals
from ntkrl.command_line import COMMANDS, Words
from ntkrl.messages import OUT_OF_MEMORY, did_you_mean, output_is_closed, printable

PREEMPTED = 75
"""Exit status of a run that a signal ended, and of a study whose runs it ended: EX_TEMPFAIL, try
again."""
OUTPUT_CLOSED = 141
"""Exit status where nobody reads the output any more: as of a process that SIGPIPE ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status.

    0: done. 2: a user's mistake, or a full disk. 75: a run saved and stopped after SIGTERM, SIGHUP
    or SIGINT; a study stopped, and its runs so. 130: interrupted, by SIGINT or, in a run, by a
    second one. 129, 143: another command ended by SIGHUP or SIGTERM. 141: the output was closed.
    After all but 2 the same command resumes. If one of several processes fails, it ends at once
    and the others exit with 70 (see runtime.distributed_session).

    Args:
      argv: words after the program's name; None for the process's own.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(words)
    except BrokenPipeError:
        if not output_is_closed(failed=True):
            raise
        return OUTPUT_CLOSED
    return OUTPUT_CLOSED if output_is_closed() else status


def _run(words: Sequence[str]) -> int:
    text = _help(words)
    if text is not None:
        print(text)
        return 0
    name = words[1] if words[0] == "help" else words[0]
    if name not in COMMANDS:
        known = [*COMMANDS, "--help", "--version"]
        hint = did_you_mean(name, known) or f"; there are {', '.join(COMMANDS)}"
        print(printable(f"ntkrl: unknown command {name!r}{hint}"), file=sys.stderr)
        return 2
    try:
        with signals.command_signals():
            status = RUNNERS[name](command_line.parse(name, words[1:]))
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from what is saved", file=sys.stderr)
        return signals.INTERRUPTED
    except signals.StopRequest as request:
        print(f"\nntkrl {name}: stopped by {request.signal.name}", file=sys.stderr)
        return PREEMPTED if name == "study" else 128 + request.signal
    except Exception as error:
        if isinstance(error, BrokenPipeError) and output_is_closed(failed=True):
            return OUTPUT_CLOSED
        full = durable_files.full_disk(error) or _out_of_memory(error) or _broken(error)
        if "NTKRL_TRACEBACK" in os.environ or (
            full is None and not isinstance(error, ValueError | OSError)
        ):
            raise
        message = f"ntkrl {name}: {error if full is None else full}"
        print(printable(message), file=sys.stderr)
        return 2
    return 0 if status is None else status


def _out_of_memory(error: Exception) -> str | None:
    """Return a sentence about an error of JAX's that memory is short, or None."""
    if not isinstance(error, RuntimeError) or not OUT_OF_MEMORY.search(str(error)):
        return None
    reason = str(error).strip().partition("\n")[0]
    return (
        f"memory is short ({reason:.200}); lower the sizes of the run (data.prompts_per_step, "
        "rollout.completions_per_prompt, the numbers of tokens, model.vocab_size), or take more "
        "devices. NTKRL_TRACEBACK=1 shows where."
    )


def _broken(error: Exception) -> str | None:
    """Return a sentence about a package that is missing or does not load, or None.

    Modules of ntkrl itself are not meant: those would be mistakes of its own.
    """
    text = " ".join(str(error).split())
    wrong_pair = isinstance(error, RuntimeError) and text.startswith("jaxlib")  # of other versions
    name = (getattr(error, "name", None) or "").partition(".")[0]
    if not wrong_pair and (not isinstance(error, ImportError) or name == "ntkrl"):
        return None
    return (
        f"a package that it needs cannot be loaded ({type(error).__name__}: {text:.200}); install "
        "it again, as in pip install --force-reinstall ntkrl. NTKRL_TRACEBACK=1 shows where."
    )


def _help(words: Sequence[str]) -> str | None:
    """Return the help or the versions that a command line asks for, or None."""
    if not words or words[0] in ("-h", "--help") or words == ["help"]:
        return command_line.overview()
    if words[0] in ("--version", "-V", "version"):
        return command_line.versions()
    if words[0] == "help" and words[1] in COMMANDS:
        return command_line.help_text(words[1])
    if words[0] in COMMANDS and ("-h" in words or "--help" in words):
        return command_line.help_text(words[0])
    return None


def _train(words: Words) -> int | None:
    from ntkrl import runtime
    from ntkrl.training import train

    config = runtime.read_config(words.config, shorthands=words.shorthands)
    with runtime.distributed_session(f"train {config.run_dir}"):
        runtime.enable_compile_cache()
        try:
            train(config)
        except runtime.PreemptedError as error:
            print(f"ntkrl train: {error}", file=sys.stderr)
            return PREEMPTED
    return None


def _evaluate(words: Words) -> None:
    from ntkrl import runtime
    from ntkrl.evaluation import commands

    options = words.options
    if "step" in options and "run" not in options:
        raise ValueError("--step names a checkpoint of a run; give --run=RUN too.")
    if "trust" in options and "run" not in options:
        raise ValueError("--trust is about the code that a run's config names; give --run=RUN too.")
    if "run" in options and "model" in words.shorthands:
        raise ValueError(
            f"--model={words.shorthands['model']} and --run={options['run']}: --run scores a "
            "checkpoint of the run; leave out one of the two (where the run's base has moved, set "
            "--config.model.path)."
        )
    run = options["run"] if "run" in options else None
    saved = None if run is None else commands.config_of(run)
    if saved is None and not words.config:
        raise ValueError("evaluate needs --run=RUN, or --config=NAME with --model=DIR.")
    config = runtime.read_config(words.config, saved, words.shorthands)
    with runtime.distributed_session(f"evaluate {config.run_dir}"), signals.restored():
        runtime.enable_compile_cache()
        with runtime.CompileNotices({}, "the sampler"):
            commands.evaluate(config, run, _step(options), "trust" in options)


def _prepare(words: Words) -> None:
    from ntkrl import prepare, runtime

    config = runtime.read_config(words.config, shorthands=words.shorthands)
    with runtime.distributed_session(f"prepare {config.run_dir}"), signals.restored():
        runtime.enable_compile_cache()
        prepare.prepare(config)


def _plan(words: Words) -> None:
    from ntkrl import plan, runtime
    from ntkrl.settings import read_settings

    options = words.options
    config = runtime.read_config(words.config, shorthands=words.shorthands)
    settings = read_settings(config)
    if "table" in options:
        if len(options) > 1:
            raise ValueError("plan --table=FILE takes no other option: its machines are fixed.")
        changes = [f"--{key}={value}" for key, value in words.shorthands.items()]
        command = ["ntkrl", "plan", *words.config, *changes, f"--table={options['table']}"]
        plan.write_table(options["table"], settings, " ".join(command))
        return
    if "topology" not in options:
        raise ValueError("plan needs --topology=NAME, for example v5e-16, h200 or cpu:8.")
    plan.plan(settings, plan.read_options(options))


def _study(words: Words) -> None:
    from ntkrl import runtime, study

    _alone("study")
    config = runtime.read_config(words.config, shorthands=words.shorthands)
    (file,) = [word for word in words.config if word.startswith("--config=")]
    page = study.run_study(config, file.removeprefix("--config="), "page" in words.options)
    print(f"page: {page}")


def _kernel(words: Words) -> None:
    from ntkrl import runtime
    from ntkrl.evaluation import kernel_command

    _alone("kernel")
    if len(words.others) != 1:
        count = f"{len(words.others)} ({', '.join(words.others)})" if words.others else "none"
        raise ValueError(
            f"kernel takes one model, not {count}: a directory, a hub name or a GGUF file; and "
            "--prompts=FILE."
        )
    settings = kernel_command.read_settings(words.others[0], words.options)
    runtime.enable_compile_cache()
    kernel_command.compute_kernels(settings)


def _alone(command: str) -> None:
    from ntkrl import runtime

    if runtime.is_distributed():
        raise ValueError(f"{command} works in one process; start it once, outside the run's own.")


def _report(words: Words) -> None:
    from ntkrl import report

    options, runs = words.options, words.others
    if "glossary" in options:
        if len(options) > 1 or runs:
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


def _explain(words: Words) -> None:
    from ntkrl import report

    options = words.options
    if len(words.others) != 1:
        raise ValueError("explain needs one run directory, for example runs/rl.")
    names = ("step", "completion", "token", "top")
    for name in names:
        if name in options and not options[name].isdecimal():
            raise ValueError(f"--{name}={options[name]} must be a whole number ≥ 0.")
    numbers = {n: int(v) for n, v in options.items() if n in (*names, "prompt") and v.isdecimal()}
    place = report.Place(
        numbers["prompt"] if "prompt" in numbers else options.get("prompt"),
        numbers.get("completion"),
        numbers.get("token"),
    )
    step, top = numbers.get("step"), numbers.get("top", 5)
    measure = options.get("measure", "entropy")
    explanation = report.explain(report.read_run(words.others[0]), step, measure, place, top)
    print(report.encodable(printable(str(explanation)), sys.stdout.encoding))


def _export(words: Words) -> None:
    from ntkrl.evaluation import commands, push

    _alone("export")
    options = words.options
    if len(words.others) != 2:
        raise ValueError("export needs a run directory or a GGUF file, and an output directory.")
    run, out = words.others
    if "push" in options:
        push.check_push(options["push"])
    elif "public" in options:
        raise ValueError("--public is about an upload; add --push=ORG/NAME, or leave it out.")
    commands.export(run, out, _step(options))
    if "push" in options:
        print(f"uploaded to {push.push(Path(out), options['push'], 'public' in options)}")


def _step(options: Mapping[str, Any]) -> int | str | None:
    """Parse --step; None is the newest checkpoint."""
    step = options["step"] if "step" in options else None
    if step is not None and step.isdigit():
        return int(step)
    if step not in (None, "best"):
        raise ValueError(f"--step={step} must be a whole number, or best.")
    return step


def _presets(words: Words) -> None:
    from ntkrl import update

    unknown = [word for word in words.others if word not in update.PRESETS]
    if unknown:
        hint = "".join(did_you_mean(word, update.PRESETS) for word in unknown)
        there = f"{hint or ';'} {'T' if hint else 't'}here are {', '.join(update.PRESETS)}."
        raise ValueError(f"{', '.join(unknown)}: no such preset{there}")
    for name in words.others if words.others else update.PRESETS:
        print(f"{name}\n    {update.FORMULAS[name].strip()}\n")
        print(f"    {update.describe(update.PRESETS[name])}\n")


def _settings(words: Words) -> None:
    columns = shutil.get_terminal_size((100, 24)).columns
    print(settings_list.format_settings(words.others, columns))


RUNNERS: dict[str, Callable[[Words], int | None]] = {
    "train": _train,
    "evaluate": _evaluate,
    "prepare": _prepare,
    "plan": _plan,
    "study": _study,
    "kernel": _kernel,
    "report": _report,
    "explain": _explain,
    "export": _export,
    "presets": _presets,
    "settings": _settings,
}
