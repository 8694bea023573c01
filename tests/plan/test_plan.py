"""`ntkrl plan` from the command line."""

import dataclasses
import json

import jax
import pytest

from ntkrl import runtime
from ntkrl.main import main
from ntkrl.plan import candidate, chips, hardware, measure
from ntkrl.settings import read_settings
from ntkrl.training import PROBE
from tests.plan.test_programs import MODEL, WORDS, run_of, settings  # noqa: F401


@pytest.fixture
def words(tmp_path):
    """The command's words for a tiny run."""
    assert len(jax.devices()) == 8  # made before a plan asks for fewer
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    arguments = ["--config=configs/cfrl.py", f"--config.model.path={tmp_path}", *WORDS]
    return ["plan", *arguments, "--config.reward.function=exact_match"]


def test_a_plan(words, tmp_path, capsys):
    """story: every program of a run on eight virtual devices, printed and written."""
    file = tmp_path / "rows.json"
    few = ["--config.probe.ledger_by=group", "--config.probe.prompts=1"]
    assert main([*words, *few, "--topology=cpu:8", f"--json={file}"]) == 0
    printed = capsys.readouterr().out
    names = ("prefill", "cache growth", "decoding", "reference", "update classifier", "update all")
    names += ("ledger classifier", "ledger all", "kernel apply")
    assert all(f"\n{name} " in printed for name in names)
    assert "mesh fsdp 8, rollout mesh data 8, remat products" in printed and "fits: " in printed
    assert "data × fsdp = 8 does not divide the 4 rows read together" in printed
    (result,) = json.loads(file.read_text())
    rows = {row["name"]: row for row in result["programs"]}
    assert rows["update all"]["stages"] == ["all"] and rows["update all"]["runs"] == 2
    assert rows["reference from features"]["stages"] == ["classifier"]
    assert all(row["verdict"] == "fits" and row["peak_gib"] > 0 for row in rows.values())
    assert rows["decoding"]["flops"] > 0 and rows["copy of params"]["collectives"]["all-gather"]


def test_a_search(words, tmp_path, capsys):
    """story: two meshes that divide heads and rows; the one that spreads the params needs less."""
    file = tmp_path / "rows.json"
    words = ["--config=configs/sft.py" if "configs/" in row else row for row in words]
    words += ["--topology=cpu:4", "--search", "--limit=2", f"--json={file}"]
    assert main(words) == 0
    head, _, rest = capsys.readouterr().out.partition("the first in full:")
    assert len(head.splitlines()) == 5 and "kernel apply" not in rest and "update all" in rest
    plans = json.loads(file.read_text())
    assert [row["mesh"]["fsdp"] for row in plans] == [2, 1]
    peaks = [row["programs"][0]["peak_gib"] for row in plans]
    assert peaks[0] < peaks[1]


def test_meshes_of_a_search(settings):  # noqa: F811
    """by hand: 8 devices, 2 heads, 4 rows a step: tensor 2, rows over 4; three ways each."""
    run = run_of(settings("rl"))
    pairs = [
        (option.mesh, option.model.remat) for option in candidate.candidates(run.settings, run)
    ]
    meshes = [{"data": d, "fsdp": 4 // d, "tensor": 2} for d in (1, 2, 4)]
    assert [mesh for mesh, _ in pairs[:3]] == meshes
    assert [remat for _, remat in pairs[::3]] == ["products", "all", "none"]
    # twice the rows reach 8 devices without tensor parts, which come first then
    data = dataclasses.replace(run.settings.data, prompts_per_step=8)
    more = next(candidate.candidates(dataclasses.replace(run.settings, data=data), run))
    assert more.mesh == {"data": 1, "fsdp": 8, "tensor": 1}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("v5e:4x4", ("v5e", "4x4")),
        ("v5e-16", ("v5e", "4x4")),
        ("v5e-64", ("v5e", "8x8")),
        ("v5e-256", ("v5e", "16x16")),
        ("v5p-32", ("v5p", "2x2x4")),  # cores: 16 chips
        ("v5p:2x2x4", ("v5p", "2x2x4")),
        ("v6e-16", ("v6e", "4x4")),
        ("v4-8", ("v4", "2x2x1")),
    ],
)
def test_names_of_machines(name, shape):
    """by hand: friendly names and shapes."""
    assert hardware.tpu_topology(name) == shape


@pytest.mark.parametrize(
    ("name", "topology"),
    [
        ("h200", ("h200", 1)),
        ("h100-8", ("h100", 8)),
        ("a100-40gb", ("a100-40gb", 1)),
        ("a100-40gb-2", ("a100-40gb", 2)),
        ("v5e-16", None),  # of another kind of machine
    ],
)
def test_names_of_gpus(name, topology):
    """by hand: a GPU alone, or several of one machine."""
    assert hardware.gpu_topology(name) == topology


