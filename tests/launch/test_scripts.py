"""Every launch script: lint, help, settings, quoting, exit statuses and error messages."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.desk import GOOGLE, ODD, ROOT, SCRIPTS

PUBLIC = ["quickstart", "pretrained", "local", "tpu_vm", "worker", "gke", "slurm", "paper"]


def test_scripts_are_clean():
    """law: shellcheck finds nothing in any script."""
    beside = Path(sys.executable).parent / "shellcheck"
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed; the extra `test` installs it")
    done = subprocess.run(
        [program, "-x", *map(str, SCRIPTS)], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert len(SCRIPTS) > 8 and done.stdout + done.stderr == ""


@pytest.mark.parametrize("script", PUBLIC)
def test_help(desk, script):
    """story: --help prints the comment at the top and runs nothing."""
    status, lines, _ = desk.run(script, "--help", PYTHON="/nonexistent")
    top = (ROOT / "launch" / f"{script}.sh").read_text().splitlines()
    assert status == 0 and lines[0] == top[1].removeprefix("# ") and len(lines) >= 3
    assert not any(line.startswith("#") or "set -e" in line for line in lines)


def test_every_setting_has_a_comment_and_can_be_given():
    """law: a line of env.sh is NAME="${NAME:-value}" with a comment on its purpose."""
    lines = (ROOT / "launch" / "env.sh").read_text().splitlines()
    settings = [line for line in lines if line and not line.startswith("#")]
    assert len(settings) > 30
    for line in settings:
        assert re.fullmatch(r'(\w+)="\$\{\1:-[^"]*\}" +# \S.*', line), line
    names = {line.partition("=")[0] for line in settings}
    used = "".join(path.read_text() for path in SCRIPTS if path.name != "env.sh")
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", used)] == []


def test_printed_commands_are_the_commands():
    """law: a shell that reads a printed command gets the same words."""
    words = ["plain", "--a=b,c", "", "two words", "it's", '"$HOME" \\ `x`', ODD, "é*?[a]"]
    script = 'source launch/common.sh; quoted "$@"'
    printed = subprocess.check_output(["bash", "-c", script, "x", *words], cwd=ROOT, text=True)
    assert shlex.split(printed) == words


@pytest.mark.parametrize(
    "statuses", ["0 0 0", "0 143 143", "143 75 75", "75 70 70", "70 2 2", "134 70 134", "2 1 2"]
)
def test_the_worse_status(statuses):
    """by hand: the cause (1, 2, killed) before 70, 75 and 143, which follow from it; then 0."""
    first, second, worse = statuses.split()
    script = f"source launch/common.sh; worse {first} {second}; worse {second} {first}"
    printed = subprocess.check_output(["bash", "-c", script], cwd=ROOT, text=True).split()
    assert printed[0] == worse and (printed[1] == worse or "2 1" in statuses)


@pytest.mark.parametrize(
    ("script", "words", "settings", "messages"),
    [
        ("local", [], {"PROCESSES": "two"}, ["no --config=FILE", "PROCESSES=two is not a whole"]),
        ("local", ["--config=c"], {"PROCESSES": "0"}, ["PROCESSES=0 is less than one"]),
        ("tpu_vm", ["loop"], {}, ["BUCKET", "PROJECT", "ZONE", "no --config=FILE"]),
        ("tpu_vm", [], GOOGLE, ["the first argument must be create, install"]),
        ("worker", ["train"], {}, ["name of the run", "no --config=FILE"]),
        ("gke", ["run"], {"TOPOLOGY": "3x3"}, ["IMAGE", "BUCKET", "TOPOLOGY=3x3", "no --config"]),
        ("gke", ["run"], {"TOPOLOGY": "big"}, ["TOPOLOGY=big", "is not of the form 4x4"]),
        ("gke", ["xpk"], {}, ["CLUSTER", "PROJECT", "ZONE", "STORAGE", "IMAGE"]),
        ("slurm", [], {"TASKS_PER_NODE": "3"}, ["TASKS_PER_NODE=3 is neither", "no --config"]),
        ("slurm", ["--config=c"], {"NODES": "x", "NTKRL": "n"}, ["NODES=x is not a whole number"]),
        (
            "paper",
            ["mesh=1"],
            {"DATA": "/none"},
            ["MODEL", "REWARD", "/none/alpaca_farm", "mesh=1"],
        ),
        ("pretrained", ["x"], {"MODEL": "/none"}, ["x is not an argument", "MODEL=/none does not"]),
        ("quickstart", ["x"], {"SEEDS": "0 one"}, ["x is not an argument", "SEEDS=0 one has one"]),
        ("paper", [], {"SEEDS": "-1"}, ["SEEDS=-1 has -1, which is not a whole number"]),
        ("paper", [], {"VARIANT": "gpt-5"}, ["VARIANT=gpt-5 is neither pythia-2.8b, pythia-1b"]),
    ],
)
def test_mistakes_are_told_together(desk, script, words, settings, messages):
    """story: everything missing is in one sentence, status 2, and nothing was run."""
    status, lines, error = desk.run(script, *words, **settings)
    assert (status, lines, desk.called()) == (2, [], [])
    assert error.count("\n") == 1 and error.startswith(f"{script}.sh: ")
    assert [part for part in messages if part not in error] == []


def test_missing_programs_are_told(desk):
    """story: a tool that is not installed is reported with the other mistakes."""
    shutil.rmtree(desk.place / "bin")
    path = desk.place / "bin"
    path.mkdir()
    for name in ("bash", "sed", "dirname", "basename"):
        (path / name).symlink_to(shutil.which(name))
    status, _, error = desk.run("tpu_vm", "create", PATH=str(path), PROJECT="p")
    assert status == 2 and "ZONE is not set" in error and "gcloud is not installed" in error
