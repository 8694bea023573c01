"""The command line: help, versions, the list of settings, and messages for mistakes."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ntkrl import command_line, main
from ntkrl.command_line import COMMANDS
from ntkrl.evaluation.kernel_command import KernelSettings
from ntkrl.settings_list import format_settings, read_settings_list
from ntkrl.shorthands import SHORTHANDS

ROOT = Path(main.__file__).parent.parent


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name, capsys):
    """law: usage, every option, an example that parses, and the exit statuses."""
    command = COMMANDS[name]
    assert main.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: ntkrl {name} ")
    options = [option.name for option in command.options] + list(command.shorthands)
    assert [option for option in options if f"  --{option}" not in text] == []
    assert command.example in text and "exit statuses:" in text
    assert ("--config.SECTION.FIELD=VALUE" in text) == command.config
    program, called, *words = command.example.split()
    assert (program, called) == ("ntkrl", name)
    command_line.parse(name, words)
    assert max(map(len, text.splitlines())) <= 120
    assert main.main(["help", name]) == 0 and capsys.readouterr().out == text


def test_overview(capsys):
    """law: every command is listed with its purpose, and every command runs something."""
    for words in ([], ["--help"], ["-h"], ["help"]):
        assert main.main(words) == 0
        text = capsys.readouterr().out
        for name, command in COMMANDS.items():
            assert re.search(rf"^  {name} +{re.escape(command.summary)}$", text, re.MULTILINE)
    assert set(main.RUNNERS) == set(COMMANDS)


def test_help_and_versions_are_quick():
    """law: neither loads JAX, which takes seconds."""
    code = "import sys, ntkrl.main as m; m.main(sys.argv[1:]); print('jax' in sys.modules)"
    for words, start in ((["--version"], "ntkrl 0.1.0 (jax 0."), (["train", "-h"], "usage: ")):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith(start) and done.stdout.endswith("False\n")


def test_options_of_kernel():
    """law: the command line has the fields of KernelSettings."""
    fields = {field.name for field in dataclasses.fields(KernelSettings)} - {"model"}
    assert {option.name for option in COMMANDS["kernel"].options} == fields


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["fly"], "unknown command 'fly'; there are train, evaluate"),
        (["help", "fly"], "unknown command 'fly'"),
        (["train", "--modle=x"], "--modle=x is not an option of train; did you mean '--model'?"),
        (
            ["train", "--lr", "1e-5"],
            "--lr is not an option of train; did you mean '--learning_rate'?",
        ),
        (["train", "--learning-rate=1"], "did you mean '--learning_rate'?"),
        (["train", "--rollout.top_k=3"], "did you mean '--config.rollout.top_k'?"),
        (["train", "--num_generations=3"], "did you mean '--config.rollout.comp"),
        (["train", "rl"], "rl is not an option, which begins with --"),
        (["train", "--steps"], "argument --steps: expected one argument; see `ntkrl train --help`"),
        (["train"], "--config=NAME is missing"),
        (["train", "--config=rl", "--steps=0", "--seed=a"], "steps='0': expected.*; seed='a'"),
        (["evaluate", "--run=x", "--steps=3"], "--steps=3 is not an option of evaluate"),
        (["report", "--txt", "x"], "--txt is not an option of report; did you mean '--text'?"),
        (["presets", "--all"], "--all is not an option of presets. It has no options"),
        (["plan", "--config=rl", "--search=1"], "--search: it takes no value, not '1'"),
        (["settings", "temprature"], "no setting has 'temprature'; nearest are .*temperature"),
        (["settings", "xyzzy"], "`ntkrl settings` lists all"),
    ],
)
def test_mistakes(words, message, capsys):
    """law: status 2 and one line that names the word and the nearest that exists."""
    assert main.main(words) == 2
    error = capsys.readouterr().err
    assert re.search(message.replace("?", r"\?").replace("(", r"\("), error), error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "config", "rest"),
    [
        (["--config", "rl", "--config.seed", "4"], ["--config=rl", "--config.seed=4"], {}),
        (["--config.a.b=-1", "--config=rl"], ["--config=rl", "--config.a.b=-1"], {}),
        (["--config.a", "-1e-3", "--model", "M"], ["--config.a=-1e-3"], {"model": "M"}),
        (["--config.a.flag", "--model=M"], ["--config.a.flag"], {"model": "M"}),
        (
            ["--config.stages[0].steps=2", "--steps", "9"],
            ["--config.stages[0].steps=2"],
            {"steps": "9"},
        ),
    ],
)
def test_words_of_train(words, config, rest):
    """by hand: values follow their names after "=" or a blank."""
    parsed = command_line.parse("train", words)
    assert (parsed.config, parsed.shorthands, parsed.options) == (config, rest, {})


def test_words_between_options():
    """by hand: run directories may stand before, between and after options."""
    parsed = command_line.parse("report", ["a", "--out=o", "b", "--text", "c"])
    assert (parsed.others, parsed.options) == (["a", "b", "c"], {"out": "o", "text": True})
    assert command_line.parse("report", ["a"]).options == {}


def test_settings_are_complete():
    """law: every setting of the defaults is listed, in order, with its default and a comment."""
    from ntkrl.configs import base

    def flat(section, prefix=""):
        for name, value in section.items():
            if hasattr(value, "items"):
                yield from flat(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    listed = {setting.name: setting for setting in read_settings_list()}
    values = dict(flat(base.get_config()))
    values |= {f"stages[i].{name}": value for name, value in values["stages"][0].items()}
    assert set(listed) == set(values)
    assert [name for name, setting in listed.items() if not setting.comment] == []
    for name, value in values.items():
        text = listed[name].default
        if not name.startswith("stages") and value is not None:
            assert eval(text) == value, name
        assert value is not None or text.startswith("None ("), name


def test_words_of_settings():
    """by hand: a word is looked for in names and comments, in any case; all words must be there."""
    assert "rollout.temperature = 1.0\n    of sampling" in format_settings(["temperature"], 80)
    listed = format_settings(["Learning_Rate"], 80)
    assert "stages[i].parameters" in listed and "model.path" not in listed
    both = format_settings(["--config.eval", "temperature"], 80)
    assert "eval.temperature" in both and "rollout.temperature =" not in both
    assert max(map(len, format_settings([], 60).splitlines())) < 100


def test_shorthands_are_options_of_train():
    """law: train and plan take all of them."""
    assert COMMANDS["train"].shorthands == COMMANDS["plan"].shorthands == tuple(SHORTHANDS)


def test_memory_that_is_short_is_a_sentence(monkeypatch, capsys):
    """by hand: JAX's error of memory, on its first line; other errors of the runtime are traces."""

    def fail(words):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n  frames")

    monkeypatch.setitem(main.RUNNERS, "settings", fail)
    assert main.main(["settings"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "memory is short (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.); lower" in line
    monkeypatch.setitem(main.RUNNERS, "settings", lambda words: (_ for _ in ()).throw(RuntimeError))
    with pytest.raises(RuntimeError):
        main.main(["settings"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train", "--config=rl", "--config=cfrl"],
            "--config is there 2 times: rl, cfrl",
        ),
        (["evaluate", "--run=a", "--model=b"], "--model=b and --run=a: --run scores a checkpoint"),
        (["presets", "GRPO"], "GRPO: no such preset; did you mean 'grpo'?"),
        (["--verison"], "unknown command '--verison'; did you mean '--version'?"),
        (["evaluate"], "evaluate needs --run=RUN, or --config=NAME with --model=DIR"),
        (["kernel", "a", "b"], "kernel takes one model, not 2 (a, b)"),
        (["report", "--out=x"], "report needs at least one run directory"),
    ],
)
def test_words_that_do_not_fit(words, message, capsys):
    """by hand: what two options contradict, and the nearest word."""
    assert main.main(words) == 2
    assert message in capsys.readouterr().err


BROKEN = {
    "missing": ("import sys; sys.modules['jax'] = None", "ModuleNotFoundError: import of jax halt"),
    "broken": (
        "import sys; sys.path.insert(0, 'fake')",
        "ImportError: libfoo.so: cannot open shared object",
    ),
}


@pytest.mark.parametrize(("before", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_jax_that_does_not_load(before, message, tmp_path, capsys):
    """by hand: the version and help need none; a command says so, without a trace."""
    (tmp_path / "fake" / "jax").mkdir(parents=True)
    text = 'raise ImportError("libfoo.so: cannot open shared object")'
    (tmp_path / "fake" / "jax" / "__init__.py").write_text(text)
    call = f"{before}; from ntkrl.main import main; sys.exit(main(sys.argv[1:]))"
    place = {"cwd": tmp_path, "env": {"PYTHONPATH": str(ROOT)}}
    for words, status in ((["--version"], 0), (["train", "--help"], 0), (["presets"], 2)):
        program = [sys.executable, "-c", call, *words]
        done = subprocess.run(program, check=False, capture_output=True, text=True, **place)
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
    assert f"a package that it needs cannot be loaded ({message}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_versions_without_jax(monkeypatch):
    """by hand: a package that is not there has no version."""

    def version(name):
        raise command_line.PackageNotFoundError(name)

    monkeypatch.setattr(command_line, "version", version)
    assert command_line.versions().endswith("(jax is not installed)")


@pytest.mark.parametrize("command", ["settings", "report --glossary", "train --help"])
def test_output_that_nobody_reads(command):
    """law: a reader that goes away after a byte, or at once, is no error."""
    words = [sys.executable, "-m", "ntkrl", *command.split()]
    for size in (0, 1):
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.read(size)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() in (0, main.OUTPUT_CLOSED)
