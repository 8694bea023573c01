"""Commands of `ntkrl`: their options, help and examples. Imports no JAX, so that help is quick."""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

import ntkrl
from ntkrl.messages import did_you_mean
from ntkrl.shorthands import SHORTHANDS

OVERRIDE = re.compile(r"--?(?:no)?config\.")
NUMBER = re.compile(r"-[\d.][\d.e+-]*")
OTHER_NAMES = {
    "lr": "learning_rate",
    "model_name_or_path": "model",
    "model_path": "model",
    "path": "model",
    "dataset": "data",
    "dataset_name": "data",
    "prompts": "data",
    "reward_funcs": "reward",
    "reward_model": "reward",
    "rewards": "reward",
    "max_steps": "steps",
    "output_dir": "run_dir",
    "out": "run_dir",
    "num_generations": "config.rollout.completions_per_prompt",
    "max_completion_length": "config.rollout.max_completion_tokens",
    "max_prompt_length": "config.data.max_prompt_tokens",
    "temperature": "config.rollout.temperature",
    "batch_size": "config.data.prompts_per_step",
    "per_device_train_batch_size": "config.data.prompts_per_step",
    "gradient_accumulation_steps": "config.schedule.microbatches",
    "beta": "config.objective.kl_coefficient",
    "loss_type": "config.objective.preset",
    "eval_steps": "config.eval.every_steps",
    "save_steps": "config.checkpoint.every_steps",
    "lora_r": "config.model.lora.rank",
    "bf16": "config.model.compute_dtype",
    "dtype": "config.model.compute_dtype",
}
"""Options of other libraries and likely guesses, with our option of the same purpose."""
STATUSES = """exit statuses:
  0 done; 2 a mistake of the user's, or a full disk; 70 another process of the run failed or was
  lost; 75 a run saved and stopped after SIGTERM, SIGHUP or SIGINT (Ctrl-C); 130 interrupted, by a
  second Ctrl-C or, in another command, by the first; 129 and 143 another command ended by SIGHUP
  or SIGTERM. After all but 2 the same command goes on from what is saved. NTKRL_TRACEBACK=1 shows
  where an error came from."""
