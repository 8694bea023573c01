"""The READMEs: their Python runs, their commands parse, their files and settings exist."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from ntkrl import command_line, runtime
from ntkrl.command_line import COMMANDS
from ntkrl.report import ALIASES
from ntkrl.settings import read_settings
from ntkrl.update import PRESETS
from tests.toys import torch_neox

ROOT = Path(__file__).resolve().parent.parent
READMES = sorted(
    [ROOT / "README.md"]
    + [
        path
        for room in ("ntkrl", "configs", "launch", "tests")
        for path in (ROOT / room).rglob("README.md")
    ]
    + [ROOT / ".github" / "CONTRIBUTING.md"]
)
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in READMES}
FRONT = TEXTS["README.md"]
EVERYTHING = "\n".join(TEXTS.values())

ENVIRONMENT = {"REGION": "r", "NAME": "n"}
# programs outside this project, and shell built-ins, whose words are not checked
FOREIGN = {"gcloud", "source", "pip"}
# settings of `evaluate --run` and the like that are no config sections
SECTIONS = re.compile(
    r"`(?:--config\.)?((?:model|data|rollout|reward|preference|objective|schedule|mesh|checkpoint"
    r"|eval|probe|logging|prepare)(?:\.[a-z_]+)+)(?:=[^`]*)?`"
)


def blocks(text, language):
    """Return the fenced code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def python_blocks():
    """Return (file, block) pairs."""
    return [(name, block) for name, text in TEXTS.items() for block in blocks(text, "python")]


def commands():
    """Return (file, command) pairs: the shell blocks' commands, without comments."""
    pairs = []
    for name, text in TEXTS.items():
        for block in blocks(text, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                pairs += [
                    (name, part.strip()) for part in re.sub(r"(^|\s)#.*", "", line).split("&&")
                ]
    return [(name, command) for name, command in pairs if command]


def quoted_in_a_config(block):
    """Return whether a config file contains a block, white space aside."""
    squeezed = re.sub(r"\s+", "", block)
    files = (ROOT / "configs").rglob("*.py")
    return any(squeezed in re.sub(r"\s+", "", path.read_text(encoding="utf-8")) for path in files)


@pytest.mark.parametrize(("name", "block"), python_blocks())
def test_python_runs(name, block, tmp_path):
    """story: every Python block runs, on a tiny model in DIR's place, or is part of a config."""
    if not re.search(r"^(import|from|def) ", block, re.MULTILINE):
        assert quoted_in_a_config(block), name
        return
    if "ntkrl.train(" in block or "ntkrl.Steps(" in block:
        return  # in tests/api, with small settings
    if '"DIR"' in block:
        torch_neox(tmp_path)
    names = {}
    exec(compile(block.replace('"DIR"', repr(str(tmp_path))), name, "exec"), names)
    if "kernel" in names:
        assert names["kernel"].head.shape == (2, 2)
        assert names["kernel"].dense(rows=[5, 8], columns=[0, 1]).shape == (2, 2, 2, 2)


def test_kinds_of_python_block():
    """law: the examples that the assertions of `test_python_runs` are about are there."""
    everything = "\n".join(block for _, block in python_blocks())
    assert "kernel = ntk.kernel(" in everything and "def score(" in everything
    assert "ntk.Network(" in everything and "config.stages" in everything


def words_of(command):
    """Return the environment and the words of a command."""
    words = [word for word in shlex.split(command) if word != "..."]
    environment = {}
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        key, _, value = words.pop(0).partition("=")
        environment[key] = value
    return environment, words


def check_launch_script(words, environment, tmp_path):
    """Run a launch script with --dry-run."""
    assert (ROOT / words[1]).is_file()
    if words[1] == "launch/test.sh":
        for word in words[2:]:
            assert not word.startswith("tests") or (ROOT / word).exists()
        return
    directories = {"DATA": str(tmp_path)} if "paper" in words[1] else {}
    for part in ("alpaca_farm", "ultrafeedback_binarized"):
        (tmp_path / part).mkdir(exist_ok=True)
    done = subprocess.run(
        [*words, "--dry-run"],
        cwd=ROOT,
        env={**os.environ, **EXPORTED, **environment, **directories},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


EXPORTED = {
    key: value
    for _, command in commands()
    if command.startswith("export ")
    for key, value in (word.split("=", 1) for word in shlex.split(command)[1:])
}


def check_ntkrl(words):
    """Parse a command of `ntkrl` as the command line does, without running it."""
    command = words[0]
    parsed = command_line.parse(command, words[1:])
    if command == "presets":
        assert set(parsed.others) <= set(PRESETS)
    if parsed.config and "run" not in parsed.options:
        config = runtime.read_config(parsed.config, shorthands=parsed.shorthands)
        if command != "study":
            read_settings(config)


@pytest.mark.parametrize(("name", "command"), commands())
def test_commands_are_understood(name, command, tmp_path, monkeypatch):
    """law: every shell command's program, script, config, settings and options exist."""
    monkeypatch.chdir(ROOT)
    environment, words = words_of(command)
    if words[0] == "export":
        text = (ROOT / "launch" / "env.sh").read_text()
        assert [word for word in words[1:] if f"\n{word.split('=')[0]}=" not in text] == []
    elif words[0] == "bash":
        check_launch_script(words, environment, tmp_path)
    elif words[0] == "ntkrl":
        check_ntkrl(words[1:])
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]) is not None
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), command
    else:
        assert words[0] in FOREIGN or (ROOT / words[0]).is_file(), command


