"""The runner of studies: its jobs, and a study that a config file offers."""

import time

import pytest

from ntkrl import main, runtime, study
from ntkrl.study import Job
from ntkrl.study.jobs import environment, run_jobs
from tests.report.conftest import write_run

STUDY = """
from pathlib import Path
from ml_collections import ConfigDict
from ntkrl.study import Job

def get_config():
    return ConfigDict({"run_dir": "study"})

class Study:
    jobs = 1

    def __init__(self, config, file):
        self.root, self.file = Path(config.run_dir), file

    def phases(self):
        yield "first", [Job("one", ("presets", "rloo"), self.root / "logs" / "one.txt")]
        (self.root / "between").write_text((self.root / "logs" / "one.txt").read_text())
        yield "second", [Job("two", ("presets", "grpo"), self.root / "logs" / "two.txt")]

    def write_page(self, command):
        page = self.root / "index.html"
        page.write_text(command)
        return page

def get_study(config, file):
    return Study(config, file)
"""


def test_commands_run_once_and_say_what_failed(tmp_path, capsys):
    """story: two at a time, ended ones are not repeated, a failure stops all and is reported."""
    good = [Job(f"good {i}", ("help",), tmp_path / "logs" / f"good_{i}.txt") for i in range(3)]
    run_jobs("runs", good, 2, tmp_path)
    assert "usage" in (tmp_path / "logs" / "good_2.txt").read_text()
    assert (tmp_path / "commands.txt").read_text() == "ntkrl help\n" * 3
    begun = time.monotonic()
    run_jobs("runs", good, 2, tmp_path)
    assert time.monotonic() - begun < 1
    bad = Job("bad", ("report",), tmp_path / "never")
    with pytest.raises(ValueError, match=r"(?s)bad ended with status 2.*needs at least one run"):
        run_jobs("runs", [bad], 1, tmp_path)
    silent = Job("silent", ("help",), tmp_path / "never")
    with pytest.raises(ValueError, match="silent ended with status 0"):
        run_jobs("runs", [silent], 1, tmp_path)


def test_a_run_without_its_metrics_is_not_done(tmp_path):
    """law: a training run counts as done only while its mark holds."""
    run = write_run(tmp_path / "run", "rl", 0)
    job = Job("run", ("report",), run / "finished")
    run_jobs("runs", [job], 1, tmp_path)  # done: not started
    (run / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match="run ended with status 2"):
        run_jobs("runs", [job], 1, tmp_path)


def test_runs_at_a_time_share_a_gpu(tmp_path, monkeypatch):
    """by hand: JAX would give each three quarters of its memory; a user's fraction is kept."""
    name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    monkeypatch.delenv(name, raising=False)
    assert environment(2)[name] == "0.450"
    monkeypatch.setenv(name, "0.2")
    assert environment(2)[name] == "0.2"


def test_a_config_file_offers_its_study(tmp_path, capsys):
    """story: phases run in order, each after the results of the last; --page runs nothing."""
    file, root = tmp_path / "mine.py", tmp_path / "runs"
    file.write_text(STUDY)
    root.mkdir()
    words = ["study", f"--config={file}", f"--config.run_dir={root}"]
    assert main.main([*words, "--page"]) == 0
    assert sorted(path.name for path in root.iterdir()) == ["index.html"]
    assert main.main(words) == 0
    assert "rloo" in (root / "between").read_text()
    assert (root / "commands.txt").read_text() == "ntkrl presets rloo\nntkrl presets grpo\n"
    assert (root / "index.html").read_text() == f"ntkrl study --config={file}"
    assert f"page: {root / 'index.html'}" in capsys.readouterr().out
    file.write_text(STUDY.replace("get_study", "get_nothing"))
    assert main.main(words) == 2
    assert "is not the config of a study" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["study", "pretrained/study"])
def test_the_variant_for_a_gpu(name):
    """law: more seeds, another directory, and commands that read the same config file."""
    plain, gpu = (
        study.load_study(runtime.read_config([f"--config={file}"]), file)
        for file in (name, f"{name}:gpu")
    )
    assert len(gpu.settings.seeds) > len(plain.settings.seeds) and gpu.settings.jobs == 1
    assert gpu.root != plain.root and set(gpu.settings.sizes) >= set(plain.settings.sizes)
    for size in gpu.settings.sizes:
        config = runtime.read_config(list(gpu.train(size, "cfrl", 7).words[1:]))
        assert config.run_dir.startswith(str(gpu.root)) and config.seed == 7