CONFIG_HELP = (
    "packaged config (rl, cfrl, sft, reward, quickstart/rl, paper/cfrl, …) or a Python file; "
    "NAME:ARGUMENT passes a variant"
)
OVERRIDES_HELP = """settings:
  --config.SECTION.FIELD=VALUE changes any setting, --config.stages[0].FIELD=VALUE one of a stage;
  they win over the shorter options above. `ntkrl settings [WORD]` lists all of them."""


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a command.

    name: without dashes. help: its meaning.
    value: name of its value, None for a switch.
    """

    name: str
    help: str
    value: str | None = "VALUE"


@dataclasses.dataclass(frozen=True)
class Command:
    """A command.

    summary: its purpose. usage: what follows its name, one line for each form.
    example: a command.
    options: besides --config and the shorthands.
    config: whether it takes --config and its overrides.
    shorthands: names of SHORTHANDS that it takes.
    words: name and meaning of its other words, or None.
    """

    summary: str
    usage: tuple[str, ...]
    example: str
    options: tuple[Option, ...] = ()
    config: bool = False
    shorthands: tuple[str, ...] = ()
    words: tuple[str, str] | None = None


STEP = Option("step", "rollout step of a checkpoint that was kept, or best (default: newest)", "N")
COMMANDS = {
    "train": Command(
        "run or resume a training run",
        ("--config=NAME [--model=DIR] [--data=FILE] [--reward=FILE.py:NAME] ...",),
        "ntkrl train --config=rl --model=DIR --data=prompts.jsonl --reward=my_rewards.py:score",
        config=True,
        shorthands=tuple(SHORTHANDS),
    ),
    "evaluate": Command(
        "score a model, or a checkpoint of a run, on held-out prompts",
        (
            "--config=NAME --model=DIR [--data=FILE] [--reward=FILE.py:NAME] ...",
            "--run=RUN [--step=N|best] [--trust] [--config.SECTION.FIELD=VALUE ...]",
        ),
        "ntkrl evaluate --run=runs/rl --step=best",
        (
            Option("run", "run directory whose checkpoint is scored, by the run's config", "RUN"),
            STEP,
            Option("trust", "execute the code that the config of RUN names", None),
        ),
        config=True,
        shorthands=("model", "data", "reward", "seed", "run_dir"),
    ),
    "prepare": Command(
        "convert published data sets to the files that a config reads",
        ("--config=NAME ...",),
        "ntkrl prepare --config=paper/data",
        config=True,
        shorthands=("model", "reward", "seed", "run_dir"),
    ),
    "plan": Command(
        "memory and time of a run on a machine that you need not have",
        (
            "--config=NAME --topology=TOPOLOGY [--search] [--limit=6] [--json=FILE] ...",
            "--config=NAME --table=FILE ...",
        ),
        "ntkrl plan --config=rl --model=EleutherAI/pythia-1b --reward=exact_match "
        "--topology=v5e-16",
        (
            Option("topology", "v5e-16, v5p:2x2x4, …, h200, h100-8, a100, cpu:8, gpu", "TOPOLOGY"),
            Option("search", "compare meshes, rematerialisation and microbatches", None),
            Option("limit", "candidates of --search at most (6)", "N"),
            Option("json", "file for the figures", "FILE"),
            Option("table", "file for a table of models × machines, instead", "FILE"),
        ),
        config=True,
        shorthands=tuple(SHORTHANDS),
    ),
    "study": Command(
        "run a grid of runs, with paired comparisons, and write its page",
        ("--config=NAME [--page] ...",),
        "ntkrl study --config=study --page",
        (Option("page", "write the page from the runs that exist, run nothing", None),),
        config=True,
        shorthands=("run_dir",),
    ),
    "kernel": Command(
        "kernels of a model on prompts: arrays, figure, table",
        ("MODEL --prompts=FILE [--out=DIR] ...",),
        "ntkrl kernel DIR --prompts=prompts.txt",
        (
            Option("prompts", "JSON Lines of prompts, or a .txt with one a line", "FILE"),
            Option("out", "directory for kernel.npz and kernel.png (runs/kernel)", "DIR"),
            Option("positions", "contexts: last token of a prompt, or all (last)", "last|all"),
            Option("eigenpairs", "eigenvalues of the body and the full kernel (8)", "N"),
            Option("max_contexts", "contexts at most, evenly spaced (64)", "N"),
            Option("limit", "prompts at most, the first of the file (16)", "N"),
            Option("measures", "head,traces,norms,eigenvalues, or some of them (all)", "NAMES"),
            Option("layers", "traces of each layer too", None),
            Option("dtype", "float32, float64 or bfloat16 (float32)", "DTYPE"),
            Option("memory_gib", "memory beyond the parameters, GiB (8)", "GIB"),
        ),
        words=("MODEL", "Hugging Face directory, hub name or GGUF file"),
    ),
    "report": Command(
        "page, figures and table from run directories alone",
        ("RUN [RUN ...] [--out=DIR]", "--text RUN [RUN ...]", "--glossary"),
        "ntkrl report runs/rl runs/cfrl",
        (
            Option("out", "directory of the page (RUN/report of the first run)", "DIR"),
            Option("text", "print the report instead of writing a page", None),
            Option("glossary", "print the meaning of every metric, as Markdown", None),
        ),
        words=("RUN", "run directories"),
    ),
    "explain": Command(
        "list the causes of a change in an optimizer step: samples, parameters and tokens",
        ("RUN [--step=N] [--measure=NAME] [--prompt=TEXT|N] [--completion=N [--token=N]] ...",),
        "ntkrl explain runs/rl --step=150 --measure=entropy",
        (
            Option("step", "optimizer step with a ledger (the last)", "N"),
            Option("measure", "entropy or log_prob (entropy)", "NAME"),
            Option("prompt", "probe prompt: a part of its text, or its number (most changed)", "N"),
            Option("completion", "number of a probe completion (all of the prompt)", "N"),
            Option("token", "number of a token of the completion (all)", "N"),
            Option("top", "samples and tokens listed (5)", "N"),
        ),
        words=("RUN", "run directory"),
    ),
    "export": Command(
        "write a checkpoint of a run as a Hugging Face directory; upload it if asked to",
        ("RUN OUT [--step=N|best] [--push=ORG/NAME [--public]]",),
        "ntkrl export runs/rl my_model --step=best --push=my-name/my-model",
        (
            STEP,
            Option("push", "repository of the Hugging Face Hub to upload to (none)", "ORG/NAME"),
            Option("public", "let everybody read a repository that --push creates (private)", None),
        ),
        words=("RUN OUT", "run directory or GGUF file, and the directory to write"),
    ),
    "presets": Command(
        "list objectives: formula, source, settings",
        ("[NAME ...]",),
        "ntkrl presets grpo",
        words=("NAME", "presets (all)"),
    ),
    "settings": Command(
        "list every setting with its default and meaning",
        ("[WORD ...]",),
        "ntkrl settings temperature",
        words=("WORD", "words that the name or the meaning contains (all settings)"),
    ),
}


class _Parser(argparse.ArgumentParser):
    """Raises ValueError for the command line to print, instead of exiting."""

    def error(self, message: str) -> NoReturn:
        # argparse's words for a switch with a value
        message = message.replace("ignored explicit argument", "it takes no value, not")
        raise ValueError(f"{message}; see `{self.prog} --help`.")


@dataclasses.dataclass(frozen=True)
class Words:
    """The words of a command line, parsed.

    config: `--config=NAME` and `--config.…` words. shorthands: values by name.
    options: values by name of the other options given; True for a switch.
    others: the remaining words, in order.
    """

    config: list[str]
    shorthands: dict[str, str]
    options: dict[str, Any]
    others: list[str]


def parse(name: str, words: Sequence[str]) -> Words:
    """Parse the words after a command's name.

    Raises:
      ValueError: unknown options, each with the nearest known one, or an option without its value.
    """
    command, rest = COMMANDS[name], list(words)
    overrides: list[str] = []
    if command.config:
        overrides, rest = _split_overrides(rest)
    values, unknown = _parser(name).parse_known_intermixed_args(rest)
    options = {key: value for key, value in vars(values).items() if value not in (None, False)}
    others = options.pop("words", [])
    if unknown:
        raise ValueError(_describe_unknown(name, unknown))
    if "config" in options:
        overrides = [*(f"--config={named}" for named in options.pop("config")), *overrides]
    shorthands = {key: options.pop(key) for key in command.shorthands if key in options}
    return Words(overrides, shorthands, options, others)


def _split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split off `--config.name=value`, also where the value is a word of its own."""
    overrides, rest, left = [], [], list(words)
    while left:
        word = left.pop(0)
        if not OVERRIDE.match(word):
            rest.append(word)
            continue
        if "=" not in word and left and (left[0][:1] != "-" or NUMBER.fullmatch(left[0])):
            word = f"{word}={left.pop(0)}"
        overrides.append(word)
    return overrides, rest