def test_extras_exist():
    """law: every extra that a README installs or mentions is in setup.py."""
    setup = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    keywords = [node for node in ast.walk(setup) if isinstance(node, ast.keyword)]
    (extras,) = [node.value for node in keywords if node.arg == "extras_require"]
    known = {key.value for key in extras.keys}
    named = re.findall(r"(?:ntkrl|\.)\[([\w-]+)\]", EVERYTHING)
    named += re.findall(r"extra `([\w-]+)`", EVERYTHING)
    assert len(named) > 5 and set(named) <= known


def test_settings_exist():
    """law: every setting that a README names is one of a config."""
    named = {match.group(1) for match in SECTIONS.finditer(EVERYTHING)}
    named |= set(re.findall(r"--config\.((?:[a-z_]+\.)+[a-z_]+)", EVERYTHING))
    named = {name for name in named if not name.endswith(".py")} - {"section.field"}
    assert len(named) > 40
    configs = [
        runtime.read_config([f"--config={ROOT / 'configs' / name}"])
        for name in ("base.py", "paper/data.py")
    ]
    missing = []
    for name in sorted(named):
        section, field = name.split(".", 1)
        if not any(
            section in config and field in dict(flat(config[section])) for config in configs
        ):
            missing.append(name)
    assert missing == []


def flat(section, prefix=""):
    """Yield (dotted name, value) of every field of a config section."""
    for key, value in section.items():
        yield f"{prefix}{key}", value
        if hasattr(value, "items"):
            yield from flat(value, f"{prefix}{key}.")


def test_stage_fields_exist():
    """law: every field in the table of stages is one of a stage."""
    table = TEXTS["configs/README.md"].split("| field of a stage |")[1].split("\n\n")[0]
    fields = re.findall(r"^\| ([^|]*) \|", table, re.MULTILINE)
    named = {name for cell in fields for name in re.findall(r"`(\w+)`", cell)}
    stage = runtime.read_config([f"--config={ROOT / 'configs' / 'base.py'}"]).stages[0]
    assert len(named) > 8 and named <= set(stage)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_known(command):
    """law: every command of the command line is in the README's table."""
    assert re.search(rf"^\| `ntkrl {command} ", FRONT, re.MULTILINE)


def test_table_of_commands():
    """law: every command of the README's table is one of the command line."""
    assert set(re.findall(r"`ntkrl (\w+) ", EVERYTHING)) <= set(COMMANDS)


def test_presets_are_the_presets():
    """law: the list of presets is complete."""
    text = TEXTS["configs/README.md"].split("A preset is a named combination:")[1]
    assert set(re.findall(r"`(\w+)`", text.split("```")[0])) == set(PRESETS)


def test_aliases_are_the_tables():
    """law: every library whose names can be written is shown with one of them."""
    pairs = re.findall(r"(\w+)`\s+\(`([\w/]+)`\)", TEXTS["configs/README.md"])
    pairs = [pair for pair in pairs if pair[0] in ALIASES]
    assert {style for style, _ in pairs} == set(ALIASES)
    assert all(name in ALIASES[style].values() for style, name in pairs)


def test_files_exist():
    """law: every path and every link of the READMEs is there."""
    named = set(re.findall(r"`((?:ntkrl|tests|configs|launch)/[\w/.-]*)`", EVERYTHING))
    named |= set(re.findall(r"bash (launch/\w+\.sh)", EVERYTHING))
    named |= set(re.findall(r"`((?:ntkrl|tests|configs|launch)/[\w/.-]*)` \(", EVERYTHING))
    assert len(named) > 30
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    """law: every link is to a file of the checkout, and its anchor to a heading there."""
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", TEXTS[name]):
        if target.startswith("https:"):
            continue
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings]
            assert anchor in anchors, f"{target}#{anchor}"


def test_lengths():
    """law: the front page is at most 200 lines; longer pages begin with their contents."""
    assert len(FRONT.splitlines()) <= 200
    for name, text in TEXTS.items():
        headings = re.findall(r"^## (.*)", text, re.MULTILINE)
        if name != "README.md" and len(text.splitlines()) > 60:
            assert re.findall(r"^- \[(.*)\]\(#", text, re.MULTILINE) == headings, name


def test_no_private_paths():
    """law: every path in the READMEs is relative to the checkout."""
    allowed = {"/bucket"}
    private = set(re.findall(r"(?<![\w.…)~])(/\w+)/\w+", EVERYTHING))
    assert private <= allowed
