"""Configs by name, in any directory, from a checkout or installed; configs of users beside them."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ntkrl import configs, runtime
from ntkrl.settings import read_settings

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("base", "rl", "cfrl", "sft", "reward", "study", "quickstart/rl", "paper/cfrl")


def test_names():
    """law: every file with a get_config has a name, and no other file."""
    packaged = runtime.packaged_configs()
    assert set(NAMES) <= set(packaged)
    assert not [name for name in packaged if name.startswith("evidence") or "made_up" in name]
    for name in packaged:
        runtime.read_config([f"--config={name}"])


@pytest.mark.parametrize("name", ["rl", "cfrl", "sft", "quickstart/rl", "paper/cfrl"])
def test_a_name_is_its_file(name, tmp_path, monkeypatch):
    """law: a name and the path of its file give the same config, also in another directory."""
    by_path = runtime.read_config([f"--config={ROOT}/configs/{name}.py"])
    monkeypatch.chdir(tmp_path)
    assert runtime.to_json(runtime.read_config([f"--config={name}"])) == runtime.to_json(by_path)


def test_variants(tmp_path, monkeypatch):
    """by hand: what follows a colon is passed to get_config."""
    monkeypatch.chdir(tmp_path)
    config = runtime.read_config(["--config=paper/rl:pythia-1b"])
    assert runtime.to_json(config) != runtime.to_json(runtime.read_config(["--config=paper/rl"]))
    with pytest.raises(ValueError, match="rl.py: it has no variants; leave out ':pythia-1b'"):
        runtime.read_config(["--config=rl:pythia-1b"])
    with pytest.raises(ValueError, match="'pythia-9b' is not a variant; known: pythia-2.8b"):
        runtime.read_config(["--config=paper/rl:pythia-9b"])


def test_configs_of_a_user(tmp_path, monkeypatch):
    """story: a config elsewhere starts from a packaged one; a file that exists wins over a name."""
    monkeypatch.chdir(tmp_path)
    text = "from ntkrl.configs import base, cfrl\n\n\ndef get_config():\n"
    text += "    config = cfrl.get_config()\n    config.seed = 41\n    return config\n"
    (tmp_path / "mine.py").write_text(text)
    (tmp_path / "rl").write_text(text.replace("41", "42"))
    config = runtime.read_config(["--config=mine.py", "--config.stages[0].steps=3"])
    assert (config.seed, config.stages[0].steps, config.run_dir) == (41, 3, "runs/cfrl")
    assert runtime.read_config(["--config=rl"]).seed == 42
    values = {"model": "m", "reward": "expressions"}
    read_settings(runtime.read_config(["--config=mine.py"], shorthands=values))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("crfl", "--config=crfl: no such file; did you mean 'cfrl'.*packaged configs are .*cfrl"),
        ("rl.py", "did you mean --config=rl, which is packaged"),
        ("configs/cfrl.py", "did you mean --config=cfrl, which is packaged"),
        ("mine", "did you mean --config=mine.py"),
        (".", "--config=.: a directory"),
        ("run.yaml", "configs are Python files, not YAML.*--config=rl.*--config.rollout"),
        ("run.toml", "not TOML"),
        ("config.json", "not JSON"),
        ("", "--config=NAME is missing"),
    ],
)
def test_wrong_names(name, message, tmp_path, monkeypatch):
    """law: one sentence with the nearest name and all packaged ones."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "run.yaml").write_text("seed: 1\n")
    with pytest.raises(ValueError, match=message):
        runtime.read_config([f"--config={name}"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import seed_of_nothing\n", "bad.py: No module named 'seed_of_nothing'"),
        (
            "from configs import base\n",
            "No module named 'configs'; .*from ntkrl.configs import base",
        ),
        ("x = 1\n", "bad.py: it has no function get_config"),
        ("def get_config():\n    return None\n", "get_config returned NoneType; expected"),
        ("def get_config():\n    x = 1\n    return y\n", "bad.py, line 3: NameError: name 'y'"),
        ("def get_config():\n    raise ValueError('no such size')\n", "bad.py: no such size"),
    ],
)
def test_broken_files(text, message, tmp_path, monkeypatch):
    """law: an error in a config's file is one sentence with its line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(ROOT))])
    for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        runtime.read_config(["--config=bad.py"])


def test_installed(tmp_path):
    """story: a wheel has the configs, and works in an empty directory without the checkout."""
    build = "from setuptools.build_meta import build_wheel; import sys; build_wheel(sys.argv[1])"
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "README.md", "ntkrl", "configs"):
        (source / name).symlink_to(ROOT / name)
    subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
        files = {name for name in archive.namelist() if name.startswith("ntkrl/configs/")}
    written = {f"ntkrl/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.py")}
    assert files == written
    empty = tmp_path / "empty"
    empty.mkdir()
    code = (
        "import ntkrl, ntkrl.main; print(ntkrl.__file__)\n"
        "from ntkrl import runtime; print(runtime.read_config(['--config=paper/cfrl']).name)\n"
        "ntkrl.main.main(['settings', 'top_p'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    place, name, *listed = done.stdout.splitlines()
    assert Path(place).is_relative_to(tmp_path / "installed") and name == "paper-cfrl"
    assert "rollout.top_p = None (float)" in listed


def test_one_source():
    """law: in a checkout the package's modules are the files of configs/."""
    assert Path(configs.__path__[0]) == ROOT / "configs"
