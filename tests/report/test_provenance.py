"""What a report names of its runs: model, data, objective, rates, versions and command."""

import dataclasses
import json

import pytest

from ntkrl.report import read_run, write_report
from ntkrl.report.provenance import NOT_RECORDED, command, facts_table, rate_words

CONFIG = {
    "method": "rl",
    "model": {"path": "org/model", "architecture": "GPTNeoXForCausalLM"},
    "data": {"path": "prompts.jsonl", "prompts_per_step": 16},
    "rollout": {"completions_per_prompt": 8},
    "reward": {"function": "my.py:score"},
    "objective": {"preset": "rloo", "clip": None, "kl_coefficient": 0.05},
    "stages": [
        {
            "name": "classifier",
            "steps": 40,
            "epochs": None,
            "optimizer": "adam",
            "parameters": [["head/.*", 1e-5], [".*", None]],
        },
        {
            "name": "all",
            "steps": None,
            "epochs": 1.5,
            "optimizer": "adamw",
            "parameters": [[".*", 1e-6]],
        },
    ],
}
START = {
    "command": "ntkrl train --config=rl --seed=1",
    "machine": "1 × NVIDIA H200, 16 CPU cores",
    "versions": {"ntkrl": "0.1.0", "jax": "0.10.2"},
    "model": "org/model: 1,234,567 parameters in float32",
    "objective": "advantage leave_one_out · kl_coefficient 0.05",
}


@pytest.fixture
def runs(run_paths):
    """Two seeds with a complete config, the second with a record of its starts."""
    for path in run_paths[:2]:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(CONFIG | config))
    other = START | {"command": "ntkrl train --config=rl"}
    (run_paths[1] / "starts.jsonl").write_text(f"{json.dumps(other)}\n{json.dumps(START)}\ncut {{")
    return [read_run(path) for path in run_paths[:2]]


def test_facts_by_hand(runs):
    """By hand: every row of the table; what a run lacks is said to lack."""
    table = facts_table(runs)
    rows = {words: cells for words, *cells in table.rows}
    assert table.heads == ("", "rl")
    assert rows["model"] == [f"org/model; {START['model']}"]
    assert rows["data"] == ["prompts.jsonl"] and rows["rewards"] == ["my.py:score"]
    assert rows["objective"] == ["rloo · kl_coefficient 0.05; rloo: " + START["objective"]]
    assert rows["stage 1"] == ["classifier, 40 steps, adam: head/.* at 1e-5, .* frozen"]
    assert rows["stage 2"] == ["all, 1.5 epochs, adamw: .* at 1e-6"]
    assert rows["each step"] == ["16 prompts × 8 completions"] and rows["seeds"] == ["0; 1"]
    assert rows["machine"] == [f"{NOT_RECORDED}; {START['machine']}"]
    assert rows["versions"] == [f"{NOT_RECORDED}; ntkrl 0.1.0, jax 0.10.2"]
    assert [command(run) for run in runs] == [NOT_RECORDED, START["command"]]  # the last start
    assert "line 3 of starts.jsonl cannot be read and was left out" in runs[1].notes


def test_the_page_names_them(runs, tmp_path, monkeypatch):
    """Story: they are on the page."""
    monkeypatch.setattr("ntkrl.report.page.FIGURES", ())
    page = write_report([run.path for run in runs], tmp_path / "out")
    text = page.read_text(encoding="utf-8")
    for words in ("org/model", "head/.* at 1e-5", START["command"], "jax 0.10.2", "NVIDIA H200"):
        assert words in text


def test_other_methods_and_odd_configs(runs):
    """By hand: supervised runs, new models, and a config that is not of this version."""
    changed = dict(CONFIG, name="rl", seed=0, method="sft")
    changed["model"] = {"path": None, "architecture": "X"}
    changed["data"] = {"path": None, "prompts_per_step": 4}
    run = dataclasses.replace(runs[0], config=changed)
    rows = {words: cells[0] for words, *cells in facts_table([run]).rows}
    assert rows["model"] == "new X"
    assert rows["data"] == "built-in task" and rows["each step"] == "4 examples"
    assert rows["objective"].startswith("−log π")
    for odd in ({}, {"stages": 3, "model": [], "objective": "x"}, {"stages": [7, {}]}):
        table = facts_table([dataclasses.replace(runs[0], config=odd)])
        assert len(table.rows) >= 7
    assert [rate_words(rate) for rate in (1e-5, 0.001, 3e-10, "x")] == [
        "1e-5",
        "0.001",
        "3e-10",
        "x",
    ]