MISTAKES = [
    (["--topology=h300"], "h200, h100, a100, a100-40gb, alone or with a number of GPUs"),
    (["--topology=h200-3"], "are planned, h200-1, h200-2, h200-4, h200-8, not 3"),
    (["--topology=v7x-16"], "--topology=v7x-16 is not known; there are v4:2x2x1 and the like"),
    (["--topology=v5e:2x2x4"], "is not known"),
    (["--topology=v5p-7"], "is not known"),
    (["--topology=cpu:64"], "there are 8 CPU devices"),
    (["--topology=cpu:8", "--limit=none"], "--limit=none must be a whole number"),
    (["--topology=cpu:8", "--limit=0"], "--limit must be at least 1"),
    (["--topology=cpu:8", "--config.mesh.fsdp=3"], "does not fit 8 devices"),
    (["--topology=cpu:8", "--config.model.path=org/name"], "its shape is not known; give"),
    (["--topology=cpu:8", "--config.data.max_prompt_tokens=90"], "exceed the model's context"),
    (["--topology=cpu:8", "--config.reward.function=org/name"], "its shape is not known; give"),
    (["--topology=cpu:8", "--table=x.md"], "takes no other option"),
    (["--topology=cpu:8", "x"], "x is not an option, which begins with --"),
    ([], "plan needs --topology=NAME"),
]


@pytest.mark.parametrize(("more", "message"), MISTAKES)
def test_mistakes_are_told(words, more, message, capsys):
    """story: a sentence and status 2, no stack trace."""
    assert main([*words, *more]) == 2
    output = capsys.readouterr().err
    assert message in output and "Traceback" not in output


def test_no_compiler_is_told(words, monkeypatch, capsys):
    """story: the error names the package to install when libtpu is missing."""
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None)
    assert main([*words, "--topology=v5e-16"]) == 2
    assert "pip install 'ntkrl[tpu-plan]'" in capsys.readouterr().err


def test_no_gpu_compiler_is_told(words, monkeypatch, capsys):
    """story: the error names the extra if its packages are missing, or the system it is for."""
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None)
    assert main([*words, "--topology=h200"]) == 2
    assert "pip install 'ntkrl[gpu-plan]'. No GPU is needed" in capsys.readouterr().err
    monkeypatch.setattr(hardware.platform, "system", lambda: "Darwin")
    assert main([*words, "--topology=h200"]) == 2
    assert "exists for Linux only, not Darwin" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cfrl", "grpo", "rl", "sft"])
def test_the_papers_configs(name):
    """story: each loads, and describes Pythia-2.8B with the right objective and stages."""
    arguments = [f"--config=configs/paper/{name}.py", "--config.data.path=x.jsonl"]
    run = run_of(read_settings(runtime.read_config(arguments)))
    assert run.model.policy.config.num_hidden_layers == 32 and run.mesh.shape["fsdp"] == 8
    batch, _ = run.minibatch(run.stages[-1])
    # 512 tokens and what the template writes around a prompt, or after a response
    assert batch.tokens.shape == ((32, 515 + 513) if name == "sft" else (16, 515 + 512))
    assert list(run.scorers) == ([] if name == "sft" else ["ArmoRM-Llama3-8B-v0.1"])


REFUSALS = [
    (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (320.00G) exceeds available HBM (15.75G).",
        320.0,
    ),
    (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 18.20G of 15.75G hbm. Exceeded hbm capacity by 2.45G.",
        18.2,
    ),
    ("RESOURCE_EXHAUSTED: Used 900.50M of 15.75G hbm", 900.5 / 1024),
    ("RESOURCE_EXHAUSTED", None),
]


@pytest.mark.parametrize(("message", "needed"), REFUSALS)
def test_refusals(message, needed):
    """by hand: the memory that the compiler reports as needed."""
    result = measure.needed_gib(message)
    assert result == needed if needed is None else result == pytest.approx(needed)


NO_LEDGER = "--config.probe.ledger_every_steps=None"
KNOBS = [
    ("update", {"rows": 2}, [], "schedule.microbatches=2"),
    ("update", {}, [], "model.remat=all"),
    ("update", {}, ["--config.model.remat=all"], "model.compute_dtype=bfloat16"),
    ("generation", {}, [], "rollout.mesh.tensor=2"),
    ("generation", {}, ["--config.rollout.mesh.tensor=2"], "rollout.cache_dtype=bfloat16"),
    ("scoring", {}, [], "model.compute_dtype=bfloat16"),
    ("update", {"argument_gib": 20.0}, ["--config.mesh.data=4"], "mesh.data=1 mesh.fsdp=8"),
    ("update", {"copies_gib": 15.0}, [], "probe.ledger_every_steps=None"),
    ("update", {"copies_gib": 15.0}, [NO_LEDGER], "probe.every_steps=None"),
    ("update", {"copies_gib": 14.0}, [], "model.remat=all"),  # the copies are not to blame
    (PROBE, {"rows": 5}, [], "probe.memory_gib=1"),
    (PROBE, {}, [], "probe.ledger_every_steps=None"),
    (PROBE, {"rows": 5, "argument_gib": 20.0}, [], "probe.ledger_every_steps=None"),
]


@pytest.mark.parametrize(("part", "changes", "more", "knob"), KNOBS)
def test_what_to_turn(settings, part, changes, more, knob):  # noqa: F811
    """by hand: the first setting to change, by the program and by what fills the memory."""
    name = "ledger all" if part == PROBE else part
    sizes = {"argument_gib": 1.0, "resident_gib": 1.0, "peak_gib": 30.0, "scratch_gib": 28.0}
    cost = measure.ProgramCost(
        **{"name": name, "part": part, "stages": ("all",), "runs": 1.0, "rows": 1} | sizes | changes
    )
    verdict = candidate.verdict(run_of(settings("rl", *more)), cost, chips.TPUS["v5e"])
    advice = verdict.partition("; ")[2]
    assert verdict == f"does not fit: needs 30.0 GiB; {advice}" and knob in advice