def _parser(name: str) -> _Parser:
    command = COMMANDS[name]
    usage = f"\n       ntkrl {name} ".join(command.usage)
    epilog = [OVERRIDES_HELP] if command.config else []
    parser = _Parser(
        prog=f"ntkrl {name}",
        usage=f"ntkrl {name} {usage}",
        description=f"{command.summary[0].upper()}{command.summary[1:]}.",
        epilog="\n\n".join([*epilog, f"example:\n  {command.example}", STATUSES]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if command.words is not None:
        metavar, meaning = command.words
        parser.add_argument("words", nargs="*", metavar=metavar, help=meaning)
    if command.config:
        parser.add_argument("--config", action="append", metavar="NAME", help=CONFIG_HELP)
    for option in command.options:
        if option.value is None:
            parser.add_argument(f"--{option.name}", action="store_true", help=option.help)
        else:
            parser.add_argument(f"--{option.name}", metavar=option.value, help=option.help)
    for key in command.shorthands:
        parser.add_argument(f"--{key}", metavar="VALUE", help=SHORTHANDS[key])
    return parser


def _describe_unknown(name: str, unknown: Sequence[str]) -> str:
    """Return a message about words that a command does not take, with the nearest options."""
    command, problems = COMMANDS[name], []
    known = [option.name for option in command.options] + list(command.shorthands)
    known += ["config"] if command.config else []
    for word in unknown:
        if not word.startswith("-"):
            problems.append(f"{word} is not an option, which begins with --.")
            continue
        option = word.lstrip("-").partition("=")[0]
        same = OTHER_NAMES.get(option.replace("-", "_"), "")
        if same in known or (command.config and "." in same):
            hint = f"; did you mean '--{same}'?"
        else:
            hint = did_you_mean(f"--{option}", [f"--{name}" for name in known], 0.7)
        if command.config and "." in option and not hint:
            hint = f"; did you mean '--config.{option}'?"
        problems.append(f"{word} is not an option of {name}{hint or '.'}")
    options = ", ".join(f"--{option}" for option in known)
    allowed = f"Allowed are {options}" if known else "It has no options"
    return f"{' '.join(problems)} {allowed}; see `ntkrl {name} --help`."


def help_text(name: str) -> str:
    """Return the help of a command: usage, options, an example and the exit statuses."""
    return _parser(name).format_help().rstrip()


def overview() -> str:
    """Return the help of the program: its commands, each with its forms."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    example = COMMANDS["train"].example
    return "\n".join(
        [
            "usage: ntkrl COMMAND ...",
            "       ntkrl COMMAND --help     options, an example",
            "       ntkrl --version",
            "",
            *lines,
            "",
            f"example:\n  {example}",
            "",
            STATUSES,
        ]
    )


def versions() -> str:
    """Return the versions of this package and of JAX."""
    try:
        jax = f"jax {version('jax')}"
    except PackageNotFoundError:
        jax = "jax is not installed"
    return f"ntkrl {ntkrl.__version__} ({jax})"
